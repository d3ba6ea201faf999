"""What schedules cost: the closed forms of the papers, for random costs and sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from meshwright.compiler.schedules.named import NAMED
from meshwright.compiler.schedules.simulate import Costs, Simulation, Simulator, in_flight
from meshwright.compiler.schedules.tables import B, F, Size, Table


@lru_cache
def table_of(name: str, p: int, m: int, v: int) -> Table:
    return NAMED[name].fill(Size(p, m, v))


@lru_cache
def simulator(name: str, p: int, m: int, v: int, late: bool) -> Simulator:
    return Simulator(table_of(name, p, m, v), late=late, fused=True)


def simulated(
    name: str,
    p: int,
    m: int,
    v: int,
    costs: tuple[int, int, int] = (12, 12, 12),
    *,
    late: bool = False,
    hop: float = 0,
) -> Simulation:
    """With costs of all stages that a coordinate has."""
    each = [[cost / v] * (p * v) for cost in costs]
    ran = simulator(name, p, m, v, late).run(Costs(*each, hop=hop))
    assert set(ran.busy) == {m * sum(costs)}
    return ran


def cases(count: int = 200) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Coordinates, microbatches, stages per coordinate, and costs W <= F <= B, of which a share is
    a whole number."""
    random.seed(0)
    for _ in range(count):
        p, v = random.choice([2, 4, 6, 8]), random.choice([2, 3])
        w, f, b = sorted(12 * random.randint(1, 40) for _ in range(3))
        yield p, random.choice([2, 3]) * p, v, f, b, w


def test_bubbles_of_two_hundred_random_costs_are_those_of_the_closed_forms() -> None:
    for p, m, v, f, b, w in cases():
        wave, early, saved = f + b + w, f + b, f + b - w
        expected = [
            ("gpipe", 1, wave, True),
            ("1f1b", 1, wave, True),
            ("1f1b", 1, early, False),
            ("gpipe", v, wave, True),
            ("interleaved", v, wave, True),
            ("interleaved", v, early, False),
            ("zb", 1, saved, False),
            ("zb", v, saved, False),
        ]
        for name, virtual, each, late in expected:
            ran = simulated(name, p, m, virtual, (f, b, w), late=late)
            assert ran.makespan == m * wave + (p - 1) * each / virtual, (name, p, m, v, f, b, w)


def test_windows_and_makespans_of_two_hundred_random_costs_where_both_are_known() -> None:
    for p, m, _, f, b, w in cases():
        costs, work = (f, b, w), m * (f + b + w)
        if f + b >= 2 * w:
            ran = simulated("zbh2", p, m, 1, costs)
            assert ran.window == work + (p - 1) * (f + b - 2 * w)
            assert ran.makespan == work + (p - 1) * max(f, f + b - 2 * w)
        ran = simulated("zbv", p, m, 2, costs)
        assert ran.window == work + (p - 1) * (b - w)
        assert ran.makespan == work + (p - 1) * max(b / 2, b - w)
        most = (f + b + w) + (b + w) - 3 * w
        assert simulated("dualpipe", p, m, 1, costs).makespan <= work + (p / 2 - 1) * most
        assert simulated("dualpipev", p, m, 2, costs).makespan <= work + (p - 1) / 2 * most


def peaks(table: Table, *until: Any) -> list[float]:
    """By coordinate, in units of all stages that it has."""
    return [in_flight(table, c, *until) / table.virtual for c in table.coordinates]


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_peaks_and_messages_are_those_of_the_closed_forms(p: int) -> None:
    m, v, ranks = 2 * p, 3, range(p)
    expected = {
        ("gpipe", 1): [m for r in ranks],
        ("1f1b", 1): [min(m, p - r) for r in ranks],
        ("interleaved", v): [((v - 1) * p + 2 * (p - 1 - r) + 1) / v for r in ranks],
        ("gpipe", v): [m for r in ranks],
        ("zb", 1): [p for r in ranks],
        ("zbh2", 1): [2 * p - 1 for r in ranks],
        ("zb", v): [((v - 1) * p + p) / v for r in ranks],
        ("zbv", 2): [p for r in ranks],
        ("dualpipe", 1): [p + 1 for r in ranks],
        ("dualpipev", 2): [p + 1 / 2 for r in ranks],
    }
    for (name, virtual), most in expected.items():
        table = table_of(name, p, m, virtual)
        assert peaks(table) == most, name
        num_messages = simulated(name, p, m, virtual).num_messages
        hops = len(table.holders) - (2 if name in ("zbv", "dualpipev") else 1)
        assert num_messages == 2 * m * hops, name
    assert peaks(table_of("zb", p, m, 1), (F, B)) == [p - r for r in ranks]
    assert peaks(table_of("zbh2", p, m, 1), (F, B)) == [2 * (p - 1 - r) + 1 for r in ranks]


