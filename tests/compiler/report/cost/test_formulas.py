"""Formulas of what a step sends, computes and holds: they give what is counted, at any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from meshwright.compiler.composites import panels
from meshwright.compiler.costs.volume import log2
from meshwright.compiler.report.assumed import operations
from meshwright.compiler.report.cost.cost import PARTS, Cost
from meshwright.compiler.schedules.actions import actions_of
from tests.models import GPT_DATA, GPT_TENSOR, Gpt

Golden = Callable[[str, str], None]
NAMES = {
    "wte": "[v, h]", "wpe": "[c, h]", "blocks.*.up": "[f, h]", "blocks.*.proj": "[h, h]",
}  # fmt: skip
HEADS = {**NAMES, "heads": 4, "blocks.*.proj": "[h, (heads hd)]"}
"""Where the plan says nothing of heads."""
TENSOR = f"let heads = {{heads}}\n{GPT_DATA}{GPT_TENSOR}"
PLANS = {
    "data": f"mesh dp={{dp}}\n{GPT_DATA}",
    "tensor": f"mesh dp={{dp}}, tp={{tp}}\n{TENSOR}",
    "sequence": f"mesh dp={{dp}}, tp={{tp}}\n{TENSOR}"
    "vocab wte, head over tp\nsequence blocks.* over tp\n",
    "zero1": f"mesh dp={{dp}}, tp={{tp}}\n{TENSOR}zero 1 over dp\n",
    "zero2": f"mesh dp={{dp}}, tp={{tp}}\n{TENSOR}zero 2 over dp\naccumulate {{micro}}\n",
    "zero3": f"mesh dp={{dp}}, tp={{tp}}\n{TENSOR}zero 3 over dp\naccumulate {{micro}}\n",
    "checkpoint": f"mesh dp={{dp}}, tp={{tp}}\n{TENSOR}checkpoint blocks.*\n",
    "stages": f"mesh dp={{dp}}, tp={{tp}}, pp=2\n{TENSOR}"
    "stages at blocks.{half} over pp microbatches={micro}\n",
}
SMALL = {"v": 48, "h": 24, "heads": 4, "layers": 4, "b": 8, "s": 4, "dp": 2, "tp": 2, "micro": 2}
LARGE = {"v": 80, "h": 64, "heads": 8, "layers": 6, "b": 48, "s": 8, "dp": 4, "tp": 4, "micro": 3}
SLOW = [
    pytest.param(each, marks=pytest.mark.slow) for each in PLANS if each[:4] in ("zero", "chec")
]
FAST = [each for each in PLANS if each[:4] not in ("zero", "chec")]


def compiled(plan: str, sizes: Mapping[str, int]) -> mw.Program:
    torch.manual_seed(0)
    model = Gpt(sizes["v"], sizes["h"], sizes["heads"], layers=sizes["layers"])
    tokens = torch.zeros(sizes["b"], sizes["s"], dtype=torch.long)
    text = PLANS[plan].format(**sizes, half=sizes["layers"] // 2)
    return mw.compile(model, mw.Plan.parse(text), (tokens, tokens), device="cpu")


@cache
def small(plan: str) -> tuple[mw.Program, Cost]:
    program = compiled(plan, {**SMALL, "layers": 6} if plan == "stages" else SMALL)
    return program, program.cost(names=HEADS if plan == "data" else NAMES)


def values(sizes: Mapping[str, int]) -> dict[str, int]:
    return {**sizes, "f": 4 * sizes["h"], "hd": sizes["h"] // sizes["heads"], "c": 8, "pp": 2}


def computed(program: mw.Program, place: str) -> int:
    rank = next(r for r in range(program.mesh.num_ranks) if program.place(r) == place)
    actions = actions_of(program.entries[rank])
    return sum(operations(program.stages[each.stage], each.kind) for each in actions)


@pytest.mark.parametrize("plan", [*FAST, *SLOW])
def test_formulas_give_what_is_counted(plan: str) -> None:
    program, cost = small(plan)
    memory = program.memories()
    for place, comm in program.comm().by_place().items():
        assert cost.sent(place=place).number == comm.total_bytes()
        for axes, size in comm.bytes_by_axis().items():
            found = cost.sent(axes=axes, place=place)
            assert found.number == found.at(cost.values) == size
        flops = cost.flops(place=place)
        assert flops.number == flops.at(cost.values) == computed(program, place)
        for part in PARTS:
            formula = cost.memory(part, place=place)
            assert formula.number == formula.at(cost.values) == getattr(memory[place], part)


@pytest.mark.parametrize("plan", [*FAST, *SLOW])
def test_formulas_give_what_is_counted_at_another_size(plan: str) -> None:
    """Of the peak that holds only where kernels need nothing inside themselves, and of a pipeline
    where a rank has as many microbatches at once."""
    _, cost = small(plan)
    large = {**LARGE, "layers": 8, "micro": 2} if plan == "stages" else LARGE
    larger = compiled(plan, large)
    memory, sizes = larger.memories(), values(large)
    for place, comm in larger.comm().by_place().items():
        assert cost.sent(place=place).at(sizes) == comm.total_bytes()
        assert cost.flops(place=place).at(sizes) == computed(larger, place)
        for part in PARTS[:-1]:
            assert cost.memory(part, place=place).at(sizes) == getattr(memory[place], part), part


@pytest.mark.parametrize("plan", ["sequence", "stages"])
def test_the_formulas_of_a_program_have_a_golden_text(plan: str, golden: Golden) -> None:
    _, cost = small(plan)
    golden(f"formulas-{plan}", f"{cost}\n\n{cost!r}")


def symbols(names: str) -> tuple[sympy.Symbol, ...]:
    found: tuple[sympy.Symbol, ...] = sympy.symbols(names, positive=True, integer=True)
    return found


def test_tensor_parallelism_sends_and_computes_what_megatron_says() -> None:
    """Forward, for each layer and rank: 4 (p-1)/p b s h elements, and 24 b s h^2 + 4 b s^2 h
    operations over p; backward twice of both, and 10 b s^2 h for attention, which computes its
    scores again (shared with Optimus, arXiv 2104.05343)."""
    _, cost = small("tensor")
    b, s, h, f, layers, dp, tp = symbols("b s h f layers dp tp")
    own = b * s / dp
    forward = cost.sent(phase="forward", axes="tp", module="blocks.*").expr
    assert sympy.simplify(forward - 4 * layers * 4 * (tp - 1) / tp * own * h) == 0
    backward = cost.sent(phase="backward", axes="tp", module="blocks.*").expr
    assert sympy.simplify(backward - forward) == 0
    flops = cost.flops(phase="forward", module="blocks.*").expr.subs(f, 4 * h)
    assert sympy.simplify(flops - layers * own * (24 * h**2 + 4 * s * h) / tp) == 0
    flops = cost.flops(phase="backward", module="blocks.*").expr.subs(f, 4 * h)
    assert sympy.simplify(flops - layers * own * (48 * h**2 + 10 * s * h) / tp) == 0


def test_a_convention_changes_the_formulas() -> None:
    program, pipelined = small("tensor")
    tree = program.cost(names=NAMES, convention="tree")
    tp = symbols("tp,")[0]
    ratio = tree.sent(axes="tp").expr / pipelined.sent(axes="tp").expr
    assert sympy.simplify(ratio - log2(tp) * tp / (tp - 1)) == 0
    assert "collectives tree" in str(tree)


def test_sizes_that_are_equal_by_chance_stay_apart() -> None:
    """All of h, hd, s, v and c are 8."""
    equal = compiled("data", {**SMALL, "v": 8, "h": 8, "heads": 1, "s": 8})
    larger = compiled("data", LARGE)
    cost = equal.cost(names={**NAMES, "blocks.*.up": "[(4 h), h]"})
    assert cost.sent().at(values(LARGE)) == larger.comm().total_bytes()
    assert cost.memory("parameters").at(values(LARGE)) == larger.memory().parameters
    without = equal.cost(names={"wte": "[v, h]"}).memory("parameters")
    assert without.expr.free_symbols == set(symbols("v h layers"))


class Rotary(nn.Module):
    """Two key heads for four of queries, positions by halves, and labels one token on."""

    def __init__(self, h: int = 16, vocab: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.wte = heads, nn.Embedding(vocab, h)
        self.q, self.kv = nn.Linear(h, h), nn.Linear(h, h)
        self.head = nn.Linear(h, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads // 2, -1)).permute(2, 0, 3, 1, 4)
        half = q.shape[-1] // 2
        q = q * 2 + torch.cat((-q[..., half:], q[..., :half]), -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        logits = self.head(y.transpose(1, 2).flatten(2))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def rotary(h: int, heads: int, b: int, s: int, dp: int) -> mw.Program:
    tokens = torch.zeros(b, s, dtype=torch.long)
    plan = mw.Plan.parse(f"mesh dp={dp}\ndata tokens over dp\n")
    return mw.compile(Rotary(h, heads=heads), plan, (tokens,), device="cpu")


def test_names_follow_through_halves_shifts_and_grouped_heads() -> None:
    names = {"q": "[(n d), h]", "wte": "[v, h]", "kv": "[(2 g d), h]", "head": "[v, h]"}
    cost = rotary(16, 4, 4, 6, 2).cost(names={**names, "n": 4})
    larger = rotary(48, 6, 12, 5, 4)
    sizes = {"h": 48, "n": 6, "d": 8, "g": 3, "b": 12, "s": 5, "v": 24, "dp": 4}
    assert cost.sent().at(sizes) == larger.comm().total_bytes()
    assert cost.flops().at(sizes) == computed(larger, "")
    assert cost.memory("activations").at(sizes) == larger.memory().activations


GRID = """mesh row={q}, col={q}
data tokens, targets over row
summa ** over (row, col)
summa blocks.*.qkv over (row, col) as (3 heads hd)
"""


def on_a_grid(q: int, sizes: Mapping[str, int]) -> mw.Program:
    torch.manual_seed(0)
    model = Gpt(sizes["v"], sizes["h"], sizes["heads"], layers=sizes["layers"])
    tokens = torch.zeros(sizes["b"], sizes["s"], dtype=torch.long)
    return mw.compile(model, mw.Plan.parse(GRID.format(q=q)), (tokens, tokens), device="cpu")


@pytest.fixture
def in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is small: panels come one after the other, as those of large models do."""
    monkeypatch.setattr(panels, "SMALL_BYTES", 0)


