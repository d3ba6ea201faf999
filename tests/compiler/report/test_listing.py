"""Graphs as text: equal layers print once, nothing that differs is folded, lines are short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from meshwright.compiler.graph.ir import INPUT, Graph, MeshOp, Node, TensorType
from meshwright.compiler.graph.transfers import moves
from meshwright.compiler.report.folding import LATER, Folded, Line, Repeat, fold_lines
from meshwright.compiler.report.listing import graph_text
from tests.models import GPT_DATA, GPT_TENSOR, Block, Gpt, tokens

PLAN = "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR


@cache
def gpt(layers: int = 4, p: float = 0.1) -> mw.Program:
    return compiled(Gpt(layers=layers, p=p))


def compiled(model: nn.Module, plan: str = PLAN) -> mw.Program:
    return mw.compile(model, mw.Plan.parse(plan), tokens(), device="cpu")


def flat(lines: Sequence[Folded]) -> Iterator[Line]:
    for line in lines:
        if isinstance(line, Repeat):
            yield from flat(line.first)
            for other in line.others:
                yield from other
        elif not isinstance(line, str):
            yield line


def hidden(graph: Graph) -> list[Line]:
    """The lines that a fold stands for."""
    repeats = [line for line in fold_lines(graph) if isinstance(line, Repeat)]
    return [line for each in repeats for other in each.others for line in other]


def folds(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("  … ")]


def test_equal_layers_print_once_and_full_prints_all(golden: Callable[[str, str], None]) -> None:
    program = gpt()
    golden("graph_folded", "\n\n".join(str(program.graph(name)) for name in program.graphs()))
    for graph in program.graphs().values():
        full = graph_text(graph, full=True)
        assert "…" not in full
        for node in graph.nodes:
            assert f"\n  {node.name}: " in full


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_text_of_twelve_layers_is_as_long_as_one_of_three(p: float) -> None:
    lengths = [
        [len(str(gpt(layers, p).graph(name)).splitlines()) for name in gpt(layers, p).graphs()]
        for layers in (3, 12)
    ]
    assert lengths[0] == pytest.approx(lengths[1], abs=8)


def test_every_line_is_in_the_folded_graph_once_and_in_its_order() -> None:
    for graph in gpt().graphs().values():
        assert list(flat(fold_lines(graph))) == [*graph.nodes, *graph.outputs]


def changed(node: Node) -> Iterator[tuple[str, Any]]:
    """Every field of a node with something else in it."""
    kept = node.args
    literals = [i for i, arg in enumerate(kept) if isinstance(arg, (int, float, str))]
    if node.op != INPUT:
        for i in literals:
            other = "other" if isinstance(kept[i], str) else kept[i] + 1000
            yield "args", (*kept[:i], other, *kept[i + 1 :])
    yield "kwargs", {**node.kwargs, "other": 1}
    yield "requires_grad", not node.requires_grad
    yield "origin", replace(node.origin, plan_line="other.plan:1")
    yield "origin", replace(node.origin, modules=(*node.origin.modules, ("x", "Other")))
    if isinstance(node.type, TensorType) and node.layout is not None:
        yield "type", TensorType(node.type.shape, torch.complex128)
        yield "layout", node.placed.add_varying(("other",))
    if moves(node):
        yield "kwargs", {**node.kwargs, "axes": ("other",)}


def test_no_layer_is_folded_that_differs_in_anything() -> None:
    """Each field of each line that is not printed is changed in turn, and the text says so."""
    for graph in gpt().graphs().values():
        whole = graph_text(graph)
        for node in hidden(graph)[::7]:
            if isinstance(node, Node):
                for name, value in changed(node):
                    kept = getattr(node, name)
                    setattr(node, name, value)
                    try:
                        assert graph_text(graph) != whole, (node, name, value)
                    finally:
                        setattr(node, name, kept)


def rewire(node: Any, args: tuple[Any, ...]) -> None:
    """Change a node in place, as no pass does."""
    node.args, node._operands = args, None


def test_no_layer_is_folded_whose_values_come_from_elsewhere() -> None:
    """An operand of a line that is not printed is another value of the same type and layout."""
    for graph in gpt().graphs().values():
        whole, seen = graph_text(graph), 0
        for node in hidden(graph)[::3]:
            if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
                continue
            operand, earlier = node.args[0], graph.nodes[: graph.nodes.index(node)]
            alike = [n for n in earlier if (n.type, n.layout) == (operand.type, operand.layout)]
            for other in [each for each in alike if each is not operand][-3:]:
                kept = node.args
                rewire(node, (other, *kept[1:]))
                try:
                    assert graph_text(graph) != whole, (node, operand, other)
                    seen += 1
                finally:
                    rewire(node, kept)
        assert seen > 20


class Skipping(Gpt):
    """Each block but the first sees what the first gave, not what the one before it gave."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = first = self.blocks[0](self.wte(tokens))
        for block in list(self.blocks)[1:]:
            x = x + block(first)
        return F.cross_entropy(self.head(self.ln(x)).flatten(0, 1), targets.flatten())


def test_blocks_that_are_wired_differently_print_whole() -> None:
    text = str(compiled(Skipping(layers=4)).graph("stage0.forward"))
    assert "  … blocks.1: the same 32 nodes" in text
    assert "  … blocks.3: the same 33 nodes" in text


