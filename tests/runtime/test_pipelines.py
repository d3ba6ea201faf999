"""Steps of pipelines, whose stages are on ranks of their own."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.compiler.errors import PassError
from meshwright.compiler.layout.wires import Start, Wait
from meshwright.runtime.errors import NonFiniteError, OperatorError
from meshwright.runtime.executor import Executor
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, rows, tokens
from tests.runtime.forked import Forked, Ranks
from tests.runtime.pipelines import (
    PLAN,
    Case,
    Deep,
    Looked,
    Results,
    Tied,
    batch,
    plan_of,
)

PIPELINED = "tests.runtime.pipeline_ranks"


def compiled(model: nn.Module, example: Any, plan: str) -> mw.Program:
    return mw.compile(model, mw.Plan.parse(plan), example)


def own(run: mw.Run) -> list[dict[str, Tensor]]:
    """The gradients of each rank."""
    found = ({n: p.grad for n, p in s.parameters.items()} for s in run.states)
    return [{n: g.clone() for n, g in each.items() if g is not None} for each in found]


@pytest.mark.parametrize(
    ("axis", "schedule"),
    [
        *(("pp=4", name) for name in ("gpipe", "1f1b", "zb", "zbh2")),
        *(("pp=2", f"{name} virtual=2") for name in ("gpipe", "interleaved", "zbv", "dualpipev")),
    ],
)
def test_ranks_with_stages_of_their_own_do_what_the_model_does(axis: str, schedule: str) -> None:
    torch.manual_seed(0)
    model, (x,) = Deep().double(), rows()
    stages = "stages at layers.2, layers.4, layers.6 over pp microbatches=4"
    plan = f"mesh dp=2, {axis}\n{stages} schedule={schedule}\ndata x over dp\n"
    run = compiled(model, (x,), plan).launch()
    losses, expected = eager_steps(model, x)
    for loss in losses:
        torch.testing.assert_close(run.step(x), loss, rtol=0, atol=1e-12)
    found: dict[str, Tensor] = {}
    for gradients in own(run):
        assert len(gradients) == 16 // run.mesh.size("pp")
        for name, gradient in gradients.items():
            found[name] = gradient
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(run.evaluate(x), losses[-1], rtol=0, atol=1e-12)


def test_both_copies_of_a_stage_have_what_all_microbatches_give() -> None:
    """Two of four ranks have each stage, and each runs half of the microbatches."""
    torch.manual_seed(0)
    model = Results().double()
    x = torch.randn(8, 16, dtype=torch.float64)
    stages = "stages at layers.2, layers.4, layers.6 over pp microbatches=8 schedule=dualpipe"
    plan = mw.Plan.parse(f"mesh pp=4\ndata x\n{stages}\n")
    run = mw.compile(model, plan, (x,), outputs=["y", "positive", "most"]).launch()
    given = model(x)
    for found in (run.step(x), run.evaluate(x)):
        for value, expected in zip(found, given.values(), strict=True):
            torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-12)
    given["loss"].backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    ranks = own(run)
    for rank, gradients in enumerate(ranks):
        assert gradients.keys() == ranks[3 - rank].keys() and len(gradients) == 8
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)
            assert gradient.equal(ranks[3 - rank][name])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.testing.assert_close(run.clip_grad_norm_(1.0), norm)
    optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
    optimizer.step()
    run.check(optimizer)


def eager_steps(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of two steps of the model itself, and its gradients, added up."""
    eager = copy.deepcopy(model)
    losses = []
    for _ in range(2):
        loss = eager(x)
        loss.backward()
        losses.append(loss.detach())
    return losses, {n: p.grad for n, p in eager.named_parameters() if p.grad is not None}


def test_values_of_any_layout_and_tied_weights_are_sent() -> None:
    torch.manual_seed(0)
    model, example = Gpt().double(), tokens()
    stages = "stages at blocks.1 over pp microbatches=2\n"
    plan = f"mesh dp=2, pp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}{stages}"
    program = compiled(model, example, plan)
    loss = program.launch().step(*example)
    torch.testing.assert_close(loss, model(*example).detach(), rtol=0, atol=1e-12)


def observe(monkeypatch: pytest.MonkeyPatch, see: Callable[[Any, Any], None]) -> None:
    """Have `see` called with each request of a rank to its transport, and the answer."""
    walk = Executor.run

    def observed(self: Executor, arguments: Any) -> Generator[Any, Any, Any]:
        program, answer = walk(self, arguments), None
        while True:
            try:
                request = program.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = yield request
            see(request, answer)
            del request

    monkeypatch.setattr(Executor, "run", observed)


