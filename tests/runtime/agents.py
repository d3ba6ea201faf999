"""A script under torchrun, for `test_torchrun.py`: it trains, and one rank has a mishap.

Arguments: a folder, the number of ranks, and what happens to whom: `rank what`, or nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from meshwright.runtime.transports import shared
from tests.runtime.mishaps import compiled
from tests.runtime.models import batch

RANK = int(os.environ["RANK"])


def befall(what: str, folder: Path) -> None:
    """What happens to a rank after the first step."""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise ZeroDivisionError("the loss scale is 0")
    if what in ("compute", "wait"):
        (folder / f"here-{os.getpid()}").touch()
        time.sleep(300)


def main(folder: Path, culprit: str, what: str) -> None:
    torch.set_num_threads(1)
    program = compiled(int(os.environ["WORLD_SIZE"]))
    if what == "not launched":
        (folder / f"here-{os.getpid()}").touch()
        time.sleep(300)
    if what == "own group":
        dist.init_process_group("gloo")
    run = program.launch()
    if what == "own group":
        dist.destroy_process_group()
    losses = []
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    for number in range(3):
        losses.append(run.step(*batch(number))[0].item())
        optimizer.step()
        optimizer.zero_grad()
        if number == 0 and what == "wait":
            (folder / f"here-{os.getpid()}").touch()
        if number == 0 and culprit == str(RANK):
            befall(what, folder)
    (folder / f"losses-{RANK}").write_text(json.dumps(losses))
    lanes = run.transport.lanes  # type: ignore[attr-defined]  # of a process
    kinds = [isinstance(lane.group, shared.SharedGroup) for lane in lanes.values() if lane.group]
    (folder / f"shared-{RANK}").write_text(json.dumps(kinds))
    run.close()


if __name__ == "__main__":
    folder, *mishap = sys.argv[1:]
    main(Path(folder), *(mishap or ["", ""]))
