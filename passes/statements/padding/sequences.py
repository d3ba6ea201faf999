"""Pad sequences that do not divide where they enter a region, and cut the padding off where its
entries would be seen.

Before:  getitem: f32[8, 17, 16]  = norm[0]
         linear_1: f32[8, 17, 16] = linear(relu, block_down_weight)
         add: f32[8, 17, 16]      = add(x, linear_1)
         sum: f32[]               = sum(add)
After:   extend: f32[8, 18, 16]   = mesh::extend(x, 1, 18)
         getitem: f32[8, 18, 16]  = norm[0]
         linear_1: f32[8, 18, 16] = linear(relu, block_down_weight)
         add: f32[8, 18, 16]      = add(extend, linear_1)
         slice: f32[8, 17, 16]    = slice(add, 1, 0, 17)
         sum: f32[]               = sum(slice)

The rules say where padding may pass: an operator that could be split along the sequence treats its
entries separately, and runs on the padded ones. Any other operator takes the sequence without its
padding, and its result is padded again. Pad entries repeat the last true one, so that they are
always in an operator's domain; the slices that cut them off make their cotangents zero.
Requires: regions. Ensures: what enters a region divides, and no reduction, reordering, output or
random number depends on padding.
Elsewhere: Megatron refuses such sequences.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.extents import Extent
from meshwright.compiler.placing.rules.notation import Call, Spec
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.padding.padder import Padder, treats_apart
from meshwright.passes.statements.sequences.regions import entered_activations


def pad_sequences(draft: Draft) -> Draft:
    """The graph with every sequence that enters a region and does not divide padded."""
    entries: dict[Node, list[tuple[Node, int]]] = {}
    for region in draft.regions:
        ranks = draft.mesh.size(region.axes)
        for node, value in entered_activations(draft.graph, region.modules).values():
            entries.setdefault(node, []).append((value, ranks))
    uneven = any(v.tensor.shape[1] % ranks for pairs in entries.values() for v, ranks in pairs)
    return _Padder(draft, entries).run() if uneven else draft


class _Padder(Padder):
    """Pads what enters regions; `entries` has, by node, the values that enter with it, each beside
    the number of ranks that split it."""

    def __init__(self, draft: Draft, entries: Mapping[Node, list[tuple[Node, int]]]) -> None:
        super().__init__(draft)
        self.entries = entries

    def begin(self, node: Node) -> None:
        for value, ranks in self.entries.get(node, ()):
            self._enter(value, ranks)

    def keeps(
        self, call: Call, spec: Spec, padded: Mapping[int, Mapping[str, Extent]], letter: str
    ) -> bool:
        return treats_apart(spec, letter)

    def pads_again(self) -> bool:
        return True

    def _enter(self, value: Node, ranks: int) -> None:
        """Pad what enters a region, unless it comes padded."""
        new, size = self.mapping[value], value.tensor.shape[1]
        before = self.of(new).get(1)
        if before is not None and before.stored % ranks == 0:
            return
        new = self.narrowed(new, 1)
        padded = -(-size // ranks) * ranks
        if padded != size:
            new = self.extended(new, 1, Extent(1, size, padded, 1))
        self.mapping[value] = new
