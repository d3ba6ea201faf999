"""Every method of a run on the virtual mesh, beside the same model in eager mode."""

from __future__ import annotations

import copy
import functools
import io
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.compiler.graph import aliasing
from tests.runtime.models import BATCH, LENGTH, PLANS, VOCAB, Tiny, batch, make

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


@functools.cache
def compiled(
    plan: str = "both", model: nn.Module | None = None, outputs: tuple[str, ...] = ()
) -> mw.Program:
    """Programs do not change: one serves every test that launches it."""
    return mw.compile(model or make(), mw.Plan.parse(PLANS[plan]), batch(), outputs=outputs)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert set(ours) == set(theirs)
    assert all(ours[name].shape == theirs[name].shape for name in theirs)
    return max((ours[name] - theirs[name]).abs().double().max().item() for name in theirs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("plan", PLANS)
def test_training_equals_eager_for_loss_outputs_gradients_weights_and_buffers(plan: str) -> None:
    reference = make()
    run = compiled(plan, outputs=("logits",)).launch()
    ours = run.optimizer(torch.optim.AdamW, **ADAMW)
    theirs = torch.optim.AdamW(trained(reference), **ADAMW)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (ours, theirs)]
    for number in range(3):
        loss, logits = run.step(*batch(number))
        expected = reference(*batch(number))
        expected["loss"].backward()
        assert loss.shape == ()
        assert not loss.requires_grad
        assert torch.allclose(loss, expected["loss"], rtol=0, atol=1e-12)
        assert torch.allclose(logits, expected["logits"], rtol=0, atol=1e-12)
        assert difference(run.gradients(), gradients(reference)) < 1e-12
        for each in (ours, theirs, *schedules):
            each.step()
        ours.zero_grad()
        theirs.zero_grad()
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] == 1e-2 / 8
    assert difference(run.state_dict(), reference.state_dict()) < 1e-11
    assert run.state_dict()["steps"].item() == 3


