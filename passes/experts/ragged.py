"""Do for every choice of every token what the graph says of one token and one expert.

Before:  linear_2: f32[1, 1, 8] = linear(reshape_2, one_expert, one_expert_1)
         relu: f32[1, 1, 8]     = relu(linear_2)
After:   transpose: f32[4, 8, 8]    = transpose(blocks_0_mlp_experts_up_weight, 1, 2)
         view_1: f32[12, 8]         = view(view, [12, 8])
         grouped_mm: f32[12, 2, 8]  = mesh::grouped_mm(view_1, transpose, reshape)
         view_2: f32[24, 1, 1, 8]   = view(grouped_mm, [24, 1, 1, 8])
         index: f32[12, 2, 8]       = index(blocks_0_mlp_experts_up_bias, [reshape])
         view_3: f32[24, 8]         = view(index, [24, 8])
         view_4: f32[24, 1, 1, 8]   = view(view_3, [24, 1, 1, 8])
         add: f32[24, 1, 1, 8]      = add(view_2, view_4)
         relu: f32[24, 1, 1, 8]     = relu(add)

Where no expert has a capacity there are no slots: a value has one row per choice, in the order of
the tokens. A product with a weight that each expert has its own of is a product by group, and any
other such parameter is looked up, row by row. What depends on no expert is computed once per token.
Elsewhere: MegaBlocks (2211.15841).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from meshwright.compiler.composites.grouped import GroupedMM
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.ir import Arg, Builder, Node, Op
from meshwright.passes.experts.calls import NORMS, BatchedCall, is_elementwise, product_of
from meshwright.passes.rewriting.rewriter import emit_for

aten = torch.ops.aten

EXPERTS, TOKENS, CHOICES = "experts", "tokens", "choices"


@dataclass(frozen=True)
class Lead:
    """What the leading dim of a value counts: `size` experts, tokens, or choices of tokens, which
    are `expert[tokens, choices]`."""

    kind: str
    size: int
    expert: Node | None = None

    @property
    def of_choices(self) -> Lead:
        """That of a value which each choice has its own of."""
        assert self.expert is not None
        tokens, choices = self.expert.tensor.shape
        return replace(self, kind=CHOICES, size=tokens * choices)


class RaggedCall:
    """One node whose operands have `leads` that differ, to be emitted for all choices."""

    def __init__(
        self,
        builder: Builder,
        node: Node,
        mapping: Mapping[Node, Node],
        leads: Mapping[Node, Lead],
        lead: Lead,
    ) -> None:
        assert lead.expert is not None
        self.builder, self.node, self.mapping, self.leads = builder, node, mapping, leads
        self.rows, self.expert = lead.size, lead.expert
        self.choices = lead.expert.tensor.shape[1]

    def emitted(self) -> tuple[Node, ...]:
        """The results of the node."""
        x, weight, bias = product_of(self.node)
        if weight is not None and self._kind(weight) == EXPERTS and self._kind(x) != EXPERTS:
            return (self._product(x, weight, bias),)
        stacked = any(self._kind(each) == EXPERTS for each in self.node.operands())
        if stacked and not (is_elementwise(self.node.op) or self.node.op in NORMS):
            raise CaptureError(
                f"`{self.node.op}` cannot run for rows of different experts at once",
                culprit=f"{self.node.origin.module} {self.node.origin.source}".strip(),
                help="write a `capacity` instead of `dropless=true`, or name a module without it",
            )
        operands = {each: self._operand(each) for each in self.node.operands()}
        return BatchedCall(self.builder, self.node, operands, self.leads, self.rows).emitted()

    def lifted(self, value: Node) -> Node:
        """What each choice has of a value: the row of its token or of its expert."""
        found, shape = self.mapping[value], value.tensor.shape
        if self._kind(value) == TOKENS:
            tokens = self.expert.tensor.shape[0]
            once = self._emit(aten.unsqueeze.default, found, 1)
            each = self._emit(aten.expand.default, once, [tokens, self.choices, *shape])
            return self._emit(aten.reshape.default, each, [self.rows, *shape])
        if self._kind(value) == EXPERTS:
            each = self._emit(aten.index.Tensor, found, [self.expert])
            return self._view(each, [self.rows, *shape])
        return found

    def _operand(self, value: Node) -> Node:
        return self.lifted(value) if value in self.leads else self.mapping[value]

    def _product(self, x: Node, weight: Node, bias: Node | None) -> Node:
        """Every row times the matrix of its expert; a token may have multiple rows of its own."""
        matrix, inner, shape = self.mapping[weight], x.tensor.shape[-1], self.node.tensor.shape
        if self.node.op == aten.linear.default:
            matrix = self._emit(aten.transpose.int, matrix, 1, 2)
        own = math.prod(x.tensor.shape[:-1])
        if own > 1:
            group = self._view(self.expert, [self.rows, 1])
            group = self._emit(aten.expand.default, group, [self.rows, own])
            given = self._view(self._operand(x), [self.rows, own, inner])
        else:
            group = self.expert
            once = self._kind(x) == TOKENS
            of_rows = group.tensor.shape[: 1 if once else 2]
            given = self._view(self.mapping[x] if once else self._operand(x), [*of_rows, inner])
        y = self._view(self._emit(GroupedMM.op, given, matrix, group), [self.rows, *shape])
        if bias is None:
            return y
        added = self._operand(bias)
        if bias in self.leads:
            between = [1] * (len(shape) - len(bias.tensor.shape))
            added = self._view(added, [self.rows, *between, *bias.tensor.shape])
        return self._emit(aten.add.Tensor, y, added)

    def _view(self, value: Node, shape: list[int]) -> Node:
        if value.tensor.shape == tuple(shape):
            return value
        return self._emit(aten.view.default, value, shape)

    def _kind(self, value: Any) -> str | None:
        return self.leads[value].kind if value in self.leads else None

    def _emit(self, op: Op, *args: Arg) -> Node:
        return emit_for(self.node, self.builder, op, args)
