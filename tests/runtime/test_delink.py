"""`Run.delink`: layers that shared parameters go on with copies of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

import meshwright as mw
from meshwright.compiler.errors import CompilerError
from meshwright.dsl.statements import Share
from tests.layers import SHARING, TENSOR, Deep, batch
from tests.runtime.delinked import AFTER, BEFORE, BIASES, check, compiled, go_on, scheduled, train
from tests.runtime.forked import Forked, Ranks

OTHER = f"mesh dp=2, tp=2\ndata x over dp\n{TENSOR}zero 2 over dp\n"
TWO = "mesh dp=2\ndata x over dp\nzero 2 over dp\naccumulate 2\nshare blocks.*\n"


@pytest.mark.parametrize(
    ("plan", "other", "kind"),
    [
        ("alone", "-", "adam"),
        ("zero 3", "-", "momentum"),
        pytest.param("alone", OTHER, "momentum", marks=pytest.mark.slow),
        pytest.param("zero 1", OTHER, "adam", marks=pytest.mark.slow),
        pytest.param("zero 2", "-", "adam", marks=pytest.mark.slow),
        pytest.param("zero 2", OTHER, "momentum", marks=pytest.mark.slow),
        pytest.param("zero 3", "mesh one=1\n", "adam", marks=pytest.mark.slow),
        pytest.param("stages", "-", "adam", marks=pytest.mark.slow),
        pytest.param("stages", OTHER, "momentum", marks=pytest.mark.slow),
    ],
)
def test_ten_steps_on_are_those_of_the_model_with_copies(plan: str, other: str, kind: str) -> None:
    check(plan, go_on(plan, other, kind), kind)


def test_reset_leaves_the_moments_behind() -> None:
    check("alone", go_on("alone", state="reset"), "adam", reset=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "other"),
    [(TWO, "-"), (TWO, "mesh tp=2\n" + TENSOR), (SHARING["stages"].replace("dp=2", "dp=1"), "-")],
)
def test_processes_delink_alike(plan: str, other: str, forked: Forked, tmp_path: Path) -> None:
    job = Ranks("tests.runtime.delinked", 2, (plan, other, str(tmp_path)), seconds=300.0)
    ((_, ended),) = forked.run(job)
    assert ended.outputs == ["equal\n"] * 2
    with mw.compile(Deep(), mw.Plan.parse("mesh one=1"), batch()).launch() as run:
        optimizer = run.optimizer(torch.optim.AdamW, groups=[BIASES])
        scheduler = scheduled(optimizer)
        scheduler.load_state_dict(run.load(tmp_path / "pseudo", optimizer))
        train(run, optimizer, scheduler, BEFORE, AFTER)
        check(plan, run.state_dict(), "adam")


def test_what_an_optimizer_keeps_in_other_shapes_is_copied() -> None:
    with compiled("alone").launch() as run:
        optimizer = run.optimizer(torch.optim.Adafactor)
        run.step(*batch())
        optimizer.step()
        shared = run.states[0].parameters["blocks.0.up.weight"]
        kept = {key: value.clone() for key, value in optimizer.state[shared].items()}
        assert kept["row_var"].shape != shared.shape
        run, optimizer = run.delink(optimizer)
        for layer in range(4):
            own = optimizer.state[run.states[0].parameters[f"blocks.{layer}.up.weight"]]
            assert own.keys() == kept.keys()
            assert all(torch.equal(own[key], value) for key, value in kept.items())


def test_random_numbers_counts_and_groups_go_on() -> None:
    plan = mw.Plan.parse("mesh one=1\nprecision fp16\nshare blocks.*\n")
    with mw.compile(Deep().float(), plan, (batch()[0].float(),)).launch(seed=9) as run:
        optimizer = run.optimizer(torch.optim.AdamW, groups=[{"params": ["blocks.2.up.*"]}])
        run.step(batch()[0].float())
        run.states[0].loss_scale.value = 8.0
        optimizer.step()
        counts, scale = run.states[0].progress, (run.loss_scale, run.num_skipped)
        assert counts[0] == 1 and scale[0] < 65536
        held = [len(group["params"]) for group in optimizer.param_groups]
        run, optimizer = run.delink(optimizer)
        assert (run.states[0].progress, run.states[0].random.seed) == (counts, 9)
        assert (run.loss_scale, run.num_skipped) == scale
        # What is shared was in the group of any of its names.
        assert [len(group["params"]) for group in optimizer.param_groups] == [
            4 * held[0], 4 * (held[1] - 2) + 2
        ]  # fmt: skip


def test_what_was_delinked_refuses_every_call(golden: Callable[[str, str], None]) -> None:
    with compiled("alone").launch() as run:
        optimizer, other = (run.optimizer(torch.optim.AdamW) for _ in range(2))
        scheduler = StepLR(optimizer, 2)
        before, (run, _) = run, run.delink(optimizer)
    assert (repr(before), repr(optimizer)) == ("<Run: delinked>", "<Optimizer: delinked>")
    before.close()
    names = [name for name in vars(mw.Run) if not name.startswith("_") and name != "close"]
    calls = [lambda name=name: getattr(before, name) for name in names]
    for each in (optimizer, other):
        calls += [lambda each=each, n=n: getattr(each, n)() for n in ("step", "zero_grad")]
    calls += [scheduler.step, before.__enter__]
    texts = []
    for call in calls:
        with pytest.raises(mw.RunError, match="delinked") as caught:
            call()
        texts.append(str(caught.value))
    golden("delinked", "\n".join([texts[0], *texts[-2:]]))
    with pytest.raises(mw.RunError, match="closed"):  # by the end of the `with`
        run.step(*batch())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("state", lambda run, _: run.delink(state="copies")),
        ("plan", lambda run, _: run.delink(plan="mesh one=1")),
        ("optimizer", lambda run, _: run.delink(torch.optim.SGD(run.parameters(), lr=1.0))),
        ("more", lambda run, _: run.delink(plan=mw.Plan.parse("mesh one=1\nshare blocks.*"))),
        ("nothing", lambda run, _: run.delink()[0].delink()),
    ],
)
def test_a_wrong_call_is_said_and_changes_nothing(
    name: str, call: Callable[..., object], golden: Callable[[str, str], None]
) -> None:
    with compiled("mesh one=1\nshare blocks.* group=2\n").launch() as run:
        optimizer = run.optimizer(torch.optim.AdamW)
        with pytest.raises(mw.RunError) as caught:
            call(run, optimizer)
        golden(f"delink-{name}", str(caught.value))
        if name != "nothing":
            run.step(*batch())
            optimizer.step()
            run.delink(optimizer)


def test_fewer_layers_may_share_after_it_and_the_last_run_is_closed() -> None:
    with compiled("alone").launch() as run:
        run, _ = run.delink(plan=mw.Plan.parse("mesh one=1\nshare blocks.* group=2\n"))
        assert len(run.program.shared) == 2
        run, _ = run.delink()
        assert not run.program.shared
        assert len(run.program.parameters) == len(Deep().state_dict())
    with pytest.raises(mw.RunError, match="closed"):
        run.step(*batch())


def test_the_program_says_beforehand_what_the_delinked_one_needs() -> None:
    program = compiled("zero 2")
    found = program.delinked()
    assert not found.plan.of(Share)
    assert "share" not in found.plan.source.text
    apart = mw.Plan.parse(SHARING["zero 2"]).without(Share)
    assert found.memory().peak == mw.compile(Deep(), apart, batch()).memory().peak
    with pytest.raises(CompilerError, match="no layers of this program share"):
        found.delinked()
