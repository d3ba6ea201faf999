"""Models whose sequences are split over ranks, attention included, train as on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from tests.equivalence import check_equal, implicit_gathers
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, real, tokens
from tests.test_equivalence_huggingface import TOLERANCE, gpt2, llama, text

METHODS = "ring", "ring order=contiguous", "ulysses"
BLOCKS = "context blocks.* over cp method={}\n"

PLANS = {
    "alone": "mesh cp=4\n" + BLOCKS,
    "data": "mesh dp=2, cp=2\n" + GPT_DATA + BLOCKS,
    "columns and rows": "mesh cp=2, tp=2\n" + GPT_TENSOR + BLOCKS,
    "sequence and vocab": "mesh cp=2, tp=2\n" + GPT_TENSOR + BLOCKS
    + "sequence blocks.* over tp\nvocab wte, head over tp\n",
    "zero": "mesh dp=2, cp=2\n" + GPT_DATA + BLOCKS + "zero 3 over (dp, cp)\n",
    "checkpoint": "mesh cp=2\n" + BLOCKS + "checkpoint blocks.*\n",
    "keep": "mesh cp=2\n" + BLOCKS + "checkpoint blocks.* keep=[sdpa]\n",
    "accumulate": "mesh cp=2\ndata tokens, targets\n" + BLOCKS + "accumulate 2\n",
    "stages": "mesh dp=2, pp=2, cp=2\n" + GPT_DATA + BLOCKS
    + "stages at blocks.1 over pp microbatches=2\nzero 2 over dp\n",
    "blocks": "mesh cp=2, row=2, col=2\nsumma ** over (row, col)\n"
    "summa blocks.*.qkv over (row, col) as (3 heads hd)\n" + BLOCKS,
    "a cube": "mesh cp=2, x=1, y=2, z=2\nsumma ** over (x, y, z)\n"
    "summa blocks.*.qkv over (x, y, z) as (3 heads hd)\n" + BLOCKS,
    "two axes": "mesh a=2, b=2\n" + BLOCKS.replace("cp", "(a, b)"),
    "the whole model": "mesh cp=2\ncontext \"\" over cp method={}\n",
}  # fmt: skip


def check_gpt(name: str, method: str, steps: int = 3) -> None:
    torch.manual_seed(0)
    program = check_equal(Gpt(), tokens, PLANS[name].format(method), steps=steps)
    assert implicit_gathers(program) == []
    if method == "ring":
        assert [*program.notes.values()] == ["order=zigzag"]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("alone", "ring"), ("sequence and vocab", "ring"), ("stages", "ring order=contiguous"),
        ("columns and rows", "ulysses"), ("keep", "ring"), ("the whole model", "ulysses"),
        ("blocks", "ring"),
    ],
)  # fmt: skip
def test_a_gpt_trains_as_on_one_device(name: str, method: str) -> None:
    check_gpt(name, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PLANS)
def test_a_gpt_trains_as_on_one_device_under_every_plan(name: str, method: str) -> None:
    check_gpt(name, method)


class Attend(nn.Module):
    """One layer of attention with what `F.scaled_dot_product_attention` takes."""

    def __init__(self, heads: int, groups: int, **options: Any) -> None:
        super().__init__()
        self.sizes, self.options = (heads, groups, groups), options
        self.qkv, self.out = nn.Linear(12, 6 * sum(self.sizes)), nn.Linear(6 * heads, 12)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, 6)).transpose(1, 2).split(self.sizes, 1)
        options = {**self.options, "enable_gqa": True}
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask, **options)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Attending(nn.Module):
    """Two layers of attention between two linears; `mask` makes what both add to their scores."""

    def __init__(self, heads: int = 8, groups: int = 8, mask: str = "", **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attend(heads, groups, **options) for _ in range(2))
        self.up, self.down, self.mask = nn.Linear(12, 12), nn.Linear(12, 3), mask
        if mask == "learned":
            self.bias = nn.Parameter(torch.randn(heads, 16, 16))

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        here, x = torch.arange(16), self.up(x)
        distance = here[:, None] - here
        mask = {
            "": None,
            "window": (distance >= 0) & (distance < 5),
            "padding": kept[:, None, None],
            "documents": (here[:, None] // 6 == here // 6) & (distance >= 0),
            "slopes": -distance.abs().to(x.dtype) * torch.rand(8, 1, 1, dtype=x.dtype).sign() * 0.1,
            "learned": self.bias if self.mask == "learned" else None,
        }[self.mask]
        for layer in self.layers:
            x = layer(x, mask)
        return self.down(x).square().mean()


def batch() -> tuple[Tensor, Tensor]:
    return real(4, 16, 12), torch.arange(16) < torch.tensor([16, 9, 12, 3])[:, None]


LAYERS = "context layers.* over cp method={}\n"
ATTENTION: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "all keys": {},
    "grouped": {"groups": 2, "is_causal": True},
    "one head of keys": {"groups": 1, "scale": 0.3},
    "window": {"mask": "window"},
    "padding": {"mask": "padding"},
    "documents": {"mask": "documents"},
    "slopes": {"mask": "slopes"},
    "learned": {"mask": "learned"},
}


def check_attention(name: str, method: str, ranks: int) -> None:
    torch.manual_seed(0)
    plan = f"mesh cp={ranks}\n" + LAYERS.format(method)
    program = check_equal(Attending(**ATTENTION[name]), batch, plan)
    assert implicit_gathers(program) == []


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("grouped", "ring"),
        ("window", "ring order=zigzag"),
        ("padding", "ring order=zigzag"),
        ("learned", "ring"),
        ("one head of keys", "ulysses"),
    ],
)
def test_attention_equals_that_of_one_device(name: str, method: str) -> None:
    check_attention(name, method, ranks=4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("method", [*METHODS, "ring order=zigzag"])
@pytest.mark.parametrize("name", ATTENTION)
def test_every_kind_of_attention_equals_that_of_one_device(
    name: str, method: str, ranks: int
) -> None:
    check_attention(name, method, ranks)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plan", ["mesh cp=4\n", "mesh cp=2, dp=2\ndata x, kept over dp\n"])
def test_dropout_inside_attention_draws_the_numbers_of_one_device(method: str, plan: str) -> None:
    torch.manual_seed(0)
    model = Attending(groups=4, is_causal=True, dropout_p=0.3).double()
    found = []
    for lines in ("mesh x=1\n", plan + LAYERS.format(method)):
        program = meshwright.compile(model, meshwright.Plan.parse(lines), batch())
        run = program.launch(seed=3)
        torch.manual_seed(1)
        loss = run.step(*batch())
        found.append({"loss": loss, **run.gradients()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)


class Dropped(nn.Module):
    """Dropout of sequences that are merged with what is around them or in them."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.layer = nn.Embedding(32, 12), Attend(8, 4, is_causal=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.dropout(self.wte(tokens).flatten(0, 1), 0.3).unflatten(0, tokens.shape)
        x = F.dropout(self.layer(F.dropout(x, 0.3), None).flatten(1), 0.3).unflatten(1, (-1, 12))
        x = F.dropout(x.transpose(1, 2), 0.3)
        return F.dropout(x.flatten(1), 0.3).square().mean()


