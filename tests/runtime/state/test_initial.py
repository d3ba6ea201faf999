"""A model on the meta device gets the values of its own initialisation, each rank its part."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import meshwright as mw
from meshwright.compiler.graph.ir import TensorType
from meshwright.compiler.layout.extents import Extent, Padding
from meshwright.compiler.layout.factors import Factor
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.program import Stored
from meshwright.passes.driver import initialisation
from meshwright.runtime.state import regions
from meshwright.runtime.state.regions import InitialValues
from tests.compiler.layouts import product, split, unshard
from tests.runtime.forked import Forked

CPU = torch.device("cpu")
MESH = Mesh((("a", 2), ("b", 2)))
SHAPE = (12, 8)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def values_of(model: nn.Module, seed: int = 0) -> InitialValues:
    return InitialValues(initialisation(model, CPU), seed, CPU)


def filled(values: InitialValues, name: str, layout: Layout, mesh: Mesh = MESH) -> list[Tensor]:
    """What each rank of a mesh holds of a tensor."""
    type = _type(values, name)
    between = zip(type.shape, layout.shape, strict=True)
    paddings = tuple(
        Padding(dim, (Extent(1, own, held, 1),))
        for dim, (own, held) in enumerate(between)
        if own != held
    )
    stored = Stored(name, type, layout, layout, True, paddings)
    found = []
    for rank in range(mesh.num_ranks):
        out = torch.full(layout.local_shape(mesh), 7, dtype=type.dtype)
        values.fill(stored, out, mesh, mesh.coords(rank))
        found.append(out)
    return found


def whole(values: InitialValues, name: str) -> Tensor:
    return filled(values, name, replicated(_type(values, name).shape), Mesh(()))[0]


def _type(values: InitialValues, name: str) -> TensorType:
    return values.nodes[name].tensor


# -- one of each kind of initialisation ------------------------------------------------------------


def _sinusoids(w: Tensor) -> None:
    rows, columns = w.shape
    angle = torch.arange(rows)[:, None] / 10000 ** (torch.arange(0, columns, 2) / columns)
    w[:, 0::2] = torch.sin(angle)
    w[:, 1::2] = torch.cos(angle)


def _in_chunks(w: Tensor) -> None:
    for i, chunk in enumerate(w.chunk(4)):
        nn.init.normal_(chunk, i, 0.01)


def _rows_apart(w: Tensor) -> None:
    for i in range(len(w)):
        w[i].fill_(i)


def _transposed(w: Tensor) -> None:
    nn.init.uniform_(w.t(), 1, 2)
    w.t().unsqueeze(0)[:, 2:5].mul_(-1)


def _padded_row(w: Tensor) -> None:
    nn.init.normal_(w)
    w[-2].zero_()


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "uniform": nn.init.uniform_,
    "normal": lambda w: nn.init.normal_(w, 3.0, 0.5),
    "data": lambda w: w.data.normal_(0.0, 0.02),
    "kaiming": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "xavier": nn.init.xavier_normal_,
    "truncated": lambda w: nn.init.trunc_normal_(w, 0.1, 1.0, -1.0, 2.0),
    "tail": lambda w: nn.init.trunc_normal_(w, 0.0, 1.0, 3.0, 4.0),
    "exponential": lambda w: w.exponential_(2.0),
    "scaled": lambda w: w.normal_().mul_(2).add_(1),
    "orthogonal": nn.init.orthogonal_,
    "sparse": lambda w: nn.init.sparse_(w, 0.25),
    "eye": nn.init.eye_,
    "constant": lambda w: nn.init.constant_(w, 0.25),
    "sinusoids": _sinusoids,
    "chunks": _in_chunks,
    "rows": _rows_apart,
    "transposed": _transposed,
    "padded_row": _padded_row,
    "copied": lambda w: w.copy_(torch.arange(8) * 0.1),
    "chosen": lambda w: w.copy_(torch.where(torch.rand_like(w) < 0.5, 1.0, -1.0)),
    "outer": lambda w: w.copy_(torch.rand(len(w), 1) * torch.rand(8) + torch.rand(1, 8)),
    "shuffled": lambda w: w.copy_(torch.randperm(w.numel()).view_as(w)),
    "gamma": lambda w: w.copy_(torch._standard_gamma(torch.full_like(w, 2.0))),
}


class Kinds(nn.Module):
    """A parameter for each kind of initialisation."""

    def __init__(self, shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name in KINDS:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, initialise in KINDS.items():
            initialise(getattr(self, name))


@pytest.fixture(scope="module")
def kinds() -> InitialValues:
    return values_of(on_meta(Kinds))


LAYOUTS: Mapping[str, Layout] = {
    "rows": split(SHAPE, {0: "a"}),
    "columns": split(SHAPE, {1: "b"}),
    "rows twice": split(SHAPE, {0: ("a", "b")}),
    "both": split(SHAPE, {0: "a", 1: "b"}),
    "a factor": Layout((product(Factor(3), Factor(4, ("a",))), product(Factor(8)))),
    "longer rows": split((16, 8), {0: ("a", "b")}),
    "longer columns": split((12, 10), {1: "a"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_parts_are_cut_from_the_same_numbers_under_every_layout(
    kinds: InitialValues, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(kinds, name)
    assert expected.isfinite().all()
    monkeypatch.setattr(regions, "_BLOCK", 20)
    for where, layout in LAYOUTS.items():
        found = unshard(filled(kinds, name, layout), layout, MESH)
        assert torch.equal(found[:12, :8], expected), where
        assert not found[12:].any() and not found[:, 8:].any(), where


def test_what_is_not_random_is_what_torch_gives(kinds: InitialValues) -> None:
    for name in ("eye", "constant", "sinusoids", "rows", "copied"):
        expected = torch.empty(SHAPE)
        KINDS[name](expected)
        torch.testing.assert_close(whole(kinds, name), expected, rtol=0, atol=1e-6)
    outer = whole(kinds, "outer").double()  # one number per row times one per column, plus another
    ratios = (outer[1] - outer[0]) / (outer[2] - outer[0])
    torch.testing.assert_close(ratios, ratios[:1].expand(8), rtol=1e-3, atol=1e-3)
    q = whole(kinds, "orthogonal")
    torch.testing.assert_close(q.t() @ q, torch.eye(8), rtol=0, atol=1e-5)
    assert (whole(kinds, "sparse") == 0).sum(0).tolist() == [3] * 8
    assert sorted(whole(kinds, "shuffled").flatten().tolist()) == list(range(96))
    assert not whole(kinds, "padded_row")[-2].any()
    assert whole(kinds, "padded_row").count_nonzero() == 88


def test_another_seed_gives_other_numbers_and_torchs_own_has_no_part(kinds: InitialValues) -> None:
    torch.manual_seed(5)
    again = InitialValues(kinds.initialisation, 0, CPU)
    other = InitialValues(kinds.initialisation, 1, CPU)
    draws = set(KINDS) - {"eye", "constant", "sinusoids", "rows", "copied"}
    for name in draws:
        assert torch.equal(whole(again, name), whole(kinds, name))
        assert not torch.equal(whole(other, name), whole(kinds, name)), name
    drawn = [whole(kinds, name) for name in ("scaled", "padded_row")]
    assert not torch.allclose((drawn[0] - 1) / 2, drawn[1])


@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_distributions_are_torchs(dtype: torch.dtype) -> None:
    """By the largest distance between two distribution functions (Kolmogorov and Smirnov)."""
    torch.manual_seed(0)
    names = ("uniform", "normal", "data", "kaiming", "xavier", "truncated", "tail", "exponential")
    shape = (200, 100)

    class Few(Kinds):
        def reset_parameters(self) -> None:
            for name in names:
                KINDS[name](getattr(self, name).detach())

    values = values_of(on_meta(lambda: Few(shape, dtype)))
    limit = 1.95 * math.sqrt(2 / math.prod(shape))  # exceeded once in a thousand
    for name in names:
        # Torch's own ways to draw numbers of few digits are coarse.
        found = whole(values, name)
        expected = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32))
        KINDS[name](expected)
        expected = expected.to(dtype)
        assert found.dtype == dtype
        points = torch.cat([found, expected]).flatten().sort().values.unique()
        steps = [
            torch.searchsorted(each.flatten().sort().values, points, right=True)
            for each in (found, expected)
        ]
        assert (steps[0] - steps[1]).abs().max() / found.numel() < limit, name
        # Entries near each other do not depend on each other.
        a, b = found[:-1].double().flatten(), found[1:].double().flatten()
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.03, name


# -- what a model says -----------------------------------------------------------------------------


class Branch(nn.Module):
    """`_init_weights` for each module, and a `reset_parameters` of a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 2.0)


