"""Values that a model's initialisation gives, computed for one region of a tensor at a time.

A region has, for each dim of a tensor, the global indices of the entries that a rank holds. Random
numbers are hashes of global indices, and most of the rest is elementwise, so a region of the result
follows from regions of what it is made of, and no rank holds more than its shard and one block. An
operator that mixes entries (the QR of `orthogonal_`, a `cumsum`) runs on whole tensors, and its
result is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.capture.initialisation import Initialisation
from meshwright.compiler.codegen.linking import RandomState, RankContext, bind
from meshwright.compiler.composites.random import Random
from meshwright.compiler.graph.ir import GETITEM, INPUT, InputKind, MeshOp, Node
from meshwright.compiler.graph.slots import call_operands, filled, slotted
from meshwright.compiler.kernels.hashing import RandomIndex
from meshwright.compiler.kernels.random import random
from meshwright.compiler.layout.extents import held_indices
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.rules.factories import filled_with
from meshwright.compiler.placing.rules.pointwise import POINTWISE, is_pointwise
from meshwright.compiler.program import Stored

aten = torch.ops.aten

_BLOCK = 1 << 20
"""Elements that are computed at a time."""

Region = tuple[Tensor, ...]
"""For each dim of a tensor, the global indices of some entries, in order."""
_EMPTY = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default}


@dataclass(frozen=True, slots=True)
class _Part:
    """How a region of a node is computed: the regions of other nodes that it is made of, of which
    None is the whole, and the function of their values."""

    reads: list[tuple[Node, Region | None]]
    compute: Callable[..., Any]


@dataclass
class InitialValues:
    """The values that a model's own initialisation gives its parameters and buffers."""

    initialisation: Initialisation
    seed: int
    device: torch.device
    _whole: dict[Node, Any] = field(default_factory=dict)
    """The results of operators that mix entries."""

    def __post_init__(self) -> None:
        self.nodes = {output.name: output.node for output in self.initialisation.graph.outputs}

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that the initialisation does not give a value, or only some entries."""
        return [name for name in names if name not in self.nodes or self._is_open(name)]

    def _is_open(self, name: str) -> bool:
        """Whether a value depends on memory that nothing has written to."""
        node = self.nodes[name]
        seen: set[Any] = set()
        stack: list[tuple[Node, Region | None]] = [(node, None)]
        while stack:
            node, region = stack.pop()
            key = node if region is None else (node, *(tuple(i.tolist()) for i in region))
            if key in seen:
                continue
            seen.add(key)
            if self._is_unwritten(node):
                return True
            stack += self._part(node, region).reads
        return False

    def _is_unwritten(self, node: Node) -> bool:
        return node.op in _EMPTY or (node.op == INPUT and node.args[0] != InputKind.CONSTANT)

    def fill(self, stored: Stored, out: Tensor, mesh: Mesh, coords: Mapping[str, int]) -> None:
        """Write the values of a tensor to the part that the rank at `coords` holds, and zeros to
        what storage adds."""
        shape, layout = stored.type.shape, stored.layout
        region = tuple(held_indices(shape, layout, stored.paddings, mesh, coords))
        places = [(indices >= 0).nonzero().view(-1) for indices in region]
        within = tuple(map(torch.index_select, region, [0] * len(region), places))
        if _sizes(within) != tuple(out.shape):
            out.zero_()
        for rows in _blocks(_sizes(within)):
            block = (within[0][rows], *within[1:]) if within else ()
            value = self._value(self.nodes[stored.name], block).to(out.device, out.dtype)
            for dim in reversed(range(1, len(within))):
                value = _spread(value, dim, places[dim], out.shape[dim])
            if within:
                out.index_copy_(0, places[0][rows].to(out.device), value)
            else:
                out.copy_(value)
        self._whole.clear()

    def _value(self, node: Node, region: Region | None) -> Any:
        """The values of a region; None is the whole."""
        parts: dict[tuple[Node, int], _Part] = {}
        values: dict[tuple[Node, int], Any] = {}
        stack = [(node, region)]
        while stack:
            key = stack[-1][0], id(stack[-1][1])
            part = parts.get(key) or parts.setdefault(key, self._part(*stack[-1]))
            needed = [read for read in part.reads if (read[0], id(read[1])) not in values]
            if needed and key not in values:
                stack += needed
                continue
            if key not in values:
                values[key] = part.compute(*(values[n, id(r)] for n, r in part.reads))
            stack.pop()
        return values[node, id(region)]

    # -- operators ----------------------------------------------------------------------------

    def _part(self, node: Node, region: Region | None) -> _Part:
        """How a region of a node is computed."""
        if node.op == INPUT:
            constant = self.initialisation.constants.get(node.args[1])
            return _Part([], lambda: _taken(constant, region))
        if node in self._whole:
            return _Part([], lambda: _taken(self._whole[node], region))
        if node.op != GETITEM and not isinstance(node.type, tuple):
            every = _every(node.tensor.shape) if region is None else region
            number = filled_with(node.op, node.args)
            if node.op == Random.op:
                return _Part([], lambda: self._random(node, every))
            if number is not None:
                return _Part([], lambda: self._full(node, every, number))
            if node.op in _MOVES:
                return _MOVES[node.op](node, every)
            if is_pointwise(node.op) or node.op in POINTWISE:
                return self._elementwise(node, every)
        if region is not None:
            return _Part([(node, None)], lambda value: _taken(value, region))
        return self._mixed(node)

    def _random(self, node: Node, region: Region) -> Tensor:
        _, shape, kind, dtype, op_id = node.args
        coords = tuple(_first_of(indices) for indices in region)
        # The number of the draw is 0: that of the first step is 1.
        index = RandomIndex(self.seed, 0, op_id, tuple(shape), coords)
        return random(_sizes(region), kind, index, dtype, self.device)

    def _full(self, node: Node, region: Region, number: float) -> Tensor:
        return torch.full(_sizes(region), number, dtype=node.tensor.dtype, device=self.device)

    def _elementwise(self, node: Node, region: Region) -> _Part:
        """Operands are broadcast; of some, only the shape counts."""
        row = POINTWISE.get(node.op)
        unread = row.shape_only if row is not None else ()
        operands = call_operands(node.args, node.kwargs)
        args, kwargs = slotted(node.args, node.kwargs)

        def compute(*values: Tensor) -> Any:
            given = iter(values)
            full = [
                torch.empty(_sizes(_broadcast(x, region)), dtype=x.tensor.dtype, device=self.device)
                if place in unread
                else next(given)
                for place, x in enumerate(operands)
            ]
            named = {key: filled(value, full) for key, value in kwargs}
            op: Any = node.op
            return op(*filled(args, full), **named)

        read = [x for place, x in enumerate(operands) if place not in unread]
        return _Part([(x, _broadcast(x, region)) for x in read], compute)

    def _mixed(self, node: Node) -> _Part:
        """An operator of which any entry may depend on any other: it is run once, on the whole."""
        operands = list(dict.fromkeys(node.operands()))

        def compute(*values: Any) -> Any:
            found = dict(zip(operands, values, strict=True))
            self._whole[node] = self._run(node, found)
            return self._whole[node]

        return _Part([(operand, None) for operand in operands], compute)

    def _run(self, node: Node, values: Mapping[Node, Any]) -> Any:
        if node.op == GETITEM:
            return values[node.args[0]][node.args[1]]
        if isinstance(node.op, MeshOp):
            context = RankContext(Mesh(()), {}, self.device, RandomState(self.seed), {})
            return bind(node, context)(*(values[operand] for operand in node.operands()))
        args, kwargs = slotted(node.args, node.kwargs)
        full = [values[x] for x in call_operands(node.args, node.kwargs)]
        return node.op(*filled(args, full), **{key: filled(value, full) for key, value in kwargs})


def _blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the first dim that cover it, of about `_BLOCK` elements each."""
    if not shape:
        yield slice(None)
        return
    step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _spread(value: Tensor, dim: int, places: Tensor, size: int) -> Tensor:
    """A tensor with its entries at these places of a longer dim, and zeros between them."""
    if len(places) == size:
        return value
    longer = value.new_zeros((*value.shape[:dim], size, *value.shape[dim + 1 :]))
    return longer.index_copy_(dim, places.to(value.device), value)