DROPPED = {
    "parts": (Dropped(), lambda: (torch.randint(0, 32, (4, 16)),),
              'mesh cp=4\ncontext "" over cp order=zigzag\n'),
    "sequence": (Gpt(p=0.3), tokens, PLANS["sequence and vocab"].format("ring order=zigzag")),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_of_tokens_in_zigzag_order_draws_the_numbers_of_one_device(name: str) -> None:
    model, example, plan = DROPPED[name]
    torch.manual_seed(0)
    inputs, found = example(), []
    for lines in ("mesh x=1\n", plan):
        run = meshwright.compile(model.double(), meshwright.Plan.parse(lines), inputs).launch(
            seed=3
        )
        loss = run.step(*inputs)
        found.append({"loss": loss, **run.gradients()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("looks", [False, True])
def test_what_a_model_returns_is_in_the_order_of_the_sequence(method: str, looks: bool) -> None:
    class Returning(Gpt):
        looks: bool

        def forward(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            logits = self.head(self.ln(x))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            last = {"last": logits[:, -1]} if self.looks else {}
            return {"loss": loss, "logits": logits, **last}

    torch.manual_seed(0)
    plan = "mesh cp=2\n" + BLOCKS.format(method)
    model, outputs = Returning(), ("logits", "last") if looks else ("logits",)
    model.looks = looks
    check_equal(model, tokens, plan, outputs=outputs, steps=1)


@pytest.mark.parametrize("method", METHODS)
def test_inference_equals_that_of_one_device(method: str) -> None:
    torch.manual_seed(0)
    model, example = Gpt().double().eval(), tokens()
    plan = meshwright.Plan.parse("mesh cp=4\n" + BLOCKS.format(method))
    found = meshwright.compile(model, plan, example, mode="infer").launch().forward(*example)
    torch.testing.assert_close(found, model(*example).detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_half_types_train_close_to_the_unsplit_model(method: str) -> None:
    torch.manual_seed(0)
    plan = "mesh cp=4\nprecision bf16\n" + BLOCKS.format(method)
    program = meshwright.compile(Gpt(), meshwright.Plan.parse(plan), example := tokens())
    expected = program.model(*example)
    torch.testing.assert_close(
        program.launch().step(*example), expected.detach(), rtol=0.01, atol=0
    )


LLAMA_LAYERS = "context model.layers.* over cp method={}\n"
LLAMA_TENSOR = """columns model.layers.*.self_attn.{q,k,v}_proj over tp
rows model.layers.*.self_attn.o_proj over tp
"""


@pytest.mark.parametrize("method", METHODS)
def test_llama_trains_as_on_one_device(method: str) -> None:
    torch.manual_seed(0)
    plan = "mesh cp=4\n" + LLAMA_LAYERS.format(method)
    program = check_equal(llama(), text, plan, tolerance=TOLERANCE, steps=1)
    assert implicit_gathers(program) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("selector", ["model.layers.*", "model.layers.*.self_attn"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tensor", ["cp=2", "cp=2, tp=2"])
def test_llama_trains_as_on_one_device_with_masks_and_split_heads(
    method: str, selector: str, masked: bool, tensor: str
) -> None:
    torch.manual_seed(0)
    plan = f"mesh {tensor}\ncontext {selector} over cp method={method}\n"
    plan += LLAMA_TENSOR if "tp" in tensor else ""
    program = check_equal(llama(), lambda: text(masked=masked), plan, tolerance=TOLERANCE)
    assert implicit_gathers(program) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_gpt2_trains_as_on_one_device(method: str, ranks: int) -> None:
    ranks = min(ranks, 4) if method == "ulysses" else ranks  # it has four heads
    torch.manual_seed(0)
    plan = f"mesh cp={ranks}\ncontext transformer.h.* over cp method={method}\n"
    program = check_equal(gpt2(), lambda: text(masked=True), plan, tolerance=TOLERANCE)
    assert implicit_gathers(program) == []
