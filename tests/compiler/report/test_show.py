"""What `show` and `explain` print."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable
from functools import cache
from random import Random

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from meshwright.compiler.graph.names import fold
from meshwright.compiler.graph.text import size_text, spelt
from meshwright.compiler.report.show import show, show_text
from meshwright.compiler.report.timeline import timeline_data
from meshwright.dsl.selectors import Selector
from tests.models import GPT_DATA, Gpt, tokens

PLAN = """\
mesh     dp=2, tp=2
data     tokens, targets over dp
columns  blocks.*.up     over tp
rows     blocks.*.down   over tp
vocab    wte, head       over tp
allow    replicate blocks.*
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """A vocabulary of 7 does not divide over two ranks: it is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.wte.weight
        self.blocks[0].norm.bias.requires_grad_(False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


class Sorting(nn.Module):
    """Sorting a split dim needs all of it: a gather that nobody asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (self.up(x).sort(-1).values * torch.arange(16.0)).sum()


@cache
def program() -> mw.Program:
    tokens = torch.zeros(4, 6, dtype=torch.int64)
    return mw.compile(Model(), mw.Plan.parse(PLAN, "small.plan"), (tokens, tokens), device="cpu")


def test_show_prints_layouts_collectives_lines_and_memory(
    golden: Callable[[str, str], None],
) -> None:
    golden("show", show_text(program()))


def test_show_with_local_prints_the_shapes_of_one_rank(golden: Callable[[str, str], None]) -> None:
    golden("show_local", show_text(program(), local=True))


