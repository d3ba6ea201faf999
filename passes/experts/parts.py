"""How a plan cuts the rows that experts are given, and with that, which ranks exchange them.

Rows are those of a batch, and mostly those of its sequences: `(batch sequence)`. Ranks along the
axes of the owners exchange rows with each other. What other axes cut, such as those of data beside
them, are slices, each with an exchange of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.factors import Dim, cut, dim_axes, dim_size
from meshwright.passes.statements.draft import Draft, input_key


@dataclass(frozen=True)
class Part:
    """One of the factors of rows: of `slices`, over an axis of the `owners`, or of what is
    `together` on a rank."""

    size: int
    kind: Literal["slices", "owners", "together"]
    axis: int = 0
    """The place of an axis among those of the owners."""


def parts_of(
    draft: Draft, node: Node, num_rows: int, owners: tuple[str, ...], inner: frozenset[str]
) -> list[Part]:
    """The factors of rows, the first varying slowest, where axes of `inner` split the experts
    themselves: each rank along those has a part of what all rows need. What is found is where rows
    are likely to be: another cut would move more of them, and give the same."""
    found: list[Part] = []
    for dim in _dims(draft, node, num_rows, inner):
        for size, axis in _factors(draft, dim):
            if axis in owners:
                found.append(Part(size, "owners", owners.index(str(axis))))
            elif size > 1:
                found.append(Part(size, "slices" if axis else "together"))
    whole = math.prod(part.size for part in found) == num_rows
    return found if whole else [Part(num_rows, "together")]


def in_order(parts: list[Part]) -> list[int]:
    """The places of parts as exchanges want them: slices, then what owners exchange, in the order
    of their axes, then what is together."""
    kinds = ["slices", "owners", "together"]
    return sorted(range(len(parts)), key=lambda i: (kinds.index(parts[i].kind), parts[i].axis))


def _dims(draft: Draft, node: Node, num_rows: int, inner: frozenset[str]) -> Iterator[Dim]:
    """The dims that rows are made of, as the plan splits them."""
    batch = next(_batches(draft, num_rows), None)
    if batch is None:
        yield cut(num_rows)
        return
    yield batch
    length = num_rows // dim_size(batch)
    axes = tuple(axis for axis in _along_sequences(draft, node) if axis not in inner)
    yield cut(length, *axes) if length % draft.mesh.size(axes) == 0 else cut(length)


def _batches(draft: Draft, num_rows: int) -> Iterator[Dim]:
    """The first dims of inputs that rows may be of; those that the plan splits come first."""
    arguments = [each for each in draft.graph.inputs if each.args[0] == "argument"]
    for is_split in (True, False):
        for node in arguments:
            size, *_ = (*node.tensor.shape, 0)
            pin = draft.inputs.get(input_key(node))
            dim = pin.layout.dims[0] if pin and size else cut(size)
            plain = len(dim) == len(dim[0]) == 1
            if size and num_rows % size == 0 and plain and bool(dim_axes(dim)) == is_split:
                yield dim


def _along_sequences(draft: Draft, node: Node) -> tuple[str, ...]:
    """The axes that split sequences around a node."""
    around = {path for path, _ in node.origin.modules}
    found: list[str] = []
    for attending in draft.attending:
        found += attending.statement.over if around & attending.modules else ()
    for region in draft.regions:
        found += region.axes if around & region.modules else ()
    return tuple(dict.fromkeys(found))


def _factors(draft: Draft, dim: Dim) -> Iterator[tuple[int, str | None]]:
    """The factors of a dim, each with the axis that splits it."""
    ((factor,),) = dim
    for axis in factor.axes:
        yield draft.mesh.size(axis), axis
    yield factor.size // draft.mesh.size(factor.axes), None