def _every(shape: Iterable[int]) -> Region:
    return tuple(torch.arange(size) for size in shape)


def _sizes(region: Region) -> tuple[int, ...]:
    return tuple(map(len, region))


def _first_of(indices: Tensor) -> Tensor | int:
    """Consecutive indices by the first alone."""
    first = int(indices[0]) if len(indices) else 0
    consecutive = torch.equal(indices, torch.arange(first, first + len(indices)))
    return first if consecutive else indices


def _taken(value: Any, region: Region | None) -> Any:
    """The entries of a whole tensor that are in a region."""
    for dim, indices in enumerate(region or ()):
        if not torch.equal(indices, torch.arange(value.shape[dim])):
            value = value.index_select(dim, indices.to(value.device))
    return value


def _broadcast(operand: Node, region: Region) -> Region:
    """The region of an operand that is broadcast to the shape of a region's tensor."""
    shape = operand.tensor.shape
    last = region[len(region) - len(shape) :]
    if all(size != 1 or (len(i) == 1 and not i[0]) for size, i in zip(shape, last, strict=True)):
        return last if len(last) < len(region) else region
    return tuple(
        torch.zeros(1, dtype=torch.int64) if size == 1 else indices
        for size, indices in zip(shape, last, strict=True)
    )


# -- operators that move entries -------------------------------------------------------------------