WORKED = {
    ("1f1b", 1): ((15, 15, 2, 8), (33, 33, 4, 48)),
    ("gpipe", 1): ((15, 15, 4, 8), (33, 33, 8, 48)),
    ("interleaved", 2): ((13.5, 13.5, 2.5, 24), (28.5, 28.5, 5.5, 112)),
    ("zb", 1): ((13, 13, 2, 8), (27, 27, 4, 48)),
    ("zbh2", 1): ((13, 12, 3, 8), (27, 24, 7, 48)),
    ("zbv", 2): ((12.5, 12, 2, 16), (25.5, 24, 4, 96)),
    ("dualpipe", 1): ((12, 12, 3, 8), (26, 26, 5, 48)),
    ("dualpipev", 2): ((13, 13, 2.5, 16), (27, 27, 4.5, 96)),
}
"""Makespan, window, peak of coordinate 0 and messages with equal costs; p=2, m=4 and p=4, m=8."""


@pytest.mark.parametrize("case", WORKED, ids=str)
def test_worked_examples_come_out_number_by_number(case: tuple[str, int]) -> None:
    name, v = case
    for (p, m), expected in zip([(2, 4), (4, 8)], WORKED[case], strict=True):
        ran = simulated(name, p, m, v, (1, 1, 1), late=name in ("gpipe", "1f1b", "interleaved"))
        found = ran.makespan, ran.window, peaks(table_of(name, p, m, v))[0], ran.num_messages
        assert found == expected


def test_actions_start_when_the_papers_say() -> None:
    starts = {
        name: [
            {str(each.action): each.start for each in row}
            for row in simulated(name, 4, 8, 1, (1, 1, 1), late=name == "1f1b").rows
        ]
        for name in ("1f1b", "zb")
    }
    assert starts["1f1b"][0]["backward 0"] == 10
    assert starts["1f1b"][0]["forward 0 of microbatch 4"] == 12
    assert starts["1f1b"][3]["backward 3"] == 4
    assert [starts["zb"][0][f"{kind} 0"] for kind in ("backward", "weight")] == [7, 8]
    assert starts["zb"][2]["backward 2"] == 5
    assert starts["zb"][2]["forward 2 of microbatch 2"] == 6


@pytest.mark.parametrize(
    ("name", "p", "m", "v", "early", "late"),
    [("zbv", 4, 8, 2, 25.5, 28.5), ("zbv", 8, 16, 2, 51.5, 58.5), ("dualpipev", 4, 8, 2, 27, 28)],
)
def test_a_gradient_that_is_sent_after_the_whole_backward_costs_time(
    name: str, p: int, m: int, v: int, early: float, late: float
) -> None:
    for expected, is_late in ((early, False), (late, True)):
        assert simulated(name, p, m, v, (1, 1, 1), late=is_late).makespan == expected


@pytest.mark.parametrize(
    ("name", "v", "times"),
    [("1f1b", 1, 28), ("interleaved", 2, 14), ("zb", 1, 12), ("zbh2", 1, 3), ("zbv", 2, 14),
    ],
)  # fmt: skip
def test_hops_add_up_as_often_as_they_are_waited_for(name: str, v: int, times: int) -> None:
    late = name in ("1f1b", "interleaved")
    spans = [simulated(name, 4, 16, v, (8, 8, 8), late=late, hop=c).makespan for c in (0, 4)]
    assert spans[1] - spans[0] == 4 * times


def test_few_microbatches_leave_bubbles() -> None:
    ones = (1, 1, 1)
    found = [simulated("zb", 4, m, 1, ones).makespan - 3 * m for m in (5, 4, 3, 2)]
    assert found == [3, 3, 4, 5]
    assert [simulated("zbv", 4, m, 2, ones).window - 3 * m for m in (7, 6, 4)] == [0, 1, 3]


def test_gpipe_over_uneven_stages_waits_for_the_slowest() -> None:
    random.seed(1)
    for _ in range(50):
        p, m = random.randint(2, 6), random.randint(1, 9)
        f, b, w = ([random.randint(1, 30) for _ in range(p)] for _ in range(3))
        whole = [x + y for x, y in zip(b, w, strict=True)]
        ran = simulator("gpipe", p, m, 1, True).run(Costs(f, b, w))
        assert ran.makespan == sum(f) + sum(whole) + (m - 1) * (max(f) + max(whole))
        idle = 1 - m * (sum(f) + sum(whole)) / (p * ran.makespan)
        assert abs(ran.bubble_fraction - idle) < 1e-12
