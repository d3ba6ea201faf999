"""Compute in the type that the plan names, from parameters of the type that it stores.

Before:  up_weight: f32[64, 16] = input(parameter up.weight)
         linear: f32[8, 64]     = linear(x, up_weight, up_bias)
         softmax: f32[8, 64]    = softmax(linear, -1)
After:   up_weight: f32[64, 16]   = input(parameter up.weight)
         to_copy: bf16[8, 16]     = to_copy(x, dtype=bf16)
         to_copy_1: bf16[64, 16]  = to_copy(up_weight, dtype=bf16)
         to_copy_2: bf16[64]      = to_copy(up_bias, dtype=bf16)
         linear: bf16[8, 64]      = linear(to_copy, to_copy_1, to_copy_2)
         to_copy_3: f32[8, 64]    = to_copy(linear, dtype=f32)
         softmax: f32[8, 64]      = softmax(to_copy_3, -1)

`families.py` has the table. A value is cast once for each type that it is used in. Integers,
float64 and what is computed from constants alone keep their types, and so does what the model
computes in a type of its own choice. Losses, outputs and buffers leave in the model's types.
Requires: a captured graph. Ensures: a graph of the types that run.
Elsewhere: torch.autocast, DeepSpeed's and FSDP2's mixed precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from meshwright.compiler.graph.aliasing import is_view
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    Arg,
    Builder,
    Graph,
    InputKind,
    Node,
    Output,
    OutputKind,
    TensorType,
    map_nodes,
    nodes_in,
    rewrite,
)
from meshwright.compiler.layout.wires import HALF_TYPES
from meshwright.compiler.placing.result_types import result_type
from meshwright.dsl.errors import either
from meshwright.dsl.selectors import Selector
from meshwright.dsl.statements import Precision
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.families import (
    ALWAYS_WIDE,
    NARROWED,
    Width,
    family,
    width,
)
from meshwright.passes.statements.targets import modules_of

aten = torch.ops.aten

TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_CHOSEN = (*HALF_TYPES, torch.float32)
"""The element types in place of which the plan's is used."""


def precision(draft: Draft) -> Draft:
    """`draft` with each node in the type that the plan's `precision` gives it."""
    statement = next(iter(draft.plan.of(Precision)), None)
    if statement is None:
        return draft
    _check_narrows(draft, statement)
    return replace(draft, graph=_Caster(draft, statement).run())


def _check_narrows(draft: Draft, statement: Precision) -> None:
    dtypes = {each.dtype for each in draft.captured.parameters.values()}
    found = {dtype for dtype in dtypes if dtype.is_floating_point}
    if found == {torch.float64} and TYPES[statement.dtype] != torch.float64:
        raise draft.plan.error(
            "P501",
            f"`precision {statement.dtype}` has nothing to compute in it: the model's parameters "
            "are float64, which stays",
            statement,
            help="convert the model before it is compiled: `model.float()`",
        )


