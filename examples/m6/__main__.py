"""The M6 models on their clusters, from compiled graphs, and their recipe on a small one.

python -m examples.m6                     all models, in some minutes; nothing runs
python -m examples.m6 --models 100B 1T    some of them
python -m examples.m6 --train             pseudo stage, delinking and real stage of a small model
"""

from __future__ import annotations

import argparse
import time
from functools import partial

from rich.console import Console

from examples.m6 import measure, tables
from examples.m6.model import PLAN, SETTINGS
from examples.m6.train import train

STEPS = (120, 120)
"""Steps of the small model in each stage."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.m6",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--train", action="store_true", help="train a small model")
    args = parser.parse_args(argv)
    console = Console(width=150, highlight=False)
    if args.train:
        train(STEPS, partial(console.print, markup=False))
        return
    start, progress = time.perf_counter(), Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        progress.print(f"[dim]{time.perf_counter() - start:4.0f} s  {text}[/dim]")

    console.print("every GPU has a part of the batch and of the experts of every layer:")
    console.print(PLAN, markup=False)
    settings = [SETTINGS[name] for name in args.models]
    found = [
        each
        for setting in settings
        for stage in measure.STAGES
        for each in measure.least(setting, stage, say)
    ]
    fitting = [each for each in found if each.fits]
    real = {each.setting: each for each in fitting if each.stage == "real"}
    console.print(tables.models(real))
    console.print(tables.memory(found))
    console.print(tables.ORDER, "\n")
    console.print(tables.sent(fitting))


if __name__ == "__main__":
    main()