def _expand(node: Node, region: Region) -> _Part:
    x = node.args[0]
    return _Part([(x, _broadcast(x, region))], lambda value: value.expand(_sizes(region)))


def _permute(node: Node, region: Region) -> _Part:
    x, rank = node.args[0], len(region)
    order = list(range(rank))
    if node.op == aten.permute.default:
        order = [dim % rank for dim in node.args[1]]
    elif rank > 1:
        a, b = (dim % rank for dim in node.args[1:]) if len(node.args) > 1 else (0, 1)
        order[a], order[b] = order[b], order[a]
    before = tuple(region[order.index(dim)] for dim in range(rank))
    return _Part([(x, before)], lambda value: value.permute(order))


def _unsqueeze(node: Node, region: Region) -> _Part:
    dim = node.args[1] % len(region)
    before = (*region[:dim], *region[dim + 1 :])
    return _Part([(node.args[0], before)], lambda value: value.unsqueeze(dim))


def _select(node: Node, region: Region) -> _Part:
    x, dim, index = node.args
    dim, index = dim % (len(region) + 1), index % x.tensor.shape[dim]
    before = (*region[:dim], torch.tensor([index]), *region[dim:])
    return _Part([(x, before)], lambda value: value.squeeze(dim))


def _slice(node: Node, region: Region) -> _Part:
    x, dim, positions = _sliced(node.args, node.args[0])
    before = (*region[:dim], positions[region[dim]], *region[dim + 1 :])
    return _Part([(x, before)], lambda value: value)


def _sliced(args: Sequence[Any], whole: Node) -> tuple[Node, int, Tensor]:
    """The operand, the dim, and the entries of a slice of `whole`."""
    given: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    dim, start, end, step = given
    positions = slice(start, end, step).indices(whole.tensor.shape[dim])
    return args[0], dim % len(whole.tensor.shape), torch.arange(*positions)


def _select_scatter(node: Node, region: Region) -> _Part:
    x, source, dim, index = node.args
    dim = dim % len(region)
    positions = torch.tensor([index % x.tensor.shape[dim]])
    inside = (*region[:dim], *region[dim + 1 :])
    return _scattered(
        x, source, dim, positions, region, lambda _: inside, lambda v: v.unsqueeze(dim)
    )


def _slice_scatter(node: Node, region: Region) -> _Part:
    x, source, *rest = node.args
    _, dim, positions = _sliced((x, *rest), x)
    return _scattered(
        x,
        source,
        dim,
        positions,
        region,
        lambda at: (*region[:dim], at, *region[dim + 1 :]),
        lambda value: value,
    )


def _scattered(
    x: Node,
    source: Node,
    dim: int,
    positions: Tensor,
    region: Region,
    inside: Callable[[Tensor], Region],
    shaped: Callable[[Tensor], Tensor],
) -> _Part:
    """`x` with other entries at some `positions` of a dim: those of `source`, of which `inside`
    gives the region and `shaped` the values. Neither is read where none of its entries is."""
    here = torch.isin(region[dim], positions)
    ours, theirs = here.nonzero().view(-1), (~here).nonzero().view(-1)
    reads: list[tuple[Node, Region | None]] = []
    if len(ours):
        reads.append((source, inside(torch.searchsorted(positions, region[dim][ours]))))
    if len(theirs):
        reads.append((x, (*region[:dim], region[dim][theirs], *region[dim + 1 :])))

    def compute(*values: Tensor) -> Tensor:
        written = shaped(values[0]) if len(ours) else None
        if written is None or not len(theirs):
            return values[0] if written is None else written
        out = values[1].new_empty(_sizes(region))
        out.index_copy_(dim, ours.to(out.device), written)
        return out.index_copy_(dim, theirs.to(out.device), values[1])

    return _Part(reads, compute)


_MOVES: dict[Any, Callable[[Node, Region], _Part]] = {
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.t.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.select_scatter.default: _select_scatter,
    aten.slice_scatter.default: _slice_scatter,
}
"""Operators of which a region is made of regions of their operands, entry by entry."""
