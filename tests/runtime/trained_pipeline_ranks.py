"""One rank of `test_trained_pipelines.py`: pipelines of as many processes as there are.

Argument: which of the sets of pipelines. It prints, for each of them, what it has sent and received
in a step, by pair of ranks.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import torch

import meshwright as mw
from tests.equivalence import Comparison, check_trained
from tests.models import tokens
from tests.runtime.pipelines import BESIDE, SCHEDULES, Case, Tied, plan_of
from tests.runtime.same_run import rank_here
from tests.runtime.sending import moved_in_a_step, sent_by_axes

_BESIDE = list(BESIDE)[1:]
CASES: dict[str, list[Case]] = {
    "two": [
        *((*each, 2 * each[1], 4, "alone") for each in SCHEDULES),
        ("zb", 1, 2, 4, "checkpoint"),
    ],
    "four": [
        ("zb", 1, 4, 8, "alone"),
        ("1f1b", 1, 2, 4, "tensor"),
        ("interleaved", 2, 4, 4, "zero 2"),
        ("zbv", 2, 4, 4, "zero 3"),
        ("dualpipe", 1, 2, 4, "zero 2"),
    ],
    "more": [
        *((*each, 4, 8, "alone") for each in SCHEDULES if each[1] == 1),
        *((*each, 2 * each[1], 4, _BESIDE[i % 4]) for i, each in enumerate(SCHEDULES)),
        *((*each, 2 * each[1], 8, _BESIDE[(i + 2) % 4]) for i, each in enumerate(SCHEDULES)),
    ],
}
"""Schedules as in `plan_of`."""
STEPS = 10


@cache
def compiled(case: Case) -> mw.Program:
    """The program of every rank; forked ranks have it already."""
    torch.manual_seed(0)
    plan = mw.Plan.parse(plan_of(*case))
    return mw.compile(Tied(case[2]), plan, example=tokens(12, 16, 4))


def moved(program: mw.Program) -> list[Any]:
    """The messages of a step from stage to stage: their ranks, and the bytes of each that is sent
    or received. Together with all others they are as many, and as large, as the program says."""
    own = program.comm().by_place()[program.place(rank_here())]
    found = moved_in_a_step(program, tokens(12, 16, 4))
    assert sent_by_axes(found) == own.bytes_by_axis(), (found, own.counts())
    passed = [(label, each) for label, each in found.items() if each.members and ">" in label]
    count = sum(len(each.sent) for _, each in passed)
    assert count == own.where(lambda item: item.kind == "transfer").times() > 0
    return [(label, each.members, each.sent, each.received) for label, each in passed]


def warm_up() -> None:
    """Compile what every rank trains."""
    for case in dict.fromkeys(CASES["two"] + CASES["four"]):
        compiled(case)


def main(name: str) -> None:
    torch.set_num_threads(1)
    found = []
    for number, case in enumerate(CASES[name]):
        program = compiled(case)
        torch.manual_seed(number)
        batches = [tokens(12, 16, 4) for _ in range(STEPS)]
        check_trained(program, copy.deepcopy(program.model), batches, compare=Comparison(1e-10))
        found.append(moved(program))
    print(json.dumps(found))
