"""Graphs as text: one node per line, global shapes with `@axis`, the module as a trailing comment.

Layers that are equal print once. Lines longer than `WIDTH` are broken under their operator, and
numbers are written as a person writes them; `exact_text` of a graph does neither.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from meshwright.compiler.graph.ir import GETITEM, INPUT, Arg, Graph, MeshOp, Node
from meshwright.compiler.graph.text import arg_text, arg_texts, call_text, node_type_text, op_text
from meshwright.compiler.graph.transfers import counted, moves, transfer_key
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.report.folding import Folded, Line, Repeat, fold_lines
from meshwright.dsl.errors import plural
from meshwright.dsl.writing.html import html_table

aten = torch.ops.aten

WIDTH = 100
"""Columns of a line."""
_WIDEST = 64
"""The most columns that names and types are padded to."""
_MOST = 16
"""How many items of a list print: of a longer one, the first and the last."""
_SLICES = {aten.slice.Tensor: 1, aten.slice_backward.default: 2, aten.slice_scatter.default: 2}
"""The position of the dim among the arguments; a start, an end and a step follow it."""
_LIMITS = {torch.iinfo(torch.int64).max: "i64.max", torch.iinfo(torch.int64).min: "i64.min"}
_FLOAT_LIMITS = {
    sign * torch.finfo(dtype).max: f"{'-' * (sign < 0)}{name}.max"
    for name, dtype in (
        ("f64", torch.float64),
        ("f32", torch.float32),
        ("bf16", torch.bfloat16),
        ("f16", torch.float16),
    )
    for sign in (1, -1)
}


@dataclass(frozen=True, slots=True)
class GraphText:
    """A graph that prints as text, equal layers once. `graph` is the `Graph` itself."""

    graph: Graph

    def text(self, *, local: bool = False, full: bool = False) -> str:
        """The text of the graph, with global shapes and equal layers once.

        With `local`, shapes are those that one rank holds; with `full`, every layer prints.
        """
        return graph_text(self.graph, local=local, full=full)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return repr(self.graph)

    def _repr_html_(self) -> str:
        return graph_html(self.graph)


def graph_text(graph: Graph, *, local: bool = False, full: bool = False) -> str:
    """The text of a graph, equal layers once or, with `full`, all of them.

    The same program always has the same text. With `local`, shapes are those that one rank holds.
    """
    lines: tuple[Folded, ...] = (*graph.nodes, *graph.outputs)
    if not full:
        lines = fold_lines(graph)
    printer = _Printer(graph, local, full)
    return "\n".join(printer.text(lines))


def graph_html(graph: Graph) -> str:
    """A graph as a table of a notebook: name, type, operator and module; equal layers once."""
    rows = [
        (row.strip(),) if isinstance(row, str) else (*row.head.split(": ", 1), row.call, row.module)
        for row in _Printer(graph, local=False, full=False).rows(fold_lines(graph))
    ]
    title = f"graph {graph.name}  mesh {graph.mesh}"
    return html_table(("name", "type", "operator", "module"), rows, title=title)


@dataclass(frozen=True, slots=True)
class _Row:
    """A node's line before it is laid out: `head = call  # module`."""

    head: str
    call: str
    module: str

    @property
    def tail(self) -> str:
        return f"{self.call}  # {self.module}" if self.module else self.call


class _Printer:
    def __init__(self, graph: Graph, local: bool, full: bool) -> None:
        self.graph, self.local, self.full = graph, local, full

    def text(self, lines: Sequence[Folded]) -> Iterator[str]:
        yield f"graph {self.graph.name}  mesh {self.graph.mesh}"
        rows = list(self.rows(lines))
        width = _head_width([row for row in rows if isinstance(row, _Row)])
        for row in rows:
            yield from [row] if isinstance(row, str) else _laid_out(row, width, self.full)

    def rows(self, lines: Sequence[Folded]) -> Iterator[_Row | str]:
        for line in lines:
            if isinstance(line, Node):
                head = f"{line.name}: {node_type_text(line, self.graph, local=self.local)}"
                yield _Row(head, _call(line, self.full), line.origin.module)
            elif isinstance(line, Repeat):
                yield from self.rows(line.first)
                yield from _wrapped(f"  … {_repeat_text(line)}", "    ")
            elif isinstance(line, str):
                yield f"  … {line}"
            else:
                yield from _wrapped(f"  return {line.label} = {line.node.name}", "      ")


# -- the shape of lines ------------------------------------------------------------------------


def _head_width(rows: Sequence[_Row]) -> int:
    """The width that names and types are padded to: the widest if all lines fit then, else the one
    with which most do."""
    sizes = [(len(row.head), len(row.tail)) for row in rows]
    widest = max((head for head, _ in sizes), default=0)
    room = WIDTH - len("   = ")

    def broken(width: int) -> int:
        return sum(head > width or width + tail > room for head, tail in sizes)

    if widest <= _WIDEST and not broken(widest):
        return widest
    return min(range(24, min(widest, _WIDEST) + 1, 2), key=broken, default=widest)


def _laid_out(row: _Row, width: int, full: bool) -> Iterator[str]:
    """The lines of a row: heads are padded to `width`, and what does not fit goes under the
    operator."""
    before = f"  {row.head:<{width}} = "
    if len(before) + len(row.tail) <= WIDTH and len(row.head) <= width:
        yield before + row.tail
        return
    if len(row.head) > width:
        yield from _wrapped(f"  {row.head}", "      ")
        before = " " * (width + 2) + " = "
        if len(before) + max(map(len, row.call.split())) > WIDTH:
            before = "      = "
    under = " " * len(before)
    *lines, last = _wrapped(before + row.call, f"{under}  ")
    yield from lines
    comment = _comment(row.module, WIDTH - len(last), full)
    if len(last) + len(comment) <= WIDTH:
        yield last + comment
    else:
        yield last
        yield f"{under}{comment}"