@pytest.fixture(params=["lasting", "allocated"])
def buckets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flat buffers that always have memory, as small ones have, and those of large buckets."""
    if request.param == "allocated":
        monkeypatch.setattr(aliasing, "ALLOCATED_BYTES", 1)
        compiled.cache_clear()
    yield
    if request.param == "allocated":
        compiled.cache_clear()


@pytest.mark.usefixtures("buckets")
@pytest.mark.parametrize("zeroing", ["never", "to-none", "to-zero"])
def test_steps_add_to_gradients_until_they_are_zeroed(zeroing: str) -> None:
    reference = make()
    run = compiled().launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.0)
    for number in range(3):
        run.step(*batch(number))
        reference(*batch(number))["loss"].backward()
        assert difference(run.gradients(), gradients(reference)) < 1e-12
        if zeroing != "never":
            optimizer.zero_grad(set_to_none=zeroing == "to-none")
            reference.zero_grad(set_to_none=zeroing == "to-none")


@pytest.mark.usefixtures("buckets")
@pytest.mark.parametrize("buckets", ["allocated"], indirect=True)
def test_a_gradient_that_somebody_keeps_stays_as_it_is() -> None:
    run = compiled().launch()
    run.step(*batch())
    kept = {name: p.grad for name, p in run.named_parameters() if p.grad is not None}
    copies = {name: gradient.clone() for name, gradient in kept.items()}
    for parameter in run.parameters():
        parameter.grad = None
    run.step(*batch(2))
    assert all(torch.equal(kept[name], copy) for name, copy in copies.items())
    again = {name: p.grad for name, p in run.named_parameters() if p.grad is not None}
    assert difference(again, kept) > 1e-3


@pytest.mark.usefixtures("buckets")
def test_a_gradient_that_the_user_replaced_or_cleared_alone_is_added_to() -> None:
    run = compiled().launch()
    run.step(*batch())
    once = run.gradients()
    for name, parameter in run.named_parameters():
        if parameter.grad is not None:
            parameter.grad = None if name.endswith("up.bias") else parameter.grad * 3
    run.step(*batch())
    factors = {name: 1 if name.endswith("up.bias") else 4 for name in once}
    expected = {name: gradient * factors[name] for name, gradient in once.items()}
    assert difference(run.gradients(), expected) < 1e-12


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_clipping_takes_the_norm_of_the_whole_model(plan: str, norm_type: float) -> None:
    reference = make()
    run = compiled(plan).launch()
    run.step(*batch())
    reference(*batch())["loss"].backward()
    ours = run.clip_grad_norm_(0.25, norm_type)
    theirs = nn.utils.clip_grad_norm_(reference.parameters(), 0.25, norm_type)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert theirs > 0.25
    assert difference(run.gradients(), gradients(reference)) < 1e-12


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_segment_that_every_rank_holds_counts_once_in_the_norm(norm_type: float) -> None:
    plan = "mesh dp=2, tp=2\ndata tokens, targets over dp\nallow replicate **\n"
    plan += "shard blocks.*.up.weight [(48@tp | 16), (8 | 8)]\n"
    plan += "shard blocks.*.down.weight [16, (48 | 16@tp)]\n"
    run = mw.compile(make(), mw.Plan.parse(plan), batch()).launch()
    run.step(*batch())
    reference = make()
    reference(*batch())["loss"].backward()
    theirs = nn.utils.clip_grad_norm_(reference.parameters(), 1e9, norm_type)
    assert torch.allclose(run.clip_grad_norm_(1e9, norm_type), theirs, rtol=1e-12)


@pytest.mark.parametrize("norm_type", [1.0, math.inf])
def test_gradients_without_elements_do_not_count(norm_type: float) -> None:
    class Empty(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.none = nn.Parameter(torch.zeros(0, 4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().sum() + self.none.sum()

    plan = mw.Plan.parse("mesh tp=2\nallow replicate **")
    run = mw.compile(Empty(), plan, (torch.ones(3, 4),)).launch()
    run.step(torch.ones(3, 4))
    norms = [grad.norm(norm_type) for name, grad in run.gradients().items() if name != "none"]
    wanted = torch.stack(norms).norm(norm_type)
    assert torch.allclose(run.clip_grad_norm_(1.0, norm_type).float(), wanted)


def test_what_is_compiled_for_beside_the_inputs_is_in_the_digest() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x)[:, mask].sum()

    def digest(*mask: bool, spare: int = 1) -> str:
        model = Masked(4, 2)
        model.spare = nn.Parameter(torch.zeros(spare))
        plan = mw.Plan.parse("mesh tp=2\nallow replicate **")
        example = (torch.ones(3, 4), torch.tensor(mask))
        return mw.compile(model, plan, example, static=("mask",)).digest

    assert digest(True, False) == digest(True, False)
    # As many columns are kept, so that the graph is the same but for the values of its constants.
    assert digest(True, False) != digest(False, True)
    # No operator uses it, and ranks broadcast it all the same.
    assert digest(True, False) != digest(True, False, spare=2)


def test_gradients_below_the_maximum_stay_as_they_are() -> None:
    run = compiled().launch()
    assert run.clip_grad_norm_(1.0) == 0
    run.step(*batch())
    before = run.gradients()
    run.clip_grad_norm_(1e6)
    assert difference(run.gradients(), before) == 0


def test_step_local_takes_the_whole_batch_where_every_rank_is_here() -> None:
    run, other = compiled().launch(), compiled().launch()
    assert (run.data_rank, run.data_ranks) == (0, 1)
    rows = run.data_slice(BATCH)
    loss = run.step_local(*(tensor[rows] for tensor in batch()))
    assert torch.equal(loss, other.step(*batch()))
    assert difference(run.gradients(), other.gradients()) == 0


def test_inputs_go_by_position_by_name_or_both() -> None:
    run = compiled().launch()
    tokens, targets = batch()
    expected = run.step(tokens, targets)
    assert torch.equal(run.step(tokens=tokens, targets=targets), expected)
    assert torch.equal(run.step(targets=targets, tokens=tokens), expected)
    assert torch.equal(run.step(tokens, targets=targets), expected)


def test_evaluation_is_in_eval_mode_with_the_trained_weights_and_leaves_no_gradients() -> None:
    model, reference = make(dropout=0.5), make(dropout=0.5)
    run = compiled(model=model, outputs=("logits",)).launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.5)
    run.step(*batch())
    optimizer.step()
    optimizer.zero_grad()
    run.copy_to(reference)
    expected = reference.eval()(*batch(7, rows=4))
    loss, logits = run.evaluate(*batch(7, rows=4))
    assert torch.allclose(loss, expected["loss"], rtol=0, atol=1e-12)
    assert torch.allclose(logits, expected["logits"], rtol=0, atol=1e-12)
    assert model.training
    assert run.gradients() == {}
    assert run.state_dict()["steps"].item() == reference.steps.item() == 2


def test_forward_gives_the_models_own_output() -> None:
    reference = make().eval()
    run = compiled().launch()
    found = run.forward(*batch())
    expected = reference(*batch())
    assert difference(found, expected) < 1e-12
    linear = nn.Sequential(nn.Linear(4, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    plan = mw.Plan.parse('mesh tp=2\ncolumns "0" over tp')
    program = mw.compile(linear, plan, (x,), mode="infer")
    assert torch.allclose(program.launch().forward(x), linear(x))


def test_programs_for_other_modes_and_shapes_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = compiled()
    modes: list[str] = []

    def recompile(model: nn.Module, **options: Any) -> mw.Program:
        modes.append(options["mode"])
        return program.recompile(model, **options)

    counting = copy.copy(program)
    object.__setattr__(counting, "recompile", recompile)
    run = counting.launch(new_shapes="compile")
    for _ in range(2):
        run.step(*batch())
        run.step(*batch(rows=4))
        run.evaluate(*batch())
        run.evaluate(*batch(rows=4))
        run.forward(*batch())
    assert sorted(modes) == ["eval", "eval", "infer", "train"]


def test_gradients_of_programs_for_several_shapes_add_up() -> None:
    reference = make()
    run = compiled().launch(new_shapes="compile")
    for rows in (BATCH, 4, BATCH, 4, 4):
        loss = run.step(*batch(rows=rows))
        expected = reference(*batch(rows=rows))["loss"]
        expected.backward()
        assert torch.allclose(loss, expected, rtol=0, atol=1e-12)
    assert difference(run.gradients(), gradients(reference)) < 1e-11


def test_an_unseen_shape_is_an_error_in_step_by_default() -> None:
    run = compiled().launch()
    with pytest.raises(mw.RunError, match="new_shapes"):
        run.step(*batch(rows=4))


def test_dropout_is_the_same_under_every_plan_and_another_seed_is_another_dropout() -> None:
    losses = []
    for plan, seed in [("data", 1), ("both", 1), ("sequence", 1), ("data", 2)]:
        run = compiled(plan, make(dropout=0.3)).launch(seed=seed)
        losses.append(torch.stack([run.step(*batch()), run.step(*batch())]))
    assert losses[0][0] != losses[0][1]
    assert torch.allclose(losses[0], losses[1], rtol=0, atol=1e-12)
    assert torch.allclose(losses[0], losses[2], rtol=0, atol=1e-12)
    assert not torch.allclose(losses[0], losses[3])


def test_the_model_is_copied_and_copy_to_writes_back() -> None:
    model, reference = make(), make()
    run = compiled(model=model).launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    run.step(*batch())
    optimizer.step()
    assert difference(model.state_dict(), reference.state_dict()) == 0
    run.copy_to(model)
    assert difference(model.state_dict(), run.state_dict()) == 0
    assert not torch.equal(model.wte.weight, reference.wte.weight)
    assert torch.equal(model.head.weight, model.wte.weight)


def test_the_state_has_the_models_own_names_and_shapes() -> None:
    model = make()
    state = compiled(model=model).launch().state_dict()
    assert list(state) == list(model.state_dict())
    assert state["head.weight"].shape == (VOCAB, model.wte.embedding_dim)
    assert difference(state, model.state_dict()) == 0


def test_a_loaded_state_is_taken_over_by_every_rank() -> None:
    run, other = compiled().launch(), make(seed=3)
    with torch.no_grad():
        other.steps.fill_(5)
    state = other.state_dict()
    del state["head.weight"]  # tied: one of its names is enough
    run.load_state_dict(state)
    assert difference(run.state_dict(), other.state_dict()) == 0
    assert torch.allclose(run.step(*batch()), other(*batch())["loss"], rtol=0, atol=1e-12)


def test_a_model_on_the_meta_device_starts_from_a_state_dict() -> None:
    with torch.device("meta"):
        model = Tiny().double()
    source = make()
    program = compiled(model=model)
    with pytest.raises(mw.RunError, match="`scratch` has no values"):
        program.launch(state_dict=source.state_dict()).step(*batch())
    run = program.launch(state_dict={**source.state_dict(), "scratch": source.scratch})
    assert torch.allclose(run.step(*batch()), source(*batch())["loss"], rtol=0, atol=1e-12)


def test_parameters_are_local_shards_under_the_models_names() -> None:
    program = compiled()
    run = program.launch()
    named = list(run.named_parameters())
    assert len(named) == len(list(run.parameters())) == 4 * len(program.parameters)
    shapes = {name: tuple(p.shape) for name, p in named}
    assert shapes["blocks.0.up.weight"] == (32, 16)
    assert shapes["wte.weight"] == ((VOCAB + 1) // 2, 16)
    assert all(isinstance(p, nn.Parameter) for p in run.parameters())


def test_groups_choose_parameters_by_selector_and_the_first_match_counts() -> None:
    reference = make()
    groups = [
        {"params": ["**.bias", "head.weight"], "weight_decay": 0.0},
        {"params": "blocks.0.**", "lr": 1e-3},
    ]
    run = compiled().launch()
    ours = run.optimizer(torch.optim.AdamW, groups=groups, **ADAMW)
    plain, first, rest = [], [], []
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            tied_or_bias = name == "wte.weight" or name.endswith("bias")
            chosen = plain if tied_or_bias else first if name.startswith("blocks.0") else rest
            chosen.append(parameter)
    theirs = torch.optim.AdamW(
        [
            {"params": plain, "weight_decay": 0.0},
            {"params": first, "lr": 1e-3},
            {"params": rest},
        ],
        **ADAMW,
    )
    for number in range(2):
        run.step(*batch(number))
        reference(*batch(number))["loss"].backward()
        for each in (ours, theirs):
            each.step()
            each.zero_grad()
    assert [len(g["params"]) for g in ours.param_groups] == [
        4 * len(g) for g in (plain, first, rest)
    ]
    assert difference(run.state_dict(), reference.state_dict()) < 1e-11


def test_a_group_that_others_leave_nothing_is_an_error_that_says_to_move_it() -> None:
    run = compiled().launch()
    first, second = {"params": ["**.bias"]}, {"params": ["blocks.0.up.bias"], "lr": 1e-4}
    with pytest.raises(mw.RunError) as caught:
        run.optimizer(torch.optim.AdamW, groups=[first, second])
    assert str(caught.value) == (
        "groups before it have all parameters of the group of `blocks.0.up.bias`\n"
        "  help: move it before them: the first group that matches a parameter has it"
    )
    found = run.optimizer(torch.optim.AdamW, groups=[second, first])
    assert [group["lr"] for group in found.param_groups] == [1e-4, 1e-3, 1e-3]


def test_an_option_of_a_group_that_the_class_does_not_have_is_warned_of() -> None:
    run = compiled().launch()
    with pytest.warns(UserWarning, match="`SGD` has no option `wd`: in a parameter group") as seen:
        run.optimizer(torch.optim.SGD, lr=0.1, groups=[{"params": ["**.bias"], "wd": 0.0}])
    assert seen[0].filename == __file__
    named = {"params": ["**.bias"], "weight_decay": 0.0, "name": "bias", "initial_lr": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.optimizer(torch.optim.SGD, lr=0.1, groups=[named])


def test_a_run_is_not_copied_or_pickled() -> None:
    run = compiled().launch()
    for copied in (copy.deepcopy, lambda each: torch.save(each, io.BytesIO())):
        with pytest.raises(mw.RunError, match="a run cannot be pickled or copied") as caught:
            copied(run)
        assert "help: keep it with `run.save(folder, optimizer)`" in str(caught.value)


def test_a_program_is_copied_with_its_model_and_not_pickled() -> None:
    program = compiled()
    with pytest.raises(mw.MeshwrightError, match="a program cannot be pickled") as caught:
        torch.save(program, io.BytesIO())
    assert "help: save the text of the plan and compile again" in str(caught.value)
    assert copy.copy(program).model is program.model
    deep = copy.deepcopy(program)
    assert deep.model is not program.model
    assert deep.launch().step(*batch()).equal(program.launch().step(*batch()))


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop]
)
def test_elementwise_optimizers_do_what_they_do_on_the_whole_model(kind: Any) -> None:
    reference = make()
    run = compiled().launch()
    ours, theirs = run.optimizer(kind, lr=1e-2), kind(trained(reference), lr=1e-2)
    for number in range(3):
        run.step(*batch(number))
        reference(*batch(number))["loss"].backward()
        for each in (ours, theirs):
            each.step()
            each.zero_grad()
    assert difference(run.state_dict(), reference.state_dict()) < 1e-10


def test_torchs_own_optimizer_over_the_parameters_works_too() -> None:
    reference = make()
    run = compiled().launch()
    ours = torch.optim.AdamW(run.parameters(), **ADAMW)
    theirs = torch.optim.AdamW(reference.parameters(), **ADAMW)
    for number in range(2):
        run.step(*batch(number))
        reference(*batch(number))["loss"].backward()
        for each in (ours, theirs):
            each.step()
            each.zero_grad()
    assert difference(run.state_dict(), reference.state_dict()) < 1e-11


def test_autocast_around_a_step_does_not_change_it() -> None:
    run = compiled().launch()
    expected = run.step(*batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run.step(*batch()), expected)


def test_a_closed_run_says_so() -> None:
    with compiled().launch() as run:
        run.step(*batch())
    with pytest.raises(mw.RunError, match="this run is closed"):
        run.step(*batch())


def test_rows_are_sliced_by_data_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the process mesh, where a run holds one rank."""
    from meshwright.runtime.inputs import Inputs, data_axes

    program = compiled()
    assert data_axes(program) == ("dp",)
    assert Inputs(program, rows=True).types["tokens"].shape == (BATCH // 2, LENGTH)
    run = program.launch()
    monkeypatch.setattr(run.transport, "has_every_rank", False)
    for state, rows in zip(list(run.states), [(0, 4), (0, 4), (4, 8), (4, 8)], strict=True):
        run.states = [state]
        assert run.data_ranks == 2
        assert run.data_slice(BATCH) == slice(*rows)
        with pytest.raises(mw.RunError, match="does not divide"):
            run.data_slice(BATCH + 1)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("token", [VOCAB, -1])
def test_a_token_outside_of_the_table_is_an_error_that_names_the_operator(
    plan: str, token: int
) -> None:
    """Split over a vocabulary that is padded, no rank has it: it must not read as zeros."""
    run = compiled(plan).launch()
    tokens, targets = batch()
    tokens[-1, -1] = token
    lookup = "block_lookup" if plan == "blocks" else "embedding"
    with pytest.raises(mw.RunError, match=f"`mesh::{lookup}` in `wte` failed: index out of range"):
        run.step(tokens, targets)
    assert run.step(*batch()).isfinite()


def test_an_operator_that_refuses_the_types_of_its_inputs_is_named() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    plan = mw.Plan.parse("mesh dp=2\ndata input over dp")
    run = mw.compile(nn.Linear(6, 3), plan, (x,), loss=torch.sum).launch()
    with pytest.raises(mw.RunError, match="`linear` in the model failed: mat1 and mat2 must have"):
        run.step(x)
