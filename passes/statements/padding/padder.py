"""Run the calls of a graph on padded operands where the rules of operators let padding pass.

An operator that could be split along a dim treats the entries of that dim separately, and runs on
all of them. Any other takes its operands with the padding cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from meshwright.compiler.codegen.local import LOCAL, local_args
from meshwright.compiler.composites.extend import Extend
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    Builder,
    Node,
    NodeType,
    TensorType,
    map_nodes,
    rewrite,
)
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.layout.extents import Extent, moved
from meshwright.compiler.layout.factors import dim_axes, whole
from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.placing.result_types import result_type
from meshwright.compiler.placing.rules.notation import Call, Spec
from meshwright.compiler.placing.rules.views import RESHAPES
from meshwright.passes.rewriting.equivariance import spec_of
from meshwright.passes.rewriting.rewriter import emit_for
from meshwright.passes.statements.draft import Draft, Pin

aten = torch.ops.aten

Extents = Mapping[int, Extent]
"""The padded dims of a value."""


@dataclass(slots=True)
class _Way:
    """The way to run a call: which letters of its rule stay padded, and which are padded again."""

    spec: Spec | None
    kept: dict[str, Extent] = field(default_factory=dict)
    again: dict[str, Extent] = field(default_factory=dict)

    def result(self, index: int, *, again: bool = False) -> dict[int, Extent]:
        """The padded dims of a result, or those to be padded again."""
        chosen = self.again if again else self.kept
        return _extents((self.spec.results[index] or ()) if self.spec else (), chosen)


def _extents(letters: Iterable[str], chosen: Mapping[str, Extent]) -> dict[int, Extent]:
    return {dim: chosen[letter] for dim, letter in enumerate(letters) if letter in chosen}


class Padder:
    """Runs the calls of a graph on padded operands wherever their rules let padding pass.

    A subclass says where padding enters and which calls keep it.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.builder = Builder(draft.graph.name, draft.mesh)
        self.mapping: dict[Node, Node] = {}
        self.extents: dict[Node, Extents] = {}
        self.ways: dict[Node, _Way] = {}
        """By new node with multiple results: the way it was run."""
        self.cut: dict[tuple[Node, int], Node] = {}
        self.padded: dict[tuple[Node, int, Extent], Node] = {}
        self.values: dict[Node, Pin] = {}
        self.entering: dict[Node, tuple[tuple[Node, Pin], ...]] = {}

    def begin(self, node: Node) -> None:
        """Pad what is to be padded from this node on, through `extended`."""

    def input(self, node: Node) -> Node:
        """The new node of an input of the graph."""
        return self.builder.copy(node, {})

    def keeps(
        self, call: Call, spec: Spec, padded: Mapping[int, Mapping[str, Extent]], letter: str
    ) -> bool:
        """Whether a call may run on operands that are padded along a letter of its rule.

        `padded` has, by number of operand, the letters along which it is padded, and how.
        """
        raise NotImplementedError

    def pads_again(self) -> bool:
        """Whether a result is padded again along a dim that its call takes without padding."""
        return False

    def run(self) -> Draft:
        """The draft with its graph padded, and what the plan pins there."""
        graph = rewrite(
            self.draft.graph,
            self._rewritten,
            builder=self.builder,
            output=lambda _, node: self._true(node),
        )
        return replace(self.draft, graph=graph, values=self.values, entering=self.entering)

    def _rewritten(self, _: Builder, node: Node, mapping: dict[Node, Node]) -> Node:
        self.mapping = mapping
        self.begin(node)
        entering = tuple(self._entering(*pair) for pair in self.draft.entering.get(node, ()))
        new = self._node(node)
        if entering:
            self.entering[new] = entering
        if node in self.draft.values:
            new, pin = self._pinned(new, self.draft.values[node])
            self.values[new] = pin
        return new

    def _entering(self, value: Node, pin: Pin) -> tuple[Node, Pin]:
        self.mapping[value], pin = self._pinned(self.mapping[value], pin)
        return self.mapping[value], pin

    def _pinned(self, new: Node, pin: Pin) -> tuple[Node, Pin]:
        """A value that the plan has laid out, and its layout with the padding."""
        extents = self.of(new)
        dims = list(pin.layout.dims)
        if any(dim_axes(dims[dim]) for dim in extents):
            return self._true(new), pin
        for dim, extent in extents.items():
            dims[dim] = whole(extent.stored)
        return new, replace(pin, layout=pin.layout.with_dims(dims))

    def of(self, new: Node) -> Extents:
        return self.extents.get(new, {})

    def _node(self, node: Node) -> Node:
        if node.op == INPUT:
            return self.input(node)
        if node.op == GETITEM:
            return self._item(node)
        news = [self.mapping[n] for n in call_operands(node.args, node.kwargs)]
        if not any(new in self.extents for new in news):
            return self.builder.copy(node, self.mapping)
        if node.op in RESHAPES:
            return self._viewed(node, news[0])
        way = self._way(node, news)
        new = self._call(node, way, news) or self._unpadded(node, way, news)
        if isinstance(node.type, tuple):
            self.ways[new] = way
            return new
        return self._again(new, way, 0)

    def _item(self, node: Node) -> Node:
        source, index = self.mapping[node.args[0]], node.args[1]
        way = self.ways.get(source)
        if way is None:
            return self.builder.copy(node, self.mapping)
        assert isinstance(source.type, tuple)
        new = self.builder.copy(node, self.mapping, type=source.type[index])
        self._note(new, way.result(index))
        return self._again(new, way, index)

    def _note(self, new: Node, extents: Extents) -> None:
        if extents:
            self.extents[new] = extents

    def _again(self, new: Node, way: _Way, index: int) -> Node:
        """A result, padded again in the dims that its operator took without padding."""
        for dim, extent in way.result(index, again=True).items():
            if new.tensor.shape[dim] == extent.true:
                new = self.extended(new, dim, extent)
        return new

    def _way(self, node: Node, news: list[Node]) -> _Way:
        """The way to run a node, by what its operator's rule says of the padded dims."""
        found = spec_of(node, self.builder.mesh)
        if found is None:
            return _Way(None)
        call, spec = found
        way = _Way(spec)
        padded = {
            i: {letters[dim]: extent for dim, extent in self.of(new).items() if letters[dim]}
            for i, (letters, new) in enumerate(zip(spec.operands, news, strict=True))
            if i not in spec.ignored
        }
        for extents in padded.values():
            for letter, extent in extents.items():
                if self.keeps(call, spec, padded, letter):
                    way.kept.setdefault(letter, extent)
                elif self.pads_again():
                    way.again.setdefault(letter, extent)
        return way

    def _call(self, node: Node, way: _Way, news: list[Node]) -> Node | None:
        """The call on padded operands; None where padding does not fit its arguments."""
        if way.spec is None:
            return None
        brought = [
            self._brought(new, letters, way.kept, free=i in way.spec.ignored)
            for i, (letters, new) in enumerate(zip(way.spec.operands, news, strict=True))
        ]
        expected = self._resized(node.type, way)
        args, kwargs = _with_operands(node, brought)
        if node.op in LOCAL:
            types = expected if isinstance(expected, tuple) else (expected,)
            operands = [replicated(n.tensor.shape) for n in brought]
            results = [replicated(type.shape) for type in types if type is not None]
            args, kwargs = local_args(node.op, args, kwargs, operands, results, self.builder.mesh)
        if result_type(node.op, args, kwargs) != expected:
            return None
        if composite := composite_of(node.op):
            args = composite.padded(args, _extents(way.spec.operands[0], way.kept))
        new = self.builder.copy(node, {}, args=args, kwargs=kwargs, type=expected)
        if isinstance(expected, TensorType):
            self._note(new, way.result(0))
        return new

    def _resized(self, type: NodeType, way: _Way) -> NodeType:
        """The type of the results with their padding."""
        if isinstance(type, tuple):
            return tuple(each and resized(each, way.result(i)) for i, each in enumerate(type))
        return type and resized(type, way.result(0))

    def _brought(
        self, new: Node, letters: tuple[str, ...], kept: Mapping[str, Extent], *, free: bool
    ) -> Node:
        """An operand padded in the dims of `kept`, and in no other; `free` as it is."""
        if free:
            return new
        for dim, extent in self.of(new).items():
            if kept.get(letters[dim]) != extent:
                new = self.narrowed(new, dim)
        for dim, letter in enumerate(letters):
            if letter in kept and dim not in self.of(new):
                new = self.extended(new, dim, kept[letter])
        return new

    def _unpadded(self, node: Node, way: _Way, news: list[Node]) -> Node:
        """The call as the model wrote it, on operands with their padding cut off."""
        if self.pads_again():
            way.again = {**way.again, **way.kept}
        way.kept = {}
        return self.builder.copy(node, lambda n: self._true(self.mapping[n]))

    def _viewed(self, node: Node, new: Node) -> Node:
        """A view, whose padding is in the dim that holds the padded entries then."""
        found: dict[int, Extent] = {}
        for dim, extent in self.of(new).items():
            target = moved(extent, dim, node.operands()[0].tensor.shape, node.tensor.shape)
            if target is None or target[0] in found:
                new = self.narrowed(new, dim)
            else:
                found[target[0]] = target[1]
        type = resized(node.tensor, found)
        view = self._made(node, aten.view.default, (new, type.shape), name=node.name)
        self._note(view, found)
        return view

    def _true(self, new: Node) -> Node:
        """The value without its padding."""
        for dim in self.of(new):
            new = self.narrowed(new, dim)
        return new

    def narrowed(self, new: Node, dim: int) -> Node:
        """The value without the padding of one dim."""
        if dim not in self.of(new):
            return new
        if (new, dim) not in self.cut:
            extent = self.of(new)[dim]
            apart = self._apart(new, dim, extent, extent.padded)
            place = dim + (extent.before > 1)
            cut = self._made(new, aten.slice.Tensor, (apart, place, 0, extent.size))
            self.cut[new, dim] = self._joined(new, cut, dim, extent.true)
            self._note(self.cut[new, dim], {d: e for d, e in self.of(new).items() if d != dim})
        return self.cut[new, dim]

    def extended(self, new: Node, dim: int, extent: Extent) -> Node:
        """The value with one dim padded."""
        key = new, dim, extent
        if key not in self.padded:
            apart = self._apart(new, dim, extent, extent.size)
            place = dim + (extent.before > 1)
            longer = self._made(new, Extend.op, (apart, place, extent.padded))
            self.padded[key] = self._joined(new, longer, dim, extent.stored)
            self.extents[self.padded[key]] = {**self.of(new), dim: extent}
            self.cut[self.padded[key], dim] = new
        return self.padded[key]

    def _apart(self, new: Node, dim: int, extent: Extent, size: int) -> Node:
        """The value with the padded factor as a dim of its own."""
        if extent.before == extent.after == 1:
            return new
        around = enumerate((extent.before, size, extent.after))
        own = [each for i, each in around if i == 1 or each > 1]
        shape = new.tensor.shape
        return self._made(new, aten.view.default, (new, (*shape[:dim], *own, *shape[dim + 1 :])))

    def _joined(self, like: Node, apart: Node, dim: int, size: int) -> Node:
        """The value that `_apart` took apart, with the parts joined to a dim of `size`."""
        shape = (*like.tensor.shape[:dim], size, *like.tensor.shape[dim + 1 :])
        if apart.tensor.shape == shape:
            return apart
        return self._made(like, aten.view.default, (apart, shape))

    def _made(self, like: Node, op: Any, args: tuple[Any, ...], *, name: str = "") -> Node:
        """A node that the model does not have; it belongs to where `like` does."""
        return emit_for(like, self.builder, op, args, name=name)


def _with_operands(node: Node, operands: Iterable[Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node with other operands, given in the order of its rule."""
    given = iter(operands)
    args = map_nodes(node.args, lambda _: next(given))
    return args, {
        key: map_nodes(node.kwargs[key], lambda _: next(given)) for key in sorted(node.kwargs)
    }


def treats_apart(spec: Spec, letter: str) -> bool:
    """Whether entries along a letter do not mix: it could be split, and every result has it."""
    if letter in spec.whole | spec.inner | spec.derived:
        return False
    return all(letters is None or letters.count(letter) == 1 for letters in spec.results)


def resized(type: TensorType, extents: Extents) -> TensorType:
    shape = (extents[dim].stored if dim in extents else size for dim, size in enumerate(type.shape))
    return TensorType(tuple(shape), type.dtype)