def _comment(module: str, room: int, full: bool) -> str:
    """`  # encoder.block.0.ln`; where that does not fit, and unless `full`, `  # …ln`."""
    comment = f"  # {module}" if module else ""
    if full or len(comment) <= room:
        return comment
    parts = module.split(".")
    starts = (i for i in range(1, len(parts)) if not parts[i].isdecimal())
    shorter = (f"  # …{'.'.join(parts[i:])}" for i in starts)
    return next((each for each in shorter if len(each) <= room), comment)


def _wrapped(line: str, indent: str) -> list[str]:
    """A line broken at blanks; it keeps its indent, and the lines after it begin with `indent`."""
    start = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line.lstrip(),
        WIDTH,
        initial_indent=start,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


# -- what stands for equal copies --------------------------------------------------------------


def _repeat_text(repeat: Repeat) -> str:
    """`blocks.1 to blocks.11: the same 27 nodes each, 2 all_gather[tp] each; ...`."""
    copy, each = repeat.others[0], " each" if len(repeat.others) > 1 else ""
    ends = dict.fromkeys((*repeat.paths[:1], *repeat.paths[-1:]))
    where = f"{' to '.join(ends)}: " if ends else ""
    times = "" if ends else f", {plural(len(repeat.others), 'time')} more"
    if abs(repeat.step) > 1 and each:
        each = f" for every {abs(repeat.step)} of them"
    text = f"{where}the same {plural(len(copy), _noun(copy))}{each}{times}"
    counts = [f"{count} {kind}" for kind, count in _collectives(copy).items()]
    found = [*counts, *_own(copy)]
    text += f", with {', '.join(found)}" if found else ""
    return text + "".join(f"; {value}" for value in _carried(repeat))


def _noun(copy: Sequence[Line]) -> str:
    nodes = [line for line in copy if isinstance(line, Node)]
    if len(nodes) == len(copy):
        return "input" if all(node.op == INPUT for node in nodes) else "node"
    return "line" if nodes else "output"


def _collectives(copy: Sequence[Line]) -> Counter[str]:
    """The collectives of one copy that move bytes, as `Comm.counts` has them."""
    nodes = {transfer_key(n): n for n in copy if isinstance(n, Node) and moves(n)}
    return Counter(f"{counted(node)}[{', '.join(node.kwargs['axes'])}]" for node in nodes.values())


def _own(copy: Sequence[Line]) -> Iterator[str]:
    """What differs from copy to copy, besides names."""
    if any(isinstance(line, Node) and line.op == MeshOp("saved") for line in copy):
        yield "saved values of its own"
    if any(_draws(line) for line in copy):
        yield "random numbers of its own"


def _draws(line: Line) -> bool:
    """Whether a line draws random numbers: the argument that numbers the draws is then above 0."""
    if not isinstance(line, Node):
        return False
    known = composite_of(line.op)
    return known is not None and known.number is not None and line.args[known.number] > 0


def _carried(repeat: Repeat) -> Iterator[str]:
    """How values go from copy to copy."""
    takes, gives = (
        ("the first takes", "the last gives") if repeat.others[1:] else ("takes", "gives")
    )
    for before, value, last in repeat.carried:
        yield f"{takes} {value.name} for {before.name}, {gives} {last.name}"


# -- arguments as a person writes them ---------------------------------------------------------


def _call(node: Node, full: bool) -> str:
    """The right-hand side of a node's line; unless `full`, long lists lose their middle."""
    if node.op in (INPUT, GETITEM):
        return call_text(node)
    dim = None if isinstance(node.op, MeshOp) else _SLICES.get(node.op)
    if dim is not None and not node.kwargs:
        return _slice_text(node, dim, full)
    parts = _shortened(arg_texts(node, partial(_spelt, full=full)), full)
    return f"{op_text(node.op)}({', '.join(parts)})"


def _slice_text(node: Node, dim: int, full: bool) -> str:
    """`x[:, 1:]`, or `slice_backward(grad, [8, 4], 1, 1:)`; `dim` is the position of the dim."""
    given = [*node.args, *(0, None, None, 1)[len(node.args) - dim :]]
    start, end, step = given[dim + 1 : dim + 4]
    part = f"{_bound(start or None)}:{_bound(end)}" + (f":{step}" if step != 1 else "")
    if node.op == aten.slice.Tensor:
        rank = len(given[0].tensor.shape)
        at = given[dim] % rank
        return f"{given[0].name}[{'..., ' if 2 < rank == at + 1 else ':, ' * at}{part}]"
    before = [_spelt(arg, full) for arg in given[: dim + 1]]
    return f"{op_text(node.op)}({', '.join([*before, part])})"


def _bound(index: int | None) -> str:
    """An end of a slice, or nothing where it is open."""
    return "" if index is None or index in _LIMITS else str(index)


def _spelt(arg: Arg, full: bool) -> str:
    """An argument; a float has nine digits, or a name if it is the largest of its type."""
    if isinstance(arg, (tuple, list)):
        return f"[{', '.join(_shortened([_spelt(item, full) for item in arg], full))}]"
    if isinstance(arg, float) and math.isfinite(arg):
        return _FLOAT_LIMITS.get(arg) or arg_text(float(f"{arg:.9g}"))
    if isinstance(arg, int) and not isinstance(arg, bool):
        return _LIMITS.get(arg, str(arg))
    return arg_text(arg)


def _shortened(items: list[str], full: bool) -> list[str]:
    """The items; of many, the first, how many are left out, and the last."""
    if full or len(items) <= _MOST:
        return items
    return [*items[: _MOST - 2], f"… {len(items) - _MOST + 1} more", items[-1]]
