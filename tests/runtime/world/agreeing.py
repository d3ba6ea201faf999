"""Run by every process of a test: an error on one rank is raised on all, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import meshwright as mw
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.world.agreement import agreed, first_says, told
from tests.runtime.models import PLANS, batch, make

Case = Mapping[int | str, Callable[[], Any]]


def out_of_memory() -> None:
    raise MemoryError


def fails(problem: str, *where: str, help: str = "make room there") -> Callable[[], None]:
    def work() -> None:
        raise mw.RunError(problem, where=where, help=help)

    return work


def rest(size: int) -> dict[int | str, Callable[[], None]]:
    return {rank: fails(f"cannot write `{rank}.safetensors`: disk full") for rank in range(size)}


CASES: dict[str, Case] = {
    "one rank": {1: fails("cannot write `a`: disk full", "1.1 GB are wanted", "0 B are free")},
    "every rank, alike": dict.fromkeys(range(4), fails("there is no checkpoint in `a`")),
    "every rank, each its own": rest(4),
    "two alike, one otherwise": {
        **dict.fromkeys((0, 2), fails("there is no checkpoint in `a`", help="name a folder")),
        3: out_of_memory,
    },
    "rank 0 for all": {"first": fails("there is no checkpoint in `a`", "it is empty")},
    "a name that is not UTF-8, and very long": {0: fails("cannot read `\udcff" + "x" * 5000)},
}


def program(state: RankState, case: Case) -> RankProgram:
    if "first" in case:
        yield from first_says(state, case["first"])
    found = yield from agreed(state, case.get(state.rank, lambda: state.rank))
    return found, (yield from told(state, f"rank {state.rank} says: ü" * (1 + state.rank)))


def drive(run: mw.Run) -> str:
    """The errors that a run raises in each case, and uses of it in between."""
    lines = []
    for name, case in CASES.items():
        assert results(run, {}) == [(state.rank, "rank 0 says: ü") for state in run.states]
        try:
            results(run, case)
        except mw.RunError as error:
            text = str(error).replace("x" * 100, "x(100)")
            lines += [f"# {name}", text, f"{error.peers}"]
        run.step(*batch())
    return "\n".join(lines)


def results(run: mw.Run, case: Case) -> list[Any]:
    return run.transport.run([program(state, case) for state in run.states])


def main() -> None:
    program_of_four = mw.compile(make(), mw.Plan.parse(PLANS["both"]), batch())
    with program_of_four.launch() as run:
        print(drive(run))
