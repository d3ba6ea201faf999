"""What a person reads when a plan, a model or a call is wrong; and that the help helps."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from meshwright.passes.contracts import allow

Golden = Callable[[str, str], None]
D, HEADS, VOCAB, LENGTH, BATCH = 32, 4, 48, 12, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.ln, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(), is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.ln(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


class GroupedQueries(nn.Module):
    """Attention with two key and value heads for four of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D // 2), nn.Linear(D, D // 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).square().mean()


def tokens(rows: int = BATCH) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randint(0, VOCAB, (rows, LENGTH)), torch.randint(0, VOCAB, (rows, LENGTH))


def check(model: Callable[[], nn.Module], plan: str, rows: int = BATCH) -> mw.Program:
    if model is GroupedQueries:
        example: tuple[Tensor, ...] = (torch.randn(rows, LENGTH, D),)
    else:
        example = tokens(rows)
    return mw.compile(model(), mw.Plan.parse(plan, name="test.plan"), example)


DATA = "data tokens, targets over dp\n"
ATTENTION = "columns blocks.*.qkv over tp as (3 heads hd)\nrows blocks.*.proj over tp"
MLP = "columns blocks.*.up over tp\nrows blocks.*.down over tp\n"
PLANS: Mapping[str, tuple[str, str | None]] = {
    "misspelt-selector": (
        "mesh tp=2\ncolumns blocks.*.upp over tp\nrows blocks.*.down over tp",
        "mesh tp=2\ncolumns blocks.*.up over tp\nrows blocks.*.down over tp",
    ),
    "misspelt-input": ("mesh dp=2\ndata token, targets over dp", "mesh dp=2\n" + DATA),
    "heads-do-not-divide": (
        "mesh tp=3\nlet heads = 4\ncolumns blocks.*.qkv over tp as (3 heads hd)",
        "mesh tp=2\nlet heads = 4\n" + ATTENTION,
    ),
    "rows-do-not-divide": ("mesh tp=5\nrows blocks.*.down over tp", "mesh tp=4\n" + MLP),
    "batch-does-not-divide": ("mesh dp=3\n" + DATA, None),
    "axis-twice-in-a-layout": (
        "mesh tp=2\nshard blocks.*.up.weight [f@tp, d@tp]",
        "mesh tp=2\nshard blocks.*.up.weight [f@tp, d]\nrows blocks.*.down over tp",
    ),
    "axis-not-in-the-mesh": ("mesh dp=2\ncolumns blocks.*.up over tp", None),
    "two-shard-statements-tie": (
        "mesh tp=2\nshard blocks.*.up.weight [f@tp, d]\nshard blocks.0.*.weight [f, d@tp]",
        None,
    ),
    "columns-and-rows-contradict": (
        "mesh tp=2\ncolumns blocks.*.up over tp\nrows blocks.*.up over tp",
        "mesh tp=2\n" + MLP,
    ),
    "tied-names-contradict": (
        "mesh tp=2\nshard wte.weight [v@tp, d]\nshard head.weight [v, d@tp]",
        None,
    ),
    "input-missing-from-data": ("mesh dp=2\ndata tokens over dp", "mesh dp=2\n" + DATA),
    "statement-without-a-pass": ("mesh dp=2\n" + DATA + "allow local **", "mesh dp=2\n" + DATA),
    "checkpoint-of-a-list": (
        "mesh dp=2\n" + DATA + "checkpoint blocks",
        "mesh dp=2\n" + DATA + "checkpoint blocks.*",
    ),
    "checkpoint-keeps-nothing-known": (
        "mesh dp=2\n" + DATA + "checkpoint blocks.* keep=[linear, atention]",
        "mesh dp=2\n" + DATA + "checkpoint blocks.* keep=[linear, attention]",
    ),
    "checkpoint-keeps-a-module": (
        "mesh dp=2\n" + DATA + "checkpoint blocks.* keep=zzz",
        "mesh dp=2\n" + DATA + "checkpoint blocks.* keep=gelu",
    ),
    "checkpoint-in-too-many-segments": (
        "mesh dp=2\n" + DATA + "checkpoint blocks.* segments=3",
        "mesh dp=2\n" + DATA + "checkpoint blocks.* segments=2",
    ),
    "checkpoint-in-too-small-a-budget": (
        "mesh dp=2\n" + DATA + "checkpoint budget=1KiB",
        "mesh dp=2\n" + DATA + "checkpoint budget=1GiB",
    ),
    "memory-in-too-small-a-budget": (
        "mesh dp=2\n" + DATA + "zero 3 over dp\naccumulate 2\noffload optimizer\n"
        "memory budget=1KiB",
        "mesh dp=2\n" + DATA + "memory budget=1GiB",
    ),
    "checkpoint-keeps-an-operator-nowhere": (
        "mesh dp=2\n" + DATA + 'checkpoint blocks.* keep=["upp.linear"]',
        "mesh dp=2\n" + DATA + 'checkpoint blocks.* keep=["up.linear"]',
    ),
    "implicit-gather": (
        "mesh tp=2\ncolumns blocks.*.up over tp",
        "mesh tp=2\ncolumns blocks.*.up over tp\nallow replicate blocks.*.down",
    ),
    "broken-expect": (
        "mesh tp=2\n" + MLP + "expect all_reduce[tp] == 1 per blocks.*",
        "mesh tp=2\n" + MLP + "expect all_reduce[tp] == 2 per blocks.*",
    ),
    "broken-expect-of-memory": ("mesh dp=2\n" + DATA + "expect peak_memory <= 1KiB", None),
    "no-mesh": ("let heads = 4", "mesh dp=2, tp=2\n" + DATA + MLP + "let heads = 4"),
    "axis-without-use": ("mesh dp=2, tp=2\n" + MLP, "mesh dp=2, tp=2\n" + MLP + DATA),
    "second-axis-without-use": (
        "mesh dp=2, tp=2\n" + DATA,
        "mesh dp=2, tp=2\n" + DATA.replace("dp", "(dp, tp)"),
    ),
    "axis-that-the-batch-does-not-divide-over": (
        "mesh dp=2, tp=3\n" + DATA,
        "mesh dp=2, tp=3\nallow replicate **\n" + DATA,
    ),
    "columns-of-a-module-without-a-linear": ("mesh tp=2\ncolumns blocks.*.ln over tp", None),
    "parameter-as-a-pending-sum": (
        "mesh tp=2\nshard wte.weight [v, d] partial(tp)",
        "mesh tp=2\nshard wte.weight [v@tp, d]",
    ),
    "module-that-is-not-there": ("mesh tp=2\ncolumns blocks.*.mlp over tp", None),
    "prefix-missing": ("mesh tp=2\ncolumns up over tp", "mesh tp=2\n" + MLP),
    "prefix-too-many": ("mesh tp=2\ncolumns module.blocks.*.up over tp", "mesh tp=2\n" + MLP),
    "container-skipped": ("mesh tp=2\ncolumns blocks.up over tp", "mesh tp=2\n" + MLP),
    "parameter-for-a-module": (
        "mesh tp=2\ncolumns blocks.*.up.weight over tp",
        "mesh tp=2\n" + MLP,
    ),
    "module-for-a-parameter": (
        "mesh tp=2\nshard wte [v@tp, d]",
        "mesh tp=2\nshard wte.weight [v@tp, d]",
    ),
    "number-out-of-range": ("mesh tp=2\ncolumns blocks.7.up over tp", "mesh tp=2\n" + MLP),
    "range-in-braces": (
        "mesh tp=2\ncolumns blocks.{0-1}.up over tp",
        "mesh tp=2\n" + MLP.replace("*", "[0:2]"),
    ),
    "pattern-in-quotes": ('mesh tp=2\ncolumns "blocks.*.up" over tp', "mesh tp=2\n" + MLP),
    "look-alike-letter": ("mesh tp=2\ncolumns bl\u043ecks.*.up over tp", "mesh tp=2\n" + MLP),
    "input-that-is-not-there": ("mesh dp=2\ndata batch over dp", "mesh dp=2\n" + DATA),
    "columns-of-an-embedding": ("mesh tp=2\ncolumns wte over tp", "mesh tp=2\nvocab wte over tp"),
    "sequence-of-the-model": (
        'mesh tp=2\nsequence "" over tp\n' + MLP,
        "mesh tp=2\nsequence blocks.* over tp\n" + MLP,
    ),
    "rows-over-two-axes": ("mesh a=2, b=5\nrows blocks.*.down over (a, b)", "mesh tp=4\n" + MLP),
    "layout-of-another-rank": ("mesh tp=2\nshard blocks.*.up.weight [f@tp]", None),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_wrong_plan_is_told_and_the_help_works(
    golden: Golden, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "implicit-gather":
        monkeypatch.setattr(allow, "LIMIT", 0)
    plan, mended = PLANS[case]
    with pytest.raises(mw.MeshwrightError) as caught:
        check(GPT, plan)
    golden(f"plan-{case}", _with_lines(str(caught.value)))
    if mended is not None:
        check(GPT, mended)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 16, num_layers=2, batch_first=True)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.rnn(batch["x"])[0].sum() + batch["y"].sum()


RECURRENT = {
    "columns-of-a-recurrence": ("mesh tp=2\ncolumns rnn over tp", "columns rnn over tp"),
    "rows-of-a-recurrence": ("mesh tp=2\nrows rnn over tp", "rows rnn over tp"),
    "structure-for-its-inputs": ("mesh dp=2\ndata batch over dp", "batch"),
    "one-input-of-a-structure": ("mesh dp=2\ndata batch.x over dp", "data batch.x over dp"),
    "input-of-a-structure-alone": ("mesh dp=2\ndata x, batch.y over dp", "x"),
    "top-level-of-a-structure": ("mesh dp=2\ndata * over dp", "*"),
}


@pytest.mark.parametrize("case", RECURRENT)
def test_following_the_help_of_an_error_about_the_model_compiles(golden: Golden, case: str) -> None:
    text, wrong = RECURRENT[case]
    example = ({"x": torch.randn(4, 5, 8), "y": torch.randn(4, 3)},)
    with pytest.raises(mw.PlanError) as caught:
        mw.compile(Recurrent(), mw.Plan.parse(text, "test.plan"), example)
    golden(f"plan-{case}", str(caught.value))
    line = re.findall(r"`([^`]+)`", caught.value.help)[0]
    mw.compile(Recurrent(), mw.Plan.parse(text.replace(wrong, line, 1)), example)


def test_the_selector_of_the_model_itself_is_a_region_and_has_contracts() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x.square().mean()

    text = 'mesh tp=2\nsequence "" over tp\nexpect all_reduce[tp] == 2 per ""\n' + MLP
    program = mw.compile(Blocks(), mw.Plan.parse(text), (torch.randn(BATCH, LENGTH, D),))
    assert any(item.kind == "reduce_scatter" for item in program.comm())


def test_fewer_heads_than_ranks_has_both_ways_out(golden: Golden) -> None:
    split = "columns {q,k,v} over tp as (heads hd)\nlet hd = 8\n"
    with pytest.raises(mw.PlanError) as caught:
        check(GroupedQueries, "mesh tp=4\n" + split)
    golden("plan-fewer-heads-than-ranks", str(caught.value))
    whole = "columns q over tp as (heads hd)\nlet hd = 8\nallow replicate **"
    check(GroupedQueries, "mesh tp=4\n" + whole)
    over_both = "columns q over (tp, tp2) as (heads hd)\n"
    check(GroupedQueries, "mesh tp=2, tp2=2\n" + split.replace("q,", "") + over_both)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(grad.numpy())


def branch(y: Tensor) -> Tensor:
    return y.sum() if y.sum() > 0 else y.mean()


def hooked(y: Tensor) -> Tensor:
    y.register_hook(lambda grad: 2 * grad)
    return y.sum()


MODELS: Mapping[str, Callable[[Tensor], Any]] = {
    "branch-on-a-value": branch,
    "autograd-function": lambda y: Rounded.apply(y).sum(),
    "tensor-hook": hooked,
    "value-as-a-number": lambda y: y.sum() * y.mean().item(),
    "no-scalar": lambda y: y,
    "two-scalars": lambda y: {"one": y.sum(), "other": y.mean()},
    "whole-numbers": lambda y: y.argmax(),
    "nothing": lambda y: None,
    "an-error-of-its-own": lambda y: y[:, 9],
}


class Model(nn.Module):
    def __init__(self, finish: Callable[[Tensor], Any] = torch.sum) -> None:
        super().__init__()
        self.linear, self.finish = nn.Linear(4, 4), finish

    def forward(self, x: Tensor) -> Any:
        return self.finish(self.linear(x))


ROWS = "mesh dp=2\ndata x over dp"


@functools.cache
def compiled() -> mw.Program:
    return mw.compile(Model(), mw.Plan.parse(ROWS), (torch.ones(8, 4),))


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_captured_is_told_with_its_line(golden: Golden, case: str) -> None:
    with pytest.raises(mw.CaptureError) as caught:
        mw.compile(Model(MODELS[case]), mw.Plan.parse(ROWS), (torch.ones(8, 4),))
    golden(f"model-{case}", _with_lines(str(caught.value)))


def _with_lines(text: str) -> str:
    """The text with the line of this file that it names, which is what must be right."""
    lines = Path(__file__).read_text().splitlines()
    return re.sub(
        r"(test_errors\.py):(\d+)", lambda at: f"{at[1]}: {lines[int(at[2]) - 1].strip()}", text
    )


PLAN, X = mw.Plan.parse(ROWS), (torch.ones(8, 4),)
ARGUMENTS: Mapping[str, Callable[[], object]] = {
    "plan-as-text": lambda: mw.compile(Model(), ROWS, X),  # type: ignore[arg-type]  # is the test
    "model-class": lambda: mw.compile(Model, PLAN, X),  # type: ignore[arg-type]  # is the test
    "example-missing": lambda: mw.compile(Model(), PLAN, None),
    "example-too-short": lambda: mw.compile(Model(), PLAN, ()),
    "loss-of-another-kind": lambda: mw.compile(Model(), PLAN, X, loss=3),
    "loss-not-there": lambda: mw.compile(Model(), PLAN, X, loss="logits"),
    "output-not-there": lambda: mw.compile(Model(), PLAN, X, outputs=["logits"]),
    "outputs-as-text": lambda: mw.compile(Model(), PLAN, X, outputs="logits"),
    "unknown-mode": lambda: mw.compile(Model(), PLAN, X, mode="training"),
    "wrapped-model": lambda: mw.compile(nn.DataParallel(Model()), PLAN, X),
    "model-of-torch-compile": lambda: mw.compile(torch.compile(Model()), PLAN, X),  # type: ignore[arg-type]  # is the test
    "array-in-the-example": lambda: mw.compile(Model(), PLAN, (X[0].numpy(),)),
    "loss-of-two-arguments": lambda: mw.compile(Model(), PLAN, X, loss=lambda y, t: y),
    "loss-that-is-a-module": lambda: mw.compile(Model(), PLAN, X, loss=nn.MSELoss()),
    "outputs-as-an-array": lambda: mw.compile(Model(), PLAN, X, outputs=X[0].numpy()),
    "example-of-numbers": lambda: mw.compile(Model(), PLAN, ([[1.0] * 4] * 8000,)),
    "example-without-a-batch": lambda: mw.compile(Model(), PLAN, (torch.ones(0, 4),)),
    "unknown-device": lambda: mw.compile(Model(), PLAN, X, device="gpu"),
}


def step_by_scaler(run: mw.Run) -> None:
    """Update as a loop with torch's scaler does, whose loss has been scaled."""
    optimizer, scaler = run.optimizer(torch.optim.Adam), torch.amp.GradScaler("cpu")
    scaler.scale(run.step(*X))
    scaler.step(optimizer)


def whole_state() -> dict[str, Any]:
    """The state of an optimizer over parameters of twice the shard's rows, by the same numbers."""
    run = compiled().launch()
    optimizer = run.optimizer(torch.optim.Adam)
    run.step(*X)
    optimizer.step()
    state = optimizer.state_dict()
    for kept in state["state"].values():
        kept["exp_avg"] = torch.cat([kept["exp_avg"]] * 2)
    return state


RUNS: Mapping[str, Callable[[mw.Run], object]] = {
    "batch-of-another-size": lambda run: run.step(torch.ones(6, 4)),
    "input-of-another-type": lambda run: run.step(torch.ones(8, 4, dtype=torch.float64)),
    "input-missing": lambda run: run.step(),
    "input-unknown": lambda run: run.step(y=X[0]),
    "input-without-values": lambda run: run.step(X[0].to("meta")),
    "input-not-a-tensor": lambda run: run.step([1.0, 2.0]),
    "evaluated-batch-does-not-divide": lambda run: run.evaluate(torch.ones(5, 4)),
    "state-of-another-model": lambda run: run.load_state_dict({"linear.weight": torch.ones(3, 3)}),
    "state-of-a-wrapped-model": lambda run: run.load_state_dict(
        {"module.linear.weight": torch.ones(4, 4), "module.linear.bias": torch.ones(4)}
    ),
    "state-of-numbered-tensors": lambda run: run.load_state_dict({1: X[0]}),  # type: ignore[dict-item]
    "state-of-no-tensors": lambda run: run.load_state_dict({"linear.weight": 1.0}),  # type: ignore[dict-item]
    "copied-to-another-model": lambda run: run.copy_to(nn.Linear(4, 4)),
    "norm-of-type-zero": lambda run: run.clip_grad_norm_(1.0, 0),
    "optimizer-copied": lambda run: copy.deepcopy(run.optimizer(torch.optim.SGD)),
    "optimizer-of-a-grad-scaler": step_by_scaler,
    "optimizer-state-of-another-plan": lambda run: run.optimizer(torch.optim.Adam).load_state_dict(
        whole_state()
    ),
    "optimizer-made-already": lambda run: run.optimizer(run),  # type: ignore[arg-type]
    "group-of-tensors": lambda run: run.optimizer(torch.optim.SGD, groups=[{"params": X}]),
    "group-that-matches-nothing": lambda run: run.optimizer(
        torch.optim.SGD, groups=[{"params": "linear.weigth"}]
    ),
    "input-that-requires-a-gradient": lambda run: run.step(torch.ones(8, 4, requires_grad=True)),
    "nested-tensor": lambda run: run.step(torch.nested.nested_tensor([X[0]])),
    "norm-of-many-numbers": lambda run: run.clip_grad_norm_(X[0]),  # type: ignore[arg-type]
    "selector-of-a-group": lambda run: run.optimizer(torch.optim.SGD, groups=[{"params": ["["]}]),
    "input-that-is-an-array": lambda run: run.step(X[0].numpy()),
    "state-of-other-numbers": lambda run: run.load_state_dict(
        {"linear.weight": torch.ones(4, 4, dtype=torch.int64), "linear.bias": torch.ones(4)}
    ),
    "state-without-values": lambda run: run.load_state_dict(
        {"linear.weight": torch.ones(4, 4, device="meta"), "linear.bias": torch.ones(4)}
    ),
    "norm-below-zero": lambda run: run.clip_grad_norm_(-1.0),
    "optimizer-option-unknown": lambda run: run.optimizer(torch.optim.SGD, learning_rate=1.0),
    "optimizer-of-nothing": lambda run: run.optimizer(lambda parameters: None),  # type: ignore[arg-type, return-value]
    "rows-of-no-batch": lambda run: run.data_slice(0),
    "no-checkpoint": lambda run: run.load("no such folder"),
}


class Odd:
    """Prints itself in a million lines."""

    def __repr__(self) -> str:
        return "line\n" * 10**6


class Silent:
    """Cannot be printed."""

    def __repr__(self) -> str:
        raise ValueError("no text")


VALUES: Mapping[str, Callable[[], Any]] = {
    "tensor": lambda: torch.ones(1000, 1000),
    "array": lambda: torch.ones(1000, 1000).numpy(),
    "list": lambda: [1.0] * 10**6,
    "nested-list": lambda: [[1.0] * 1000] * 1000,
    "dict": lambda: dict.fromkeys(range(10**6), 1.0),
    "text": lambda: "line\n" * 10**6,
    "bytes": lambda: b"line\n" * 10**6,
    "many-lines": Odd,
    "no-text": Silent,
    "large-number": lambda: 10**10_000,
    "nothing": lambda: None,
}


class Scaled(Model):
    def forward(self, x: Tensor, scale: Any = 1.0) -> Any:
        return super().forward(x)


@functools.cache
def scaled() -> mw.Program:
    return mw.compile(Scaled(), PLAN, (*X, 2.0))


TAKEN: Mapping[str, Callable[[Any], object]] = {
    "plan": lambda value: mw.compile(Model(), value, X),
    "text-of-a-plan": lambda value: mw.Plan.parse(value),
    "path-of-a-plan": lambda value: mw.Plan.load(value),
    "example": lambda value: mw.compile(Model(), PLAN, (value,)),
    "mode": lambda value: mw.compile(Model(), PLAN, X, mode=value),
    "outputs": lambda value: mw.compile(Model(), PLAN, X, outputs=(value, 1)),
    "loss": lambda value: mw.compile(Model(), PLAN, X, loss=[value]),
    "seed": lambda value: compiled().launch(seed=[value]),  # type: ignore[arg-type]
    "new-shapes": lambda value: compiled().launch(new_shapes=value),
    "check-finite": lambda value: compiled().launch(check_finite=[value]),  # type: ignore[arg-type]
    "check-inputs": lambda value: compiled().launch(check_inputs=[value]),  # type: ignore[arg-type]
    "state": lambda value: compiled().launch(state_dict={"linear.weight": value}),
    "step": lambda value: compiled().launch().step(value),
    "step-by-name": lambda value: compiled().launch().step(x=value),
    "constant-of-a-step": lambda value: scaled().launch().step(*X, value),
    "norm": lambda value: compiled().launch().clip_grad_norm_([value]),  # type: ignore[arg-type]
    "path-of-a-checkpoint": lambda value: compiled().launch().save([value]),  # type: ignore[arg-type]
    "rows": lambda value: compiled().launch().data_slice([value]),  # type: ignore[arg-type]
    "option-of-an-optimizer": lambda value: (
        compiled().launch().optimizer(torch.optim.SGD, lr=[value])
    ),
    "groups": lambda value: compiled().launch().optimizer(torch.optim.SGD, groups=[value]),
    "name-to-explain": lambda value: compiled().explain([value]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("value", VALUES)
def test_an_error_names_a_value_shortly_on_one_line_however_large_it_is(value: str) -> None:
    for taken, call in TAKEN.items():
        with pytest.raises(mw.MeshwrightError) as caught:
            call(VALUES[value]())
        problem, *rest = str(caught.value).splitlines()
        assert len(problem) < 450, (taken, problem[:500])
        assert len(rest) < 9, taken
        assert any(line.startswith("  help: ") for line in rest), taken


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_wrong_argument_of_compile_is_told(golden: Golden, case: str) -> None:
    with pytest.raises(mw.MeshwrightError) as caught:
        ARGUMENTS[case]()
    golden(f"argument-{case}", str(caught.value))


@pytest.mark.parametrize("case", RUNS)
def test_a_wrong_call_of_a_run_is_told_and_leaves_it_usable(golden: Golden, case: str) -> None:
    run = compiled().launch()
    with pytest.raises(mw.MeshwrightError) as caught:
        RUNS[case](run)
    golden(f"run-{case}", str(caught.value))
    assert run.step(*X).isfinite()


def test_a_seed_of_more_than_64_bits_is_told(golden: Golden) -> None:
    with pytest.raises(mw.RunError) as caught:
        compiled().launch(seed=2**63)
    golden("run-seed-too-large", str(caught.value))


class Lost(Model):
    """Nothing initialises the scale, and a constructor's value is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * self.scale)


class Reading(Model):
    def reset_parameters(self) -> None:
        self.linear.weight.mul_(self.linear.weight.norm().item())


class Resizing(Model):
    def reset_parameters(self) -> None:
        self.linear.bias = nn.Parameter(torch.zeros(5))


WITHOUT_VALUES: Mapping[str, Callable[[], nn.Module]] = {
    "that-nothing-initialises": Lost,
    "whose-initialisation-reads-values": Reading,
    "whose-initialisation-resizes": Resizing,
}


@pytest.mark.parametrize("case", WITHOUT_VALUES)
def test_a_model_without_values_is_told_what_it_lacks(golden: Golden, case: str) -> None:
    with torch.device("meta"):
        model = WITHOUT_VALUES[case]()
    run = mw.compile(model, PLAN, X).launch()
    with pytest.raises(mw.RunError) as caught:
        run.step(*X)
    golden(f"run-model-{case}", str(caught.value))


def test_following_the_help_for_another_batch_size_works() -> None:
    assert compiled().launch(new_shapes="compile").step(torch.ones(6, 4)).isfinite()


def test_a_mesh_of_more_ranks_than_one_process_holds_is_told(golden: Golden) -> None:
    plan = mw.Plan.parse("mesh a=1000, b=1000\nallow replicate **")
    with pytest.raises(mw.RunError) as caught:
        mw.compile(Model(), plan, X).launch()
    golden("run-mesh-too-large-for-a-process", str(caught.value))


def test_a_program_without_gradients_is_told_at_step(golden: Golden) -> None:
    run = mw.compile(Model(), PLAN, X, mode="infer").launch()
    with pytest.raises(mw.RunError) as caught:
        run.step(*X)
    golden("run-step-of-an-inference-program", str(caught.value))


def test_a_split_parameter_and_an_optimizer_of_whole_tensors_are_told(golden: Golden) -> None:
    run = check(GPT, "mesh tp=2\n" + MLP).launch()
    with pytest.raises(mw.RunError) as caught:
        run.optimizer(torch.optim.Muon)
    golden("run-optimizer-of-whole-tensors", str(caught.value))


def test_a_world_of_another_size_is_told(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(mw.RunError) as caught:
        compiled().launch()
    golden("run-world-of-another-size", str(caught.value))


def test_a_device_that_is_not_here_is_told(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    program = mw.compile(Model(), PLAN, X, device="cuda")
    with pytest.raises(mw.RunError) as caught:
        program.launch()
    golden("run-device-that-is-not-here", str(caught.value))


def test_every_error_here_is_lower_case_with_one_line_of_help_that_begins_with_a_verb() -> None:
    folder = Path(__file__).parent / "golden"
    texts = [
        p for kind in ("plan", "model", "argument", "run") for p in folder.glob(f"{kind}-*.txt")
    ]
    assert len(texts) > 50
    for path in texts:
        lines = path.read_text().splitlines()
        helps = [line for line in lines if line.startswith("  help: ")]
        assert len(helps) == 1, path.name
        assert lines[-1] == helps[0], path.name
        assert lines[0][0] in "`abcdefghijklmnopqrstuvwxyz", path.name
        verb = helps[0].removeprefix("  help: ").split()[0].rstrip(":,")
        assert verb in VERBS, (path.name, verb)


VERBS = {
    "add", "call", "change", "check", "choose", "compile", "convert", "define", "give", "keep",
    "launch", "leave", "make", "name", "pad", "pass", "read", "reduce", "register", "remove",
    "return", "set", "split", "start", "use", "write",
}  # fmt: skip