class _Caster:
    def __init__(self, draft: Draft, statement: Precision) -> None:
        self.draft, self.graph, self.statement = draft, draft.graph, statement
        self.compute = TYPES[statement.dtype]
        self.master = TYPES[statement.master] if statement.master else None
        self.wide = torch.promote_types(torch.float32, self.compute)
        self.kept, self.modules = _kept(draft, statement)
        self.routers = set(_routers(draft.graph))
        self.builder = Builder(draft.graph.name, draft.graph.mesh)
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.followed: set[Node] = set()
        """What depends on a parameter, or on an argument of a floating-point type."""

    def run(self) -> Graph:
        return rewrite(self.graph, self._typed, builder=self.builder, output=self._returned)

    def _typed(self, builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node:
        if node.op == INPUT:
            return self._input(node)
        args = map_nodes(node.args, mapping.__getitem__)
        kwargs = {key: map_nodes(value, mapping.__getitem__) for key, value in node.kwargs.items()}
        if not self.followed.isdisjoint(node.operands()):
            self.followed.add(node)
            args, kwargs = self._cast(node, args, kwargs)
        if node.op == aten._to_copy.default and args[0].tensor.dtype == kwargs["dtype"]:
            cast: Node = args[0]
            return cast
        return builder.copy(node, {}, args=args, kwargs=kwargs, type=_type(node, args, kwargs))

    def _input(self, node: Node) -> Node:
        kind, type = node.args[0], node.tensor
        floating = type.dtype.is_floating_point
        if kind == InputKind.PARAMETER or (kind == InputKind.ARGUMENT and floating):
            self.followed.add(node)
        if kind == InputKind.PARAMETER and self.master and type.dtype in _CHOSEN:
            type = replace(type, dtype=self.master)
        return self.builder.copy(node, {}, type=type)

    def _cast(
        self, node: Node, args: tuple[Arg, ...], kwargs: dict[str, Arg]
    ) -> tuple[tuple[Arg, ...], dict[str, Arg]]:
        """The arguments of a call, cast to the types in which it computes."""
        if node.origin.exact:
            return self._as_captured(node, args, kwargs)
        how = self._width(node)
        values = [n for n in _tensors(args, kwargs) if n.tensor.dtype in _CHOSEN]
        dtypes = {n.tensor.dtype for n in values}
        if how is Width.NARROW:
            wanted = dict.fromkeys(values, self.compute)
        elif how is Width.WIDE:
            wanted = dict.fromkeys(values, self.wide)
        elif how is Width.INSIDE:
            first = next(_tensors(args, kwargs))
            beside = [value for value in values if value is not first]
            mixed = len(dtypes | {first.tensor.dtype}) > 1
            wanted = dict.fromkeys(beside, self.wide) if mixed else {}
        else:
            wanted = _promoted(values) if len(dtypes) > 1 else {}

        def cast(value: Node) -> Node:
            return self._to(value, wanted[value], node) if value in wanted else value

        return map_nodes(args, cast), {key: map_nodes(v, cast) for key, v in kwargs.items()}

    def _width(self, node: Node) -> Width:
        if is_view(node.op) or node.op == aten._to_copy.default:
            return Width.SAME
        how = width(node.op)
        around = (path for path, _ in node.origin.modules)
        kept = family(node.op) in self.kept or not self.modules.isdisjoint(around)
        return Width.WIDE if kept or node in self.routers or self._exceeded(node) else how

    def _exceeded(self, node: Node) -> bool:
        """Whether a call takes a number that the compute type does not have: the least number of
        float32, as masks have it."""
        numbers = [n for n in (*node.args, *node.kwargs.values()) if isinstance(n, int | float)]
        most = torch.finfo(self.compute).max
        return any(math.isfinite(number) and abs(number) > most for number in numbers)

    def _as_captured(
        self, node: Node, args: tuple[Arg, ...], kwargs: dict[str, Arg]
    ) -> tuple[tuple[Arg, ...], dict[str, Arg]]:
        """The arguments in the types that the model gives them."""
        pairs = zip(nodes_in((*args, *kwargs.values())), node.operands(), strict=True)
        wanted = {new: old.type for new, old in pairs}

        def cast(value: Node) -> Node:
            type = wanted[value]
            return self._to(value, type.dtype, node) if isinstance(type, TensorType) else value

        return map_nodes(args, cast), {key: map_nodes(v, cast) for key, v in kwargs.items()}

    def _to(self, value: Node, dtype: torch.dtype, user: Node) -> Node:
        """`value` in this type, by one cast for all that use it so."""
        if value.tensor.dtype == dtype:
            return value
        if (value, dtype) not in self.casts:
            self.casts[value, dtype] = self.builder.emit(
                aten._to_copy.default,
                (value,),
                {"dtype": dtype},
                type=replace(value.tensor, dtype=dtype),
                origin=replace(user.origin, plan_line=self.statement.plan_line),
                requires_grad=value.requires_grad,
            )
        return self.casts[value, dtype]

    def _returned(self, output: Output, node: Node) -> Node:
        """What a program returns has the type that it has without the statement, or a wider one."""
        dtype = output.node.tensor.dtype
        if output.kind is OutputKind.LOSS and dtype in _CHOSEN:
            dtype = self.wide
        return self._to(node, dtype, output.node)


def _tensors(args: tuple[Arg, ...], kwargs: Mapping[str, Arg]) -> Iterator[Node]:
    """The operands of a call that are one tensor each."""
    operands = nodes_in((*args, *kwargs.values()))
    return (each for each in operands if isinstance(each.type, TensorType))


def _type(node: Node, args: tuple[Arg, ...], kwargs: dict[str, Arg]) -> Any:
    if node.op == GETITEM:
        source, index = args
        return source.type[index]
    if list(nodes_in((*args, *kwargs.values()))) == list(node.operands()):
        return node.type
    before = [n.type for n in node.operands()]
    after = [n.type for n in nodes_in((*args, *kwargs.values()))]
    return node.type if before == after else result_type(node.op, args, kwargs)


def _promoted(values: list[Node]) -> dict[Node, torch.dtype]:
    """The type in which a call computes on values of multiple types: the widest, where numbers
    without dims count only among themselves, as in torch."""
    sized = [n for n in values if n.tensor.shape] or values
    widest = reduce(torch.promote_types, (n.tensor.dtype for n in sized))
    return dict.fromkeys(values, widest)


def _kept(draft: Draft, statement: Precision) -> tuple[set[str], frozenset[str]]:
    """The families and the modules that `keep=` names."""
    families: set[str] = set()
    modules: set[str] = set()
    for word in statement.keep:
        if word in (*NARROWED, *ALWAYS_WIDE):
            families.add(word)
            continue
        found = Selector(word).match(modules_of(draft))
        if not found:
            raise draft.plan.error(
                "P401",
                f"`keep={word}` matches nothing",
                statement.at("keep"),
                help=f"write {either((*NARROWED, *ALWAYS_WIDE))}, or a module's name: in quotes, "
                'unless it is one word, as in `keep=[norm, "blocks.*.up"]`',
            )
        modules.update(found)
    return families, frozenset(modules)


def _routers(graph: Graph) -> Iterable[Node]:
    """The products whose largest results choose the experts: a rounded one may choose others."""
    for node in graph.nodes:
        if node.op == aten.topk.default:
            value: Node = node.args[0]
            while value.op not in (INPUT, GETITEM) and width(value.op) is not Width.NARROW:
                operands = [n for n in value.operands() if n.tensor.dtype.is_floating_point]
                if not operands:
                    break
                value = operands[0]
            if family(value.op) == "matmul":
                yield value
