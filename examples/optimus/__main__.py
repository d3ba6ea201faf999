"""Compare two axes with one for the configurations of the Optimus paper, from compiled graphs.

python -m examples.optimus                       all tables, in some minutes; nothing runs
python -m examples.optimus --ranks 4 16          some of the configurations
python -m examples.optimus --picture optimus.png the picture as well; it takes matplotlib
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

from rich.console import Console

from examples.optimus import measure, paper, picture, tables
from examples.optimus.measure import Rates
from examples.optimus.model import Setting

LIMIT = 15e9
"""The bytes of a device of 16 GB that programs can use."""
RANKS = tuple(4**power for power in range(3, 11))
"""The numbers of ranks that exponents are fitted over."""
FORMS = ("1-D", "2-D")
GUESSES = {"1-D": 98, "1-D, sequence": 167, "2-D": 736}
"""Where the search for the largest batch begins; near its end, it compiles two programs of each."""
COMPARED = """\
1-D            columns, rows and vocab over one axis, as Megatron; checkpoint blocks.* split=tp
1-D, sequence  the same with sequence blocks.*; checkpoint blocks.*
2-D            summa ** over (row, col); checkpoint blocks.*
Attention is fused, and keeps no scores. What is counted is in float32."""
NOTES = """\
counted: products in blocks (2-D), or sums and gathers (1-D), messages cut up (pipelined).
less what is not sent: the paper's backward with recomputation, without a block's last product,
whose result nothing takes, and in 1-D with a gather in place of the sum that it repeats.
down a tree: the paper's formula with whole messages in log2(q) rounds."""


class Progress:
    """Says on standard error what is under way."""

    def __init__(self) -> None:
        self.console, self.start = Console(stderr=True, highlight=False), time.perf_counter()

    def __call__(self, text: str) -> None:
        self.console.print(f"[dim]{time.perf_counter() - self.start:4.0f} s  {text}[/dim]")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.optimus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [setting.ranks for setting in paper.PUBLISHED]
    parser.add_argument("--ranks", type=int, nargs="+", choices=known, default=known)
    parser.add_argument("--picture", type=Path, help="write a picture there")
    args = parser.parse_args(argv)
    if args.picture is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("`--picture` takes matplotlib: pip install 'meshwright[picture]'")
    console, say = Console(width=110, highlight=False), Progress()
    console.print(COMPARED, "\n")
    settings = [setting for setting in paper.PUBLISHED if setting.ranks in args.ranks]
    for setting in settings:
        say(f"p = {setting.ranks}: what is sent")
        batches = {form: paper.PUBLISHED[setting][form].batch for form in FORMS}
        counts = {form: measure.volumes(setting, form, batches[form]) for form in FORMS}
        console.print(tables.volumes(setting, counts))
    console.print(NOTES, "\n")
    rates = throughput(settings, say)
    console.print(tables.times(rates), "\n")
    say("isoefficiency")
    share = paper.PUBLISHED[LARGE]["2-D"].batch / LARGE.width
    fits = {form: measure.isoefficiency(form, RANKS, share) for form in FORMS}
    console.print(tables.fits(fits))
    console.print(
        f"from p = {RANKS[0]} to {RANKS[-1]}, b = {share:.4f} h, rates of {measure.CLUSTER}, "
        "1-D sums round a ring, 2-D blocks down a tree\n"
    )
    found = {
        form: measure.largest_batch(LARGE, form, LIMIT, guess, say)
        for form, guess in GUESSES.items()
    }
    console.print(tables.largest(LARGE, LIMIT, found))
    if args.picture is not None:
        picture.draw(args.picture, rates, found, fits)
        say(f"wrote {args.picture}")


LARGE = next(setting for setting in paper.PUBLISHED if setting.ranks == 64)


def throughput(settings: list[Setting], say: Progress) -> Rates:
    """Modelled sequences per second of each configuration."""
    found: Rates = {}
    for setting in settings:
        say(f"p = {setting.ranks}: times")
        for mode in ("train", "infer"):
            found[setting, mode] = {}
            for form in FORMS:
                batch = paper.PUBLISHED[setting][form].batch
                found[setting, mode] |= measure.rates(setting, form, batch, mode)
    return found


if __name__ == "__main__":
    main()
