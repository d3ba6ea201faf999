"""What a schedule looks like in a terminal, and what it comes to."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import meshwright as mw
from meshwright.compiler.errors import CompilerError
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.report.assumed import (
    Assumed,
    counted_costs,
    equal_costs,
    given_costs,
    spread,
)
from meshwright.compiler.report.pipeline import PipelineSchedule
from meshwright.compiler.schedules.asked import other_table
from meshwright.compiler.schedules.named import NAMED
from meshwright.compiler.schedules.routes import chain
from meshwright.compiler.schedules.tables import Size
from meshwright.dsl.statements import Stages
from meshwright.runtime.executor import Executor
from meshwright.runtime.measuring import _Timed, measured
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens

Golden = Callable[[str, str], None]
TABLES = {"1f1b": Size(2, 4), "zb": Size(4, 6), "dualpipe": Size(2, 4)}
STAGES = "stages at blocks.1 over pp microbatches=4 schedule=zb\n"
PLAN = f"mesh dp=2, pp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}{STAGES}"


def scheduled(name: str, size: Size, assumed: Assumed | None = None) -> PipelineSchedule:
    table = NAMED[name].fill(size)
    num_stages = len(table.holders)
    return PipelineSchedule(table, chain(num_stages), assumed or equal_costs(num_stages))


@cache
def program(device: str = "cpu") -> mw.Program:
    torch.manual_seed(0)
    with torch.device(device):
        return mw.compile(Gpt(), mw.Plan.parse(PLAN), tokens(), device="cpu")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_and_its_timeline_have_golden_texts(name: str, golden: Golden) -> None:
    golden(f"schedule-{name}", scheduled(name, TABLES[name]).text())


def test_what_costs_more_is_drawn_longer(golden: Golden) -> None:
    costs = {"forward": [1, 2.5], "backward": (1.5, 2), "weight": [1, 0.75], "hop": 0.25}
    golden("schedule-uneven", scheduled("1f1b", Size(2, 2), given_costs(costs, 2)).text())


def test_the_schedule_of_a_program_has_a_golden_text(golden: Golden) -> None:
    """With its sends and receives, what runs once, and the count of labels."""
    golden("schedule-program", str(program().schedule()))
    alone = mw.compile(Gpt(), mw.Plan.parse(f"mesh dp=2\n{GPT_DATA}accumulate 2\n"), tokens())
    golden("schedule-alone", f"{alone.schedule()}\n{alone.schedule()!r}")


@pytest.mark.parametrize("weight", [0, 1e-100, 1e-6, 1e6, 1e100])
def test_extreme_costs_are_drawn_within_bounds(weight: float) -> None:
    costs = {"forward": 1, "backward": 1, "weight": weight}
    text = scheduled("zb", Size(4, 8), given_costs(costs, 4)).text()
    assert len(text.splitlines()) < 70
    assert max(map(len, text.splitlines())) <= 80
    nothing = scheduled("zb", Size(4, 8), given_costs(dict.fromkeys(costs, 0), 4))
    assert (nothing.step_time, nothing.bubble_fraction) == (0, 0)
    assert nothing.text()


def test_every_row_is_printed_whole_and_as_long_as_the_others() -> None:
    console = Console(file=io.StringIO(), width=50, color_system=None)
    scheduled("interleaved", Size(4, 8, 2)).print(console)
    assert isinstance(console.file, io.StringIO)
    rows = [line for line in console.file.getvalue().splitlines() if line.startswith("rank")][4:]
    drawn = ["".join(row[8:] for row in rows[c::4]) for c in range(4)]
    assert len(set(map(len, drawn))) == 1
    for c in range(4):
        assert sum(drawn[c].count(f"{stage}F") for stage in (c, c + 4)) == 16


def test_given_costs_come_to_what_the_papers_say() -> None:
    costs = {"forward": 3, "backward": 4, "weight": 2}
    found = program().schedule(costs=costs)
    assert found.step_time == 4 * 9 + (3 + 4 - 2)
    assert found.bubble_fraction == pytest.approx(5 / 41)
    assert (found.window, found.activations) == (41, (2, 2))
    data = json.loads(json.dumps(found.to_json()))
    assert data["ranks"][0][:3] == ["before 0", *data["ranks"][0][1:3]]
    assert data["step_time"] == max(each["end"] for row in data["times"] for each in row)
    assert data["messages"] == sum(e.startswith("send") for row in data["ranks"] for e in row)


@pytest.mark.parametrize(
    "name", ["number", "missing", "unknown", "text", "negative", "nan", "too-many", "two-hops"]
)
def test_costs_that_cannot_be_have_golden_texts(name: str, golden: Golden) -> None:
    whole: dict[str, Any] = {"forward": 1, "backward": 1, "weight": 1}
    wrong: dict[str, Any] = {
        "number": 3,
        "missing": {"forward": 1},
        "unknown": {**whole, "hops": 1},
        "text": {**whole, "weight": "1"},
        "negative": {**whole, "weight": [1, -1]},
        "nan": {**whole, "hop": float("nan")},
        "too-many": {**whole, "forward": [1, 2, 3]},
        "two-hops": {**whole, "hop": [1, 1]},
    }
    with pytest.raises(CompilerError) as error:
        program().schedule(costs=wrong[name])
    golden(f"costs-{name}", str(error.value))


@pytest.mark.parametrize("weight", [float("inf"), 1e-200, True, [1, 1]])
def test_costs_beyond_floats_and_of_too_few_stages_are_refused(weight: Any) -> None:
    with pytest.raises(CompilerError, match="`weight` in `costs`"):
        given_costs({"forward": 1, "backward": 1, "weight": weight}, 3)


def test_costs_are_told_in_a_unit_that_fits_and_keep_the_hop_for_other_stages() -> None:
    counted = Assumed(equal_costs(2).costs, "counted", "FLOPs")
    found = [counted.text(time) for time in (3, 999.6, 2e15, 1e24)]
    assert found == ["3 FLOPs", "1 KFLOPs", "2 PFLOPs", "1e+09 PFLOPs"]
    given = given_costs({"forward": 1, "backward": 2, "weight": 1, "hop": 3, "after": [0, 4]}, 2)
    assert given.by_stage and not equal_costs(2).by_stage
    costs = spread(given, 4).costs
    assert (costs.hop, costs.around) == (3, {Phase.AFTER: [1, 1, 1, 1]})


def test_stages_are_measured_on_this_machine() -> None:
    for device in ("cpu", "meta"):  # which has no values, and needs none
        found = program(device).schedule(simulate=True)
        costs = found.assumed.costs
        each = (*costs.forward, *costs.backward, *costs.weight)
        assert len(each) == 6 and all(0 < seconds < 10 for seconds in each)
        assert "measured on this machine" in found.text()
        assert found.to_json()["costs"]["unit"] == "seconds"  # type: ignore[index]


def test_two_copies_that_scatter_gradients_are_measured_and_their_memory_known() -> None:
    plan = PLAN.replace("=zb", "=dualpipe").replace(", tp=2", "").replace(GPT_TENSOR, "")
    found = mw.compile(Gpt(), mw.Plan.parse(f"{plan}zero 2 over dp\n"), tokens(), device="cpu")
    assert found.schedule(simulate=True).step_time > 0
    assert found.memory().peak > program().memory().peak


def on_a_device_that_is_not_here() -> mw.Program:
    plan = mw.Plan.parse(PLAN)
    return mw.compile(Gpt(), plan, tokens(), device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be measured")
def test_operations_are_counted_where_there_is_no_device_to_measure_on(golden: Golden) -> None:
    """What the hop and graphs around the loop cost can be given beside."""
    own = on_a_device_that_is_not_here()
    found = own.schedule(simulate=True, costs={"hop": 1e4, "after": [0, 5e4]})
    golden("schedule-counted", found.text())
    costs = found.assumed.costs
    # All of the model's operations, once; the head is in the last stage.
    plan = f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}accumulate 4\n"
    joined = mw.compile(Gpt(), mw.Plan.parse(plan), tokens())
    (alone,) = counted_costs(joined.stages).costs.forward
    assert alone == sum(costs.forward)
    assert costs.forward[0] < costs.forward[1]
    assert found.to_json()["costs"]["unit"] == "FLOPs"  # type: ignore[index]


def test_what_runs_around_the_loop_and_the_way_between_ranks_take_time() -> None:
    costs = {"forward": 3, "backward": 4, "weight": 2}
    plain = program().schedule(costs=costs)
    for kind, added in {"before": 5, "count": 4 * 5, "after": 5}.items():
        found = program().schedule(costs={**costs, kind: [0, 5]})
        assert plain.step_time < found.step_time <= plain.step_time + added
        assert found.to_json()["costs"][kind] == [0, 5]  # type: ignore[index]
    assert program().schedule(costs={**costs, "hop": 1}).step_time > plain.step_time


def test_other_schedules_and_sizes_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"forward": 3, "backward": 4, "weight": 2}
    found = program().schedule(costs=costs, schedule="1f1b", ranks=4, microbatches=8)
    assert found.step_time == 8 * 9 + 3 * (3 + 4)
    assert found.activations == (4, 3, 2, 1)
    assert found.num_messages == 2 * 8 * 3
    assert program().schedule(schedule="zbv").activations == (4, 4)
    own = tmp_path / "own.csv"
    own.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    monkeypatch.chdir(tmp_path)
    for name in (str(own), "own.csv", '"own.csv"'):
        assert program().schedule(schedule=name, microbatches=2, costs=costs).step_time == 25


def test_another_size_is_asked_for_with_the_stages_of_the_plan() -> None:
    text = "mesh pp=2\nstages 4 over pp schedule=interleaved virtual=2 microbatches=4\n"
    (statement,) = mw.Plan.parse(text).of(Stages)
    own = NAMED["interleaved"].fill(Size(2, 4, 2))
    table, links = other_table(own, statement, None, None, None, 8)
    assert (len(table.holders), table.microbatches, len(links)) == (4, 8, 6)
    with pytest.raises(mw.PlanError, match="microbatches"):
        other_table(own, statement, None, None, None, 0)


def test_a_program_without_a_backward_is_asked_for_one_forward() -> None:
    plan = mw.Plan.parse(f"mesh pp=2\n{GPT_DATA.replace(' over dp', '')}{STAGES}")
    own = mw.compile(Gpt(), plan, tokens(), device="cpu", mode="infer")
    found = own.schedule(ranks=4)
    assert (found.step_time, found.num_messages, found.activations) == (4, 3, (1, 1, 1, 1))


def test_the_costs_of_other_stages_are_those_of_the_plan_spread_evenly() -> None:
    for own in (program(), mw.compile(Gpt(), mw.Plan.parse(f"mesh dp=2\n{GPT_DATA}"), tokens())):
        whole = counted_costs(own.stages).costs
        costs = spread(counted_costs(own.stages), 8).costs
        assert sum(costs.forward) == pytest.approx(sum(whole.forward))
        both = (*whole.backward, *whole.weight)
        assert sum((*costs.backward, *costs.weight)) == pytest.approx(sum(both))
        assert len(set(costs.weight)) == 1 and 0 < costs.weight[0] <= costs.backward[0]
    found = program().schedule(simulate=True, ranks=4, virtual=2, schedule="interleaved")
    assert "spread evenly over 8" in found.text().replace("\n    ", " ")


@pytest.mark.parametrize(
    "asked", [{"schedule": "zb1"}, {"ranks": 0}, {"schedule": "zbv", "virtual": 3}]
)
def test_a_schedule_that_cannot_be_asked_for_has_a_golden_text(
    asked: dict[str, Any], golden: Golden
) -> None:
    with pytest.raises(mw.PlanError) as error:
        program().schedule(**asked)
    golden(f"asked-{'-'.join(asked)}", str(error.value))


def test_measuring_leaves_the_model_and_its_program_as_they_were() -> None:
    own = program()
    before = {name: value.clone() for name, value in own.model.state_dict().items()}
    batch = tokens()
    expected = own.launch().step(*batch)
    measured(own)
    assert all(value.equal(before[name]) for name, value in own.model.state_dict().items())
    assert own.launch().step(*batch).equal(expected)


def test_a_stage_that_computes_more_is_measured_to_cost_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the clock of the test, on which each action takes as long as its stage has nodes."""
    clock = 0.0

    def act(self: Any, action: Any, step: Any) -> Any:
        nonlocal clock
        clock += len(own.stages[action.stage].graphs[action.kind].nodes)
        return (yield from original(self, action, step))

    own, original = program(), Executor.act
    monkeypatch.setattr(Executor, "act", act)
    monkeypatch.setattr(_Timed, "_now", lambda self: clock)
    costs = measured(own)
    assert costs is not None
    for stage in own.stages:
        assert costs.forward[stage.number] == len(stage.forward.nodes)
