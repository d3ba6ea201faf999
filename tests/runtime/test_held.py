"""Ranks that hold the parameters of their own part of a model alone do what ranks that hold all do.

Gradients are those of a run of the same plan in which every rank holds everything.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.compiler.errors import PassError
from meshwright.compiler.report.memory.prediction import memories
from meshwright.compiler.report.summary import summarise
from meshwright.runtime.optimizers.optimizer import make_optimizer
from tests.runtime.checkpoint.test_plans import contents, same
from tests.runtime.held import HALVES, TWICE, Places, equal, give_gradients, held, whole
from tests.runtime.models import PLANS, batch, make
from tests.runtime.processes import finish, start

Pair = tuple[mw.Run, mw.Run]
GROUPS = [{"params": ["**.bias"], "weight_decay": 0.0}, {"params": ["blocks.1.**"], "lr": 3e-3}]

CASES: list[tuple[str, int, Places]] = [
    ("tensor", 2, HALVES),
    ("data", 4, TWICE),
    ("zero", 2, HALVES),
]


def plan(name: str, size: int) -> str:
    """A plan in which the ranks along `pp` do the same."""
    text = PLANS[name].replace("accumulate 2\n", "").replace("mesh ", f"mesh pp={size}, ")
    return text + "allow replicate **\n"


def pair(case: tuple[str, int, Places], **options: Any) -> Pair:
    """A run whose ranks hold all, and one whose ranks hold what is at their places."""
    name, size, places = case
    program = whole(plan(name, size))
    return program.launch(**options), held(program, places).launch(**options)


def adamw(run: mw.Run) -> torch.optim.Optimizer:
    return run.optimizer(torch.optim.AdamW, groups=GROUPS, lr=1e-2, weight_decay=0.1)


def trained(case: tuple[str, int, Places]) -> tuple[Pair, list[torch.optim.Optimizer]]:
    """Both after three steps with a schedule, and compared after each."""
    runs = pair(case)
    optimizers = [adamw(run) for run in runs]
    rates = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in optimizers]
    for number in range(3):
        runs[0].step(*batch(number))
        give_gradients(runs[1], runs[0])
        ours, theirs = (run.gradients() for run in runs)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for norm in (3.0, float("inf"), 2.0):
            # No gradient is changed: rounding would differ.
            one, other = (run.clip_grad_norm_(1e9, norm) for run in runs)
            torch.testing.assert_close(one, other, rtol=1e-13, atol=0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
        assert equal(*runs)
    return runs, optimizers


@pytest.mark.parametrize("case", CASES, ids=["tensor", "twice", "zero"])
def test_training_and_checkpoints_do_not_depend_on_who_holds_what(
    case: tuple[str, int, Places], tmp_path: Path
) -> None:
    (one, run), (first, optimizer) = trained(case)
    run.check(optimizer)
    one.save(tmp_path / "one", first)
    run.save(tmp_path / "held", optimizer)
    saved, program = contents(tmp_path / "one"), whole(plan(*case[:2]))
    assert same(contents(tmp_path / "held"), saved)
    for place, name in enumerate(("mesh dp=1", "both")):
        for source, target in (("held", whole(name)), (name, held(program, case[2]))):
            other = target.launch(state_dict=make(5).state_dict())
            theirs = adamw(other)
            other.load(tmp_path / source, theirs)
            other.check(theirs)
            assert equal(other, run)
            other.save(tmp_path / (name if source == "held" else f"again {place}"), theirs)
        assert same(contents(tmp_path / f"again {place}"), saved)


def test_a_rank_allocates_only_what_it_holds() -> None:
    _, run = pair(CASES[1])
    at = {coord: {name for s in run.states if s.coords["pp"] == coord for _, name in s.tensors}
          for coord in range(4)}  # fmt: skip
    assert at[0] == {"wte.weight", "spare", "scratch"}
    assert at[1] < at[2] == at[1] | {"wpe.weight"}
    assert at[3] == at[0] | {"steps"}
    names = [name for name, _ in run.named_parameters()]
    assert names.count("wte.weight") == names.count("blocks.0.up.bias") == 4
    assert (names.count("wpe.weight"), names.count("spare")) == (2, 8)


def test_copies_are_compared_among_those_that_hold_them() -> None:
    _, run = pair(CASES[1])
    run.check()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    for state in run.states:
        for parameter in state.parameters.values():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    run.check(optimizer)
    with torch.no_grad():
        run.states[6].parameters["wte.weight"][0] += 0.5
        run.states[5].parameters["blocks.0.up.bias"].grad[0] += 0.25
    moment = optimizer.state[run.states[3].parameters["blocks.1.ln.bias"]]["momentum_buffer"]
    moment += 2.0
    with pytest.raises(mw.RunError, match="copies of 3 tensors differ") as caught:
        run.check(optimizer)
    for line in (
        "`wte.weight`: rank 6 differs from ranks 0, 1 and 7 by up to 5.0e-01",
        "the gradient of `blocks.0.up.bias`: rank 5 differs from ranks 2, 3 and 4 by up to 2.5e-01",
        "`momentum_buffer` of `blocks.1.ln.bias`: rank 3 differs from ranks 2, 4 and 5",
    ):
        assert line in str(caught.value)


def test_a_gradient_that_only_some_holders_have_is_told() -> None:
    _, run = pair(CASES[0])
    run.states[3].parameters["blocks.1.ln.bias"].grad = torch.zeros(16, dtype=torch.float64)
    with pytest.raises(mw.RunError, match="the list of gradients and optimizer state: rank 3"):
        run.check()


def test_a_nan_where_one_rank_holds_it_stops_all_and_is_named() -> None:
    one, run = pair(CASES[0])
    one.step(*batch())
    give_gradients(run, one)
    optimizer, before = adamw(run), run.state_dict()
    for state in run.states[2:]:
        state.parameters["blocks.1.up.bias"].grad[0] = torch.nan  # type: ignore[index]
    with pytest.raises(mw.RunError, match=r"the gradient of `blocks\.1\.up\.bias` has a NaN"):
        optimizer.step()
    after = run.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_overflow_where_one_rank_holds_it_skips_the_update_on_all() -> None:
    text = plan("data", 2).replace("allow", "precision fp16\nallow")
    program = mw.compile(make().float(), mw.Plan.parse(text), batch())
    run = held(program, HALVES).launch()
    optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
    for state in run.states:
        for name, parameter in state.parameters.items():
            parameter.grad = torch.full_like(parameter, torch.inf if "1.up" in name else 1.0)
    optimizer.step()
    assert (run.loss_scale, run.num_skipped, len(optimizer.state)) == (2.0**15, 1, 0)
    assert {state.num_updates for state in run.states} == {0}


def test_initial_values_and_state_dicts_reach_those_that_hold_them() -> None:
    name, size, places = CASES[1]
    with torch.device("meta"):
        model = make()
    program = mw.compile(model, mw.Plan.parse(plan(name, size)), batch())
    own = make()
    given = {name: getattr(own, name).detach() for name in ("spare", "steps", "scratch")}
    one, run = (each.launch(seed=3, state_dict=given) for each in (program, held(program, places)))
    assert not any(state.unset for state in run.states)
    assert equal(one, run)
    run.load_state_dict(make(4).state_dict())
    target = make(5)
    run.copy_to(target)
    expected = make(4).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in target.state_dict().items())


class Together(torch.optim.SGD):
    """Divides by the norm of all gradients."""

    def step(self, closure: Any = None) -> Any:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(held, 1e-3)
        return super().step(closure)


def test_optimizers_that_look_at_all_tensors_are_refused() -> None:
    _, run = pair(CASES[1])
    with pytest.raises(mw.RunError) as caught:
        run.optimizer(Together, lr=0.1)
    assert str(caught.value).splitlines() == [
        "`Together` looks at all tensors together, and no rank holds all of them",
        "  `wte.weight`: held at pp=0 and 3 of `pp=4, dp=2`",
        "  help: use an elementwise optimizer such as AdamW or SGD",
    ]


def test_a_rank_without_any_parameter_of_a_group_has_the_group() -> None:
    _, run = pair(CASES[0])
    first = dict(run.states[0].parameters).items()
    for kind in ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD"):
        made = getattr(torch.optim, kind)
        optimizer = make_optimizer(run.program, first, made, GROUPS, {"lr": 0.1})
        assert [bool(group["params"]) for group in optimizer.param_groups] == [True, False, True]
        for _, parameter in first:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        alone = make_optimizer(run.program, (), made, GROUPS, {"lr": 0.1})
        alone.step()
        assert [len(group["params"]) for group in alone.param_groups] == [0, 0, 0]


def test_a_stage_whose_parameters_are_elsewhere_is_our_bug() -> None:
    program = whole(plan("tensor", 2))
    wrong = replace(held(program, HALVES), stages=program.stages)
    with pytest.raises(PassError, match=r"rank 0 does not hold `blocks\.1"):
        wrong.launch()


def test_real_ranks_do_what_virtual_ones_do(tmp_path: Path) -> None:
    """See the script."""
    processes = start(Path(__file__).with_name("held_ranks.py"), 2, str(tmp_path))
    outputs = finish(processes, 240)
    assert [process.returncode for process in processes] == [0, 0], outputs


def test_memory_is_that_of_what_each_rank_holds() -> None:
    program = held(whole(plan("zero", 2)), HALVES)
    found = memories(program)
    for rank in (0, 4):
        state = pair(CASES[2])[1].states[rank]
        memory = found[f"pp={rank // 4}"]
        here = (n for n in state.parameters if not program.parameters[n].kept.value.away)
        assert memory.parameters == sum(state.parameters[name].nbytes for name in here)
        assert memory.gradients == 0  # of graphs that compute nothing
    run = pair(CASES[2])[0]
    run.step(*batch(0))
    own, kept = run.states[0].parameters, run.program.parameters
    gradients = [
        p.grad for n, p in own.items() if p.grad is not None and not kept[n].kept.update.away
    ]
    assert run.program.memory().gradients == sum(grad.nbytes for grad in gradients) > 0
    assert program.memory() == max(found.values(), key=lambda each: each.peak)
    assert list(memories(whole("both"))) == [""]
    summary = summarise(program)
    assert {row.note for row in summary.held if row.names == "wte.weight"} == {"at pp=0"}
    assert summary.to_json()["memories"].keys() == found.keys()  # type: ignore[attr-defined]