def test_no_more_is_held_for_many_microbatches_than_for_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is sent is let go of as the schedule goes on, and what is received with its last use."""
    moved: list[weakref.ref[Tensor]] = []
    most = 0

    def see(request: Any, answer: Any) -> None:
        nonlocal most
        if isinstance(request, Start) and request.wire.kind == "transfer":
            moved.append(weakref.ref(request.tensor))
        most = max(most, sum(each() is not None for each in moved))

    observe(monkeypatch, see)
    found = []
    for m in (4, 16):
        plan = f"mesh pp=2\ndata x\nstages at layers.4 over pp microbatches={m}\n"
        x = torch.randn(16, 16, dtype=torch.float64)
        run = compiled(Deep().double(), (x,), plan).launch()
        moved.clear()
        most = 0
        run.step(x)
        found.append(most)
    assert found[0] == found[1] <= 8, found


@pytest.mark.parametrize(
    "case", [("dualpipe", 1, 2, 4, "data"), ("zbv", 2, 4, 4, "zero 3"), ("1f1b", 1, 4, 4, "tensor")]
)
def test_all_that_is_started_is_waited_for_once_in_the_same_step(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """A transport may lend memory until the wait, and refuses a second one. What a rank hands over
    to itself is let go of, too."""
    started: list[Any] = []
    waited: list[Any] = []
    steps: list[Any] = []
    act = Executor.act

    def noted(self: Executor, action: Any, step: Any) -> Any:
        steps.append(step)
        return (yield from act(self, action, step))

    def see(request: Any, answer: Any) -> None:
        if isinstance(request, Start):
            started.append(answer)
        elif isinstance(request, Wait):
            waited.append(request.handle)

    observe(monkeypatch, see)
    monkeypatch.setattr(Executor, "act", noted)
    example = tokens(12, 16, 4)
    run = compiled(Tied(case[2]), example, plan_of(*case)).launch()
    for method in (run.step, run.evaluate):
        method(*example)
        assert len(started) > 4
        assert sorted(map(id, started)) == sorted(map(id, waited))
        assert not any(step.passed or any(step.leaving.values()) for step in steps)


def test_what_is_sent_has_the_size_and_the_type_in_which_it_is_received(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gloo puts a message that is too short into the beginning of the buffer without a word."""
    act = Executor.act

    def cut(self: Executor, action: Any, step: Any) -> Any:
        yield from act(self, action, step)
        step.leaving.update(
            {key: [each[:1] for each in left] for key, left in step.leaving.items()}
        )

    run = compiled(Deep().double(), rows(), PLAN.replace(", ids", "")).launch()
    monkeypatch.setattr(Executor, "act", cut)
    with pytest.raises(
        PassError, match=r"is torch.float64 \[1, 16\], and received as torch.float64"
    ):
        run.step(*rows())


def test_a_rank_takes_the_inputs_that_its_stages_use_and_all_are_checked() -> None:
    """Labels are for the last stage alone: the other rank neither slices nor copies them."""
    plan = f"mesh dp=2, pp=2\n{GPT_DATA}stages at blocks.1 over pp microbatches=2 schedule=1f1b\n"
    ids, labels = tokens()
    run = compiled(Gpt(), (ids, labels), plan).launch()
    taken = [executor.taken for executor, _ in run._programs.launched.ranks]
    assert taken == [{0}, {1}, {0}, {1}]
    with pytest.raises(mw.RunError, match="on the meta device"):
        run.step(ids, labels.to("meta"))
    with pytest.raises(mw.RunError, match="on the meta device"):
        run.step(ids.to("meta"), labels)
    run.step(ids, labels)


def test_a_step_of_a_pipeline_that_fails_did_not_happen() -> None:
    torch.manual_seed(0)
    run = compiled(Looked(), batch(), PLAN).launch()
    run.step(*batch())
    before = own(run)
    x, ids = batch()
    ids[-3] = 99
    with pytest.raises(OperatorError, match="`table` failed: index out of range"):
        run.step(x, ids)
    after = own(run)
    assert all(a.keys() == b.keys() for a, b in zip(before, after, strict=True))
    assert all(a[n].equal(b[n]) for a, b in zip(before, after, strict=True) for n in a)
    again = compiled(Looked(), batch(), PLAN)
    assert run.step(*batch()).equal(run.step(*batch()))
    assert again.digest == run.program.digest


class Log(Deep):
    """Its layer `at` has the logarithm of negative numbers."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x).log() if i == self.at else layer(x)
        return x.square().mean()


@pytest.mark.parametrize(("at", "rank"), [(1, 0), (6, 1)])
def test_a_nan_is_found_on_the_rank_that_made_it(at: int, rank: int) -> None:
    plan = "mesh pp=2\ndata x\nstages at layers.4 over pp microbatches=4\n"
    run = compiled(Log(at).double(), rows(), plan).launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    run.step(*rows())
    with pytest.raises(NonFiniteError, match=f"`log` in the model made a NaN on rank {rank}"):
        optimizer.step()


def test_processes_run_a_pipeline_as_the_virtual_mesh_does_and_end_when_one_fails(
    forked: Forked,
) -> None:
    source, target = forked.outputs(PIPELINED, 2, "copies", "same", "fails")
    assert target.startswith(
        "copies\nsame\nOperatorError: `mesh::embedding` in `table` failed: index out"
    ), target
    assert source.startswith("copies\nsame\nPeerError: rank 1 failed: OperatorError"), source
    for output in (source, target):
        assert "fails" in output.splitlines()


def test_a_gradient_leaves_a_rank_before_it_computes_those_of_its_weights(
    forked: Forked,
) -> None:
    """By the order of what real ranks do, beside a table that sends after the whole backward."""
    first, last = forked.outputs(PIPELINED, 2, "early")
    assert first == "early\n", first
    halves = "sends 0, weight 0, sends 1, weight 1, sends 2, weight 2, sends 3, weight 3"
    late = "weight 0, sends 0, weight 1, sends 1, weight 2, sends 2, weight 3, sends 3"
    assert last == f"{halves}\n{late}\nearly\n", last


def test_a_rank_of_a_pipeline_that_is_killed_ends_the_others(forked: Forked) -> None:
    ((_, ended),) = forked.run(Ranks(PIPELINED, 2, ("killed",), gone=(1,)))
    source = ended.outputs[0]
    assert source.startswith("PeerError: rank 1 died\n  rank 0 waits in `"), source
    assert "(transfer over `pp`, 1 to 0, backward)" in source