@pytest.mark.slow
@pytest.mark.usefixtures("in_steps")
def test_products_in_blocks_have_as_many_steps_as_there_are_ranks() -> None:
    names = {**NAMES, "blocks.*.up": "[(4 h), h]", "heads": 4}
    cost = on_a_grid(2, {**SMALL, "layers": 3}).cost(names=names)
    larger = on_a_grid(4, {**LARGE, "heads": 4})
    sizes, memory = {**values({**LARGE, "heads": 4}), "row": 4, "col": 4}, larger.memory()
    own = larger.cost(names={**names, "heads": 4}).sent(module="blocks.*")
    assert cost.sent(module="blocks.*").at(sizes) == own.number
    assert cost.flops().at(sizes) == computed(larger, "")
    for part in PARTS[:-1]:
        assert cost.memory(part).at(sizes) == getattr(memory, part), part


@pytest.mark.usefixtures("in_steps")
def test_a_linear_in_blocks_sends_what_its_rounds_of_broadcasts_do() -> None:
    """Of weights of S elements pipelined ((q-1)/q^2) S by the ranks of a column, by trees
    (log2 q / q) S (Optimus, arXiv 2104.05343)."""
    program = on_a_grid(2, SMALL)
    names = {**NAMES, "blocks.*.up": "[(4 h), h]", "heads": 4}
    h, layers, row, col = symbols("h layers row col")
    up = {"phase": "forward", "axes": "row", "module": "blocks.*.up"}
    weights = 4 * 4 * h**2 * layers / col
    for convention, share in (("pipelined", (row - 1) / row), ("tree", log2(row))):
        found = program.cost(names=names, convention=convention).sent(**up).expr
        assert sympy.simplify(found - weights * share) == 0


WRONG = {
    "two-sizes": {"wte": "[v, h]", "blocks.*.up": "[h, h]"},
    "axis": {"wte": "[v, tp]"},
    "undetermined": {"blocks.*.qkv": "[(x y z), h]"},
    "factors": {"wte": "[v, h]", "blocks.*.up": "[(5 h), h]"},
    "dims": {"wte": "[v]"},
    "nothing": {"tokens2": "[b, s]"},
    "text": {"wte": "[v, h"},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_names_are_errors_in_words(name: str, golden: Golden) -> None:
    program, _ = small("tensor")
    with pytest.raises(mw.MeshwrightError) as error:
        program.cost(names=WRONG[name])
    golden(f"names-{name}", str(error.value))


def test_an_unknown_part_or_place_is_an_error(golden: Golden) -> None:
    _, cost = small("stages")
    texts = []
    for call in (lambda: cost.memory("parameter"), lambda: cost.sent(place="pp=2")):
        with pytest.raises(mw.MeshwrightError) as error:
            call()
        texts.append(str(error.value))
    golden("formulas-unknown", "\n".join(texts))