class Deep(nn.Module):
    """Names as deep as Hugging Face's, and several modules in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.ModuleDict(self.parts()) for _ in range(3))}
        )

    @staticmethod
    def parts() -> dict[str, nn.Module]:
        attention = {f"{name}_projection": nn.Linear(8, 8) for name in ("query", "key", "output")}
        norms = {"post_attention_layernorm": nn.LayerNorm(8)}
        return {"self_attention": nn.ModuleDict(attention), **norms}

    def forward(self, inputs_of_the_batch: Tensor) -> Tensor:
        x = inputs_of_the_batch
        for layer in self.model["layers"]:
            attention = layer["self_attention"]
            x = layer["post_attention_layernorm"](x)
            y = attention["query_projection"](x) * attention["key_projection"](x)
            x = x + attention["output_projection"](y)
        return x.square().mean()


@cache
def deep() -> mw.Program:
    plan = """mesh dp=2, tp=2
    data inputs_of_the_batch over dp
    columns model.layers.*.self_attention.{query,key}_projection over tp
    rows model.layers.*.self_attention.output_projection over tp
    """
    plan = "\n".join(line.strip() for line in plan.splitlines())
    return mw.compile(Deep(), mw.Plan.parse(plan, "deep.plan"), (torch.zeros(4, 8),), device="cpu")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_show_fits_the_terminal_and_breaks_no_name(width: int) -> None:
    text = show_text(deep(), width=width)
    names = re.compile(r"\w*(?:_\w+)+")
    whole = set(names.findall(show_text(deep(), width=1000)))
    assert set(names.findall(text)) == whole
    assert max(map(len, text.splitlines())) <= max(width, 76)


def test_show_keeps_to_the_width_of_a_console_in_colour_and_without() -> None:
    for width in (80, 120):
        for colour in (None, "truecolor"):
            file = io.StringIO()
            console = Console(
                file=file, width=width, color_system=colour, force_terminal=bool(colour)
            )
            show(deep(), console=console)
            text = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
            assert max(len(line.rstrip()) for line in text.splitlines()) <= width
            assert text.rstrip().endswith(show_text(deep(), width=width)[-40:].strip()[-20:])


def test_a_stream_without_unicode_gets_what_it_can_spell() -> None:
    assert spelt("3·64 …", "ascii") == "3*64 ..."
    assert spelt("┌│└", "ascii") == "+|+"
    assert spelt("3·64 …", "latin-1") == "3*64 ..."
    assert spelt("3·64 …", "utf-8") == "3·64 …"
    assert spelt("ö", "ascii") == "\\xf6"
    data = io.BytesIO()
    plan = mw.Plan.parse(PLAN, "größe.plan")
    tokens = torch.zeros(4, 6, dtype=torch.int64)
    compiled = mw.compile(Model(), plan, (tokens, tokens), device="cpu")
    stream = io.TextIOWrapper(data, "ascii", write_through=True)
    show(compiled, console=Console(file=stream))
    assert b"Model under gr\\xf6\\xdfe.plan" in data.getvalue()


def test_show_names_gathers_that_no_line_asks_for(golden: Callable[[str, str], None]) -> None:
    plan = mw.Plan.parse("mesh tp=2\ncolumns up over tp\n", "sorting.plan")
    found = mw.compile(Sorting(), plan, (torch.zeros(4, 8),), device="cpu")
    golden("show_gathers", show_text(found))


@pytest.mark.parametrize("name", ["blocks.1.up", "head", "wte.weight", "tokens"])
def test_explain_names_statements_and_collectives(
    name: str, golden: Callable[[str, str], None]
) -> None:
    golden(f"explain_{name.replace('.', '_')}", str(program().explain(name)))


def test_explain_of_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(mw.PlanError, match=r"write `blocks\.1\.up`"):
        program().explain("blocks.1.upp")


def test_the_data_of_a_program_agrees_with_its_ledger() -> None:
    data = json.loads(json.dumps(program().to_json()))
    comm = program().comm()
    assert sum(row["count"] for row in data["traffic"]) == len(comm) == len(data["collectives"])
    assert sum(row["bytes"] for row in data["traffic"]) == comm.total_bytes()
    assert (
        sum(row["bytes"] for row in data["held"] if row["kind"] == "parameter")
        == (data["memory"]["parameters"])
    )


def test_two_compilations_print_the_same() -> None:
    program.cache_clear()
    first = show_text(program())
    program.cache_clear()
    assert show_text(program()) == first


def test_names_fold_to_selectors_that_match_them() -> None:
    layers = [f"blocks.{i}.up" for i in range(4)]
    assert fold(layers, layers) == {"blocks.*.up": layers}
    assert fold(layers[1:3], layers) == {"blocks.[1:3].up": layers[1:3]}
    assert fold([layers[0], layers[3]], layers) == {"blocks.{0,3}.up": [layers[0], layers[3]]}
    assert fold([layers[2], "head"], [*layers, "head"]) == {
        "blocks.2.up": [layers[2]],
        "head": ["head"],
    }


def test_a_selector_matches_no_name_that_it_does_not_stand_for() -> None:
    """A product of two sets of numbers would match the one name that is laid out otherwise."""
    known = [f"stages.{i}.layer.{j}" for i in range(3) for j in range(2)]
    assert fold(known[1:], known) == {
        "stages.0.layer.1": known[1:2],
        "stages.[1:3].layer.[0:2]": known[2:],
    }
    random = Random(0)
    for _ in range(200):
        names = random.sample(known, random.randint(1, len(known)))
        folded = fold(names, known)
        assert sorted(itertools.chain(*folded.values())) == sorted(names)
        for selector, group in folded.items():
            assert Selector(selector).match(known) == sorted(group)


def test_sizes_read_as_a_person_writes_them() -> None:
    sizes = [0, 1023, 1536, 200 << 10, 3 << 40, 5000 << 40]
    texts = ["0 B", "1023 B", "1.5 KiB", "200 KiB", "3.0 TiB", "5000 TiB"]
    assert [size_text(size) for size in sizes] == texts


@pytest.mark.parametrize("name", ["", "blocks", "blocks.0"])
def test_explain_of_a_container_sums_what_is_inside(
    name: str, golden: Callable[[str, str], None]
) -> None:
    golden(f"explain_sums_{name.replace('.', '_')}", str(program().explain(name)))


def test_the_sums_of_a_model_are_those_of_the_ledger_and_the_memory() -> None:
    for compiled in (program(), deep()):
        found, memory, comm = compiled.explain("").whole, compiled.memory(), compiled.comm()
        assert found is not None
        assert (found.sent, found.collectives) == (comm.total_bytes(), len(comm))
        held = (found.parameters, found.buffers, found.gradients, found.optimizer, found.saved)
        assert held == (
            *(memory.parameters, memory.buffers, memory.gradients),
            *(memory.optimizer, memory.activations),
        )


def test_the_modules_inside_sum_up_to_the_whole() -> None:
    """Where no parameter is tied and nothing happens between the modules."""
    for name in ("model", "model.layers", "model.layers.1.self_attention"):
        found = deep().explain(name)
        assert found.whole is not None
        for field in ("num_parameters", "parameters", "gradients", "optimizer"):
            parts = sum(getattr(part, field) for part in found.children)
            assert parts == getattr(found.whole, field), (name, field)
        assert sum(part.sent for part in found.children) == pytest.approx(found.whole.sent, abs=6)
        assert sum(each.bytes for each in found.sums) == found.whole.sent
        # Of the sums for gradients of several modules none is inside one.
        apart = sum(each.count for each in found.sums if each.phase == "gradients")
        assert apart > 0
        assert found.whole.collectives == sum(each.count for each in found.sums) - apart


class Empty(nn.Module):
    """A parameter of no elements, alone in its bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.none = nn.Linear(8, 4), nn.Parameter(torch.zeros(0, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).square().mean() + self.none.sum()


def test_a_parameter_of_no_elements_has_no_share_of_what_is_sent() -> None:
    plan = mw.Plan.parse("mesh dp=2\ndata x over dp\n")
    found = mw.compile(Empty(), plan, (torch.zeros(4, 8),), device="cpu").explain("")
    gradients = [each for each in found.sums if each.phase == "gradients"]
    assert [each.bytes for each in gradients] == [(8 * 4 + 4) * 4]


def test_equal_modules_inside_are_named_together_and_the_largest_first() -> None:
    (layers,) = deep().explain("model.layers").children
    assert (layers.name, layers.kind, layers.count) == ("model.layers.*", "ModuleDict", 3)
    children = deep().explain("model.layers.0.self_attention").children
    assert [part.sent for part in children] == sorted((p.sent for p in children), reverse=True)


class Twice(nn.Module):
    """One linear under two names, which is called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))).sum()


def test_explain_knows_every_name_of_what_has_two() -> None:
    plan = mw.Plan.parse("mesh dp=2\ndata x over dp\n", "twice.plan")
    found = mw.compile(Twice(), plan, (torch.zeros(4, 8),), device="cpu")
    assert str(found.explain("second")).startswith("second (Linear, the same as first)\n")
    assert found.explain("second").tensors == found.explain("first").tensors
    assert "head.weight (tensor, the same as wte.weight)" in str(program().explain("head.weight"))
    with pytest.raises(mw.PlanError, match=r"write `head\.weight`"):
        program().explain("head.wieght")


def test_a_pipeline_is_shown_with_its_stages_and_the_moves_of_its_timeline(
    golden: Callable[[str, str], None],
) -> None:
    """Stages 1 and 2 are on one rank, and hand over; when `zero` gathers is the compiler's word."""
    plan = mw.Plan.parse(
        f"mesh dp=2, pp=2\n{GPT_DATA}zero 2 over dp\n"
        "stages at blocks.0, blocks.1, ln over pp schedule=zbv virtual=2 microbatches=4\n"
    )
    found = mw.compile(Gpt(), plan, tokens(), device="cpu")
    golden("show_stages", show_text(found))
    moves = [line for line in found.timeline().splitlines() if "stage" in line]
    golden("timeline_stages", "\n".join(moves))
    data = timeline_data(found)
    assert [each["stage"] for each in data["stage1.forward"] if "stage" in each] == [0, 2]