class Tree(nn.Module):
    """What the whole says counts, then what a branch says, then what a layer does by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.own = Branch(), Branch(), nn.Linear(4, 4)
        self.attention, self.table = nn.MultiheadAttention(4, 2), nn.Embedding(6, 4, padding_idx=1)
        self.same = self.own.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("angles", torch.empty(4), persistent=False)

    def init_weights(self, device: object = None) -> None:
        nn.init.constant_(self.right.inner.weight, 3.0)
        self.angles = 1.0 / torch.arange(1, 5)


def test_a_module_is_initialised_after_those_inside_it() -> None:
    model = on_meta(Tree)
    before = dict(model.named_parameters(remove_duplicate=False))
    values = values_of(model)
    names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    assert values.missing(names) == []
    assert whole(values, "left.inner.weight").unique().tolist() == [2.0]
    assert whole(values, "right.inner.weight").unique().tolist() == [3.0]
    assert whole(values, "left.norm.weight").tolist() == [1.0] * 4
    assert 0 < whole(values, "left.inner.bias").abs().max() <= 0.5
    assert whole(values, "norm.running_var").tolist() == [1.0] * 4
    assert whole(values, "norm.num_batches_tracked").item() == 0
    assert not whole(values, "attention.in_proj_bias").any()
    assert not whole(values, "table.weight")[1].any()
    assert torch.equal(whole(values, "angles"), 1.0 / torch.arange(1, 5))
    assert "same" not in values.nodes or "own.weight" not in values.nodes
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is tensor and tensor.is_meta for name, tensor in before.items())
    assert model.angles.is_meta


class Lost(nn.Module):
    """What was written in a constructor is lost on meta, all of it or in part."""

    def __init__(self) -> None:
        super().__init__()
        self.written = nn.Parameter(torch.randn(4, 4))
        self.scaled, self.upper, self.copied = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
        self.all = nn.Parameter(torch.empty(4, 4))
        self.register_buffer("mask", torch.ones(4, 4).tril())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scaled.mul_(0.5)
        self.upper[:2].zero_()
        self.copied.copy_(torch.empty(4, 4))
        self.all[2:].zero_()
        self.all[:2].fill_(1.0)


def test_what_nothing_writes_to_or_only_in_part_is_missing() -> None:
    names = ("written", "scaled", "upper", "copied", "mask", "all")
    assert values_of(on_meta(Lost)).missing(names) == [*names[:-1]]


# -- runs ------------------------------------------------------------------------------------------


class Words(nn.Module):
    """A vocabulary that divides by nothing, a frozen part, and a buffer in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(23, 8, padding_idx=3), nn.Linear(8, 23, bias=False)
        self.up, self.down, self.norm = nn.Linear(8, 20), nn.Linear(20, 8), nn.LayerNorm(8)
        self.odd = nn.Linear(7, 5)
        self.register_buffer("angles", torch.empty(8), persistent=False)
        self.norm.requires_grad_(False)

    def init_weights(self) -> None:
        nn.init.orthogonal_(self.down.weight)
        self.angles.copy_(torch.arange(8) * 0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.norm(self.table(x) + self.angles)
        h = h + self.down(F.relu(self.up(h))) + self.odd.weight.sum()
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


PLANS = {
    "data": "mesh dp=4\ndata x, y over dp",
    "tensor": "mesh tp=4\nvocab table, head over tp\ncolumns up over tp\nrows down over tp",
    "both": "mesh dp=2, tp=2\ndata x, y over dp\nvocab table, head over tp\ncolumns up over tp\n"
    "rows down over tp",
    "zero 3": "mesh dp=4\ndata x, y over dp\nzero 3 over dp",
    "zero 3 and tensor": "mesh dp=2, tp=2\ndata x, y over dp\nvocab table, head over tp\n"
    "zero 3 over dp\naccumulate 2",
}
TOKENS = torch.arange(40).view(8, 5) % 23


def words(plan: str, make: Callable[[], nn.Module] = Words) -> mw.Program:
    model = on_meta(make).double()
    return mw.compile(model, mw.Plan.parse(plan), (TOKENS, TOKENS.flip(0)), device="cpu")


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """The weights under a plan without splits."""
    state: dict[str, Tensor] = words("mesh dp=1\ndata x, y over dp").launch(seed=3).state_dict()
    return state


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_starts_from_the_same_weights_under_every_plan(
    alone: dict[str, Tensor], plan: str
) -> None:
    run = words(PLANS[plan]).launch(seed=3)
    found = run.state_dict()
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert not found["table.weight"][3].any()
    reference = Words().double()
    run.copy_to(reference)
    assert torch.equal(reference.angles, (torch.arange(8) * 0.1).double())
    loss = run.step(TOKENS, TOKENS.flip(0))
    assert torch.allclose(loss, reference(TOKENS, TOKENS.flip(0)), rtol=0, atol=1e-12)
    run.check()
    _check_padding(run)


def _check_padding(run: mw.Run) -> None:
    """What storage adds is zero."""
    for key, stored in run.states[0].stored.items():
        if stored.paddings:
            held = [state.tensors[key] for state in run.states]
            everything = unshard(held, stored.layout, run.mesh)
            assert torch.equal(everything, stored.padded(stored.unpadded(everything))), key


class Largest(TorchDispatchMode):
    """Notes the largest storage that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            # What is recorded has types of its own, and no memory.
            if type(leaf) is Tensor and not leaf.is_meta:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return found


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(1001, 512, padding_idx=7), nn.Linear(512, 1024)

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.up.weight, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.up(self.table(x)).mean() + y.sum()


def test_no_rank_holds_more_than_its_part_and_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_BLOCK", 1 << 14)
    program = words("mesh dp=8\ndata x, y over dp\nzero 3 over dp", Large)
    with Largest() as largest:
        run = program.launch()
    # The largest is the buffer of all gradients of a rank; a whole table has four times as much.
    part = sum(p.numel() * p.element_size() for p in run.states[0].parameters.values())
    assert largest.bytes <= part < 1001 * 512 * 8 // 3


def test_what_has_no_values_is_told_when_it_is_needed_and_a_load_gives_it(
    tmp_path: Path,
) -> None:
    class Scaled(Words):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, y) * self.scale.mean()

    batch = TOKENS, TOKENS.flip(0)
    plan = mw.Plan.parse(PLANS["zero 3"])
    model = Scaled().double()
    with torch.no_grad():
        model.init_weights()
    real = mw.compile(model, plan, batch, device="cpu").launch()
    loss = real.step(*batch)
    real.save(tmp_path / "saved")
    program = words(PLANS["zero 3"], Scaled)
    run = program.launch()
    for call in (
        lambda: run.step(*batch),
        lambda: run.evaluate(*batch),
        run.state_dict,
        lambda: run.save(tmp_path / "other"),
    ):
        with pytest.raises(mw.RunError, match="`scale` has no values"):
            call()
    run.load(tmp_path / "saved")
    assert torch.equal(run.step(*batch), loss)
    weights = Scaled().double().state_dict()
    given = program.launch(state_dict={"scale": weights["scale"], "up.bias": weights["up.bias"]})
    assert torch.equal(given.state_dict()["up.bias"], weights["up.bias"])
    assert given.step(*batch).isfinite()
    later = program.launch()
    later.load_state_dict(weights)
    assert later.step(*batch).isfinite()


class Drawing(Words):
    """Initialises itself as no capture can record, or as no rank draws alike."""

    how = ""

    def reset_parameters(self) -> None:
        if self.how == "a seed":
            torch.manual_seed(3)
            nn.init.normal_(self.up.weight)
        elif self.how == "a value":
            if self.up.weight.sum() > 0:
                nn.init.zeros_(self.up.weight)
        elif self.how == "an error":
            raise ValueError("no such scheme")
        else:
            nn.init.constant_(self.up.bias, random.random())


def test_what_cannot_be_recorded_is_told_in_the_words_of_an_initialisation(
    monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    texts = []
    for how in ("a seed", "a value", "an error"):
        monkeypatch.setattr(Drawing, "how", how)
        with pytest.raises(mw.RunError) as caught:
            words(PLANS["data"], Drawing).launch().state_dict()
        lines = [line for line in str(caught.value).splitlines() if "test_initial.py" not in line]
        texts += [f"# {how}", *lines]
    golden("not_recorded", "\n".join(texts))


def test_numbers_of_python_in_an_initialisation_are_warned_of() -> None:
    program = words(PLANS["data"], Drawing)
    with pytest.warns(UserWarning, match="the model's initialisation draws from Python's `random`"):
        run = program.launch()
    assert len(run.state_dict()["up.bias"].unique()) == 1


def test_a_model_that_lost_its_values_after_it_was_compiled_is_not_drawn_anew() -> None:
    batch = TOKENS, TOKENS.flip(0)
    model = Words()
    program = mw.compile(model, mw.Plan.parse(PLANS["data"]), batch, device="cpu")
    model.to("meta")
    with pytest.raises(mw.RunError, match="is on the meta device: it has no values"):
        program.launch()
    with pytest.raises(mw.RunError, match="is on the meta device: it has no values"):
        words(PLANS["data"]).launch().program.launch()


def test_models_of_hugging_face_are_initialised_as_they_say() -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = on_meta(lambda: transformers.GPT2LMHeadModel(config))
    batch = {"input_ids": torch.ones(4, 8, dtype=torch.int64)}
    batch["labels"] = batch["input_ids"]
    plan = mw.Plan.parse("mesh dp=2\ndata input_ids, labels over dp\nzero 3 over dp")
    run = mw.compile(model, plan, batch, device="cpu").launch()
    state = run.state_dict()
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    stds = {
        "transformer.wte.weight": 0.02,
        "transformer.h.0.attn.c_attn.weight": 0.02,
        "transformer.h.1.mlp.c_proj.weight": 0.02 / math.sqrt(4),
    }
    for name, std in stds.items():
        assert abs(state[name].std().item() / std - 1) < 0.05, name
    assert abs(run.step(**batch).item() - math.log(128)) < 1


# -- processes -------------------------------------------------------------------------------------


def test_processes_start_from_the_same_weights_whoever_has_values(
    alone: dict[str, Tensor], forked: Forked
) -> None:
    """See the module for what each rank builds."""
    outputs = forked.outputs("tests.runtime.state.initial_ranks", 2)
    sums = [line for line in outputs[0].splitlines() if line.startswith("meta ")]
    assert sums == [f"meta {name} {value.sum().item()!r}" for name, value in alone.items()]
    assert outputs[0] == outputs[1]
    assert "not that of rank 0" in outputs[1]