class Lagging(Gpt):
    """Each block but the first adds what the one before it has found, the first its own."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x, before = self.wte(tokens), None
        for block in self.blocks:
            found = F.gelu(block.up(block.ln2(x)))
            x = x + block.down(found if before is None else before)
            before = found
        return F.cross_entropy(self.head(self.ln(x)).flatten(0, 1), targets.flatten())


def test_a_block_that_takes_its_own_value_is_not_one_that_takes_another() -> None:
    program = compiled(Lagging(layers=5), "mesh dp=2\n" + GPT_DATA)
    found = [text for text in folds(str(program.graph("stage0.forward"))) if "take" in text]
    assert found
    assert not any(text.startswith("… blocks.1") for text in found), found


def odd(change: Callable[[Gpt], None]) -> str:
    model = Gpt(layers=4)
    change(model)
    return str(compiled(model).graph("stage0.forward"))


def test_a_layer_that_differs_prints_whole_wherever_it_is() -> None:
    def eps(model: Gpt) -> None:
        model.blocks[3].ln1.eps = 1e-3

    def frozen(model: Gpt) -> None:
        model.blocks[0].up.weight.requires_grad_(False)

    def wider(model: Gpt) -> None:
        model.blocks[1].up, model.blocks[1].down = nn.Linear(24, 48), nn.Linear(48, 24)

    assert "blocks.1 to blocks.2: the same" in odd(eps)
    assert "blocks.2 to blocks.3: the same" in odd(frozen)
    assert "blocks.3: the same 32 nodes" in odd(wider)
    other = PLAN.replace("blocks.*.up over tp", "blocks.{0,1}.up over tp\nallow replicate blocks.*")
    text = str(
        compiled(Gpt(layers=4), other.replace("rows blocks.*.down over tp\n", "")).graph(
            "stage0.forward"
        )
    )
    assert "blocks.3: the same" in text
    assert "to blocks.3: the same" not in text


def test_copies_begin_where_a_module_does_if_that_folds_as_much() -> None:
    def first(model: Gpt) -> None:
        model.blocks[0].ln1.eps = 1e-3

    before, _, after = odd(first).partition("  … blocks.2 to blocks.3: the same 32 nodes each")
    assert before.splitlines()[-1].endswith("# blocks.1")
    assert "# ln\n" in "\n".join(after.splitlines()[:5]) + "\n"


class Universal(nn.Module):
    """One block that is called six times: nothing tells its calls apart."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.block = nn.Embedding(48, 24), Block(24, 4, 0.0)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens)
        for _ in range(6):
            x = self.block(x)
        return F.cross_entropy((x @ self.wte.weight.T).flatten(0, 1), targets.flatten())


def test_a_block_that_is_called_again_and_again_prints_once() -> None:
    plan = "mesh dp=2\n" + GPT_DATA
    text = str(compiled(Universal(), plan).graph("stage0.forward"))
    assert any("5 times more" in line for line in folds(text)), text


def test_no_line_is_longer_than_a_hundred_columns_and_equals_signs_are_in_one() -> None:
    for graph in gpt().graphs().values():
        for text in (
            graph_text(graph),
            graph_text(graph, full=True),
            graph_text(graph, local=True),
        ):
            lines = text.splitlines()
            assert max(map(len, lines)) <= 100
            assert (
                len(
                    {
                        line.index(" = ")
                        for line in lines
                        if " = " in line[:80] and "return" not in line
                    }
                )
                == 1
            )


class Slices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        picked = x[:, 1:] * 0.1 + x[:, :-1] * (0.1 + 0.2)
        strided = x[..., ::2].masked_fill(x[..., ::2] > 0, torch.finfo(torch.float32).min)
        return picked.sum() + strided.clamp(min=-3.5).sum()


def test_open_ends_and_numbers_read_as_a_person_writes_them() -> None:
    plan = mw.Plan.parse("mesh dp=2\ndata x over dp")
    graphs = mw.compile(Slices(), plan, (torch.zeros(4, 8),), mode="infer", device="cpu")
    text = str(graphs.graph("stage0.forward"))
    for said in ("x[:, 1:]", "x[:, :-1]", "x[:, ::2]", "0.3)", "-f32.max"):
        assert said in text, text
    assert "92233720368" not in text
    assert "0000000" not in text


def test_ninety_six_layers_print_in_seconds() -> None:
    graph = gpt(12, 0.0).graphs()["stage0.backward"]
    seconds = []
    for _ in range(8):
        began = time.process_time()
        graph_text(graph), graph_text(graph, full=True)
        seconds.append(time.process_time() - began)
    # Twelve layers eight times, half a second; a machine may be slow, and any one time long.
    assert 8 * min(seconds) < 2.5


def test_buckets_that_close_anywhere_do_not_hide_that_layers_are_equal() -> None:
    with torch.device("meta"):
        model, example = Gpt(d=576, layers=8), tokens()
    program = mw.compile(model, mw.Plan.parse(PLAN), example, device="cpu")
    graph = program.graphs()["stage0.backward"]
    text = graph_text(graph)
    folded = hidden(graph)
    before, _, after = text.partition(f"  … {LATER}\n")
    assert "… blocks.5 to blocks.0: the same" in before
    assert "bucket" not in before
    for node in graph.nodes:
        if node.op == MeshOp("bucket") or node.origin.module == "gradients":
            assert f"  {node.name}: " in after or node in folded
    nodes = [line for line in flat(fold_lines(graph)) if isinstance(line, Node)]
    assert sorted(nodes, key=id) == sorted(graph.nodes, key=id)
    assert LATER not in graph_text(graph, full=True)
