"""Sequences whose elements are in another order: which operators keep that order, and where.

An operator that treats the elements of a sequence each by itself gives what it would, in the order
of its operands. Its rule says so by letters, as it says what may be split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Node, Op
from meshwright.compiler.layout.factors import cut, dim_axes, whole
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.placing.rules.notation import Call, Letters, Spec
from meshwright.compiler.placing.rules.views import RESHAPES
from meshwright.passes.rewriting.equivariance import IN_ANY_ORDER, spec_of
from meshwright.passes.statements.linears import is_convolution

aten = torch.ops.aten

Places: TypeAlias = Mapping[int, int]
"""The dims of a value that have a sequence in another order, and how many elements are outside of
it in the dim: it may be merged with the batch."""

Found: TypeAlias = "tuple[list[Places | None], tuple[Places, ...]]"
"""The places in every operand, `None` where any will do, and in every result."""

_SPREAD: tuple[Op, ...] = (aten.expand.default, aten.expand_copy.default, aten.broadcast_to.default)
"""Operators whose results have dims along which they are the same."""


def through(
    node: Node,
    given: Sequence[Places] | None,
    results: Mapping[int, Places],
    length: int,
    mesh: Mesh,
    *,
    drawing: bool = False,
    ordered: bool = True,
) -> Found | None:
    """The places of sequences of `length` in all operands and results of a node, from those in its
    operands, if they are given, or in some `results`.

    None if the operator does not treat the elements of these sequences each by itself. With
    `drawing`, those that can draw their random numbers in another order are told that order; where
    elements are not `ordered`, each may draw what another would.
    """
    if node.op in RESHAPES:
        return _reshaped(node, given, results, length)
    known = composite_of(node.op)
    draws = known is not None and known.number is not None and node.args[known.number]
    if draws and ordered and not (drawing and known is not None and known.draws_in_order):
        return None  # its random numbers depend on the order
    found = None if _in_groups(node.op) else spec_of(node, mesh)
    if found is None:
        return None
    call, spec = found
    operands = given if given is not None else [{}] * len(spec.operands)
    terms = [(spec.results[i], places) for i, places in results.items()]
    pairs = enumerate(zip(spec.operands, operands, strict=True))
    terms += [pair for i, pair in pairs if i not in spec.ignored]
    marks = _marks(spec, terms)
    if marks is None or not all(_is_known(node, spec, letter) for letter in marks):
        return None
    sizes = _sizes(call, spec)
    if sizes is None or any(_leads(spec, letter, sizes, mesh) for letter in marks):
        return None
    wanted = [
        None if i in spec.ignored else _places(term, marks) for i, term in enumerate(spec.operands)
    ]
    places = tuple(_places(term or (), marks) for term in spec.results)
    return wanted, places


def _sizes(call: Call, spec: Spec) -> dict[str, int] | None:
    """The size of each letter; None if one has different sizes."""
    sizes: dict[str, int] = {}
    types = (*(operand.type for operand in call.operands), *call.results)
    for term, type in zip((*spec.operands, *spec.results), types, strict=True):
        for letter, size in zip(term or (), type.shape if type else (), strict=bool(term and type)):
            if letter and sizes.setdefault(letter, size) != size:
                return None
    return sizes


def _leads(spec: Spec, letter: str, sizes: Mapping[str, int], mesh: Mesh) -> bool:
    """Whether another letter follows from how this one is split, as groups of heads do."""
    if spec.bind is None:
        return False
    size = sizes[letter]
    axis = next(
        (axis for axis in mesh.names if mesh.size(axis) > 1 and size % mesh.size(axis) == 0), None
    )
    if axis is None:
        return True
    dims = {each: whole(own) for each, own in sizes.items()}
    try:
        found = spec.bind({**dims, letter: cut(size, axis)})
    except LayoutError:
        return True
    return any(each != letter and dim_axes(dim) for each, dim in found.items())


def _in_groups(op: Op) -> bool:
    """Whether groups of channels, which no letter shows, may depend on their order."""
    return is_convolution(op) or op == aten.convolution_backward.default


def _reshaped(
    node: Node, given: Sequence[Places] | None, results: Mapping[int, Places], length: int
) -> Found | None:
    """The places on the other side of an operator that keeps the order of all elements."""
    (operand,) = node.operands()
    shapes = operand.tensor.shape, node.tensor.shape
    known = given[0] if given is not None else results[0]
    source, target = shapes if given is not None else shapes[::-1]
    found: dict[int, int] = {}
    for dim, outer in known.items():
        place = _holding(target, math.prod(source[:dim]) * outer, length)
        if place is None:
            return None
        found[place[0]] = place[1]
    return ([known], (found,)) if given is not None else ([found], (known,))


def _marks(spec: Spec, terms: Iterable[tuple[Letters | None, Places]]) -> dict[str, int] | None:
    """The letters of sequences, each with what is outside of it; None if an operator does not treat
    their elements each by itself."""
    marks: dict[str, int] = {}
    for term, places in terms:
        for dim, outer in places.items():
            letter = term[dim] if term else ""
            if not letter or marks.setdefault(letter, outer) != outer:
                return None
    mixed = spec.whole | spec.inner | spec.derived | spec.consecutive
    return None if mixed & marks.keys() else marks


def _is_known(node: Node, spec: Spec, letter: str) -> bool:
    """Whether the elements along a letter are those of operands, in the same order in each result
    or summed up in any."""
    taken = [term for term in spec.operands if letter in term]
    given = [term for term in spec.results if term is not None]
    if any(term.count(letter) > 1 for term in (*taken, *given)):
        return False
    if not taken and node.op not in _SPREAD:
        return False
    return node.op in IN_ANY_ORDER or all(letter in term for term in given)


def _places(term: Letters, marks: Mapping[str, int]) -> Places:
    return {dim: marks[letter] for dim, letter in enumerate(term) if letter in marks}


def _holding(shape: Sequence[int], before: int, length: int) -> tuple[int, int] | None:
    """The dim that holds a sequence whole, of which an element stands behind `before` others in
    the order of the dims, and how many of these are in that dim."""
    outside = 1
    for dim, size in enumerate(shape):
        inside = outside * size
        if before % outside == 0 and before * length <= inside and inside % (before * length) == 0:
            return dim, before // outside
        outside = inside
    return None
