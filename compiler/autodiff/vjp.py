"""The vector-Jacobian product of one call, as a few instructions at global shapes.

A composite has its adjoint in its own file, an operator whose trace would be wasteful in a table
(`adjoints.py`). Any other is traced through autograd on fake tensors, once per operator and
argument types: layouts play no part, so that a hundred equal layers on any mesh cost one trace.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from meshwright.compiler.errors import CaptureError, PassError
from meshwright.compiler.graph.custom import REGISTRY, CustomOp
from meshwright.compiler.graph.ir import (
    Arg,
    MeshOp,
    Node,
    NodeType,
    Op,
    Origin,
    TensorType,
    map_nodes,
)
from meshwright.compiler.graph.slots import Slot, freeze
from meshwright.compiler.graph.types import (
    fake_mode,
    fake_tensor,
    portable_operators,
    type_of,
)
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.placing.composite import Cotangents, composite_of
from meshwright.compiler.placing.emit import Emitter
from meshwright.dsl.errors import MeshwrightError

aten = torch.ops.aten


class VjpContext:
    """What the adjoint of one call is written with."""

    def __init__(
        self,
        emitter: Emitter,
        node: Node,
        results: tuple[Node | None, ...],
        grads: tuple[Node | None, ...],
        origin: Origin,
    ) -> None:
        self.emitter, self.node, self.origin = emitter, node, origin
        self.results, self.grads = results, grads
        self.operands = tuple(node.operands())

    @property
    def grad(self) -> Node:
        """The cotangent of the first result."""
        assert self.grads[0] is not None, self.node.name
        return self.grads[0]

    def arg(self, position: int, default: Arg = None) -> Arg:
        """A positional argument of the forward call."""
        return self.node.args[position] if position < len(self.node.args) else default

    def call(
        self,
        op: Op,
        *args: Arg,
        type: NodeType = None,
        wanted: tuple[Layout, ...] = (),
        **kwargs: Arg,
    ) -> Node:
        """Emit one backward call; `wanted` is the layout that its result should have."""
        return self.emitter.call(op, args, kwargs, origin=self.origin, type=type, wanted=wanted)

    def items(self, source: Node) -> list[Node | None]:
        """The results of a call with several."""
        assert isinstance(source.type, tuple)
        return [
            None if type is None else self.emitter.item(source, i, self.origin)
            for i, type in enumerate(source.type)
        ]


ADJOINTS: dict[Op, Callable[[VjpContext], Cotangents]] = {}
"""Adjoints written by hand, by operator."""


def adjoint(
    *ops: Op,
) -> Callable[[Callable[[VjpContext], Cotangents]], Callable[[VjpContext], Cotangents]]:
    """Register a function as the adjoint of these operators."""

    def register(
        function: Callable[[VjpContext], Cotangents],
    ) -> Callable[[VjpContext], Cotangents]:
        for op in ops:
            assert op not in ADJOINTS, op
            ADJOINTS[op] = function
        return function

    return register


def cotangents(context: VjpContext) -> Cotangents:
    """Emit the backward of `context.node`; the cotangent of each operand that wants one."""
    op = context.node.op
    if known := composite_of(op):
        return known.adjoint(context)
    if op in ADJOINTS:
        return ADJOINTS[op](context)
    return _replay(_traced(context), context)


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of a traced vjp: an `operand`, a `result`, a `grad` or the value of a `step`."""

    kind: str
    index: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operator of a traced vjp."""

    op: Op
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    type: NodeType


@dataclass(frozen=True, slots=True)
class Trace:
    """A traced vjp; `outputs` has one reference for each operand that wants a gradient."""

    steps: tuple[Instruction, ...]
    outputs: tuple[Ref | None, ...]


def _traced(context: VjpContext) -> Trace:
    """The vjp of the context's node."""
    with _traceable(context.node):
        return _trace_node(context.node, context)


class _traceable:
    """A context in which torch traces the derivative of `node`; an error there names it."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, MeshwrightError):
            raise _untraceable(self.node, error) from error


def _untraceable(node: Node, error: Exception) -> CaptureError:
    if isinstance(error, (DynamicOutputShapeException, DataDependentOutputException)):
        why = f"needs the values that `{error.func}` gives, not only their shapes"
    else:
        why = f"cannot be traced: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return CaptureError(
        f"the backward of `{node.op}` {why}",
        code="untraceable backward",
        culprit=f"{node.origin.module} {node.origin.source}".strip(),
        help="write it with other operators, or register one with `meshwright.custom` and its vjp",
    )


def _trace_node(node: Node, context: VjpContext) -> Trace:
    numbers = iter(range(len(context.operands)))
    args = freeze(map_nodes(node.args, lambda _: Slot(next(numbers))))
    kwargs = tuple(
        (key, freeze(map_nodes(value, lambda _: Slot(next(numbers)))))
        for key, value in node.kwargs.items()
    )
    return trace(
        node.op,
        args,
        kwargs,
        tuple(operand.tensor for operand in context.operands),
        tuple(operand.requires_grad for operand in context.operands),
        tuple(None if grad is None else grad.tensor for grad in context.grads),
    )


@lru_cache(maxsize=16384)
def trace(
    op: Any,
    args: tuple[Arg, ...],
    kwargs: tuple[tuple[str, Arg], ...],
    operands: tuple[TensorType, ...],
    wanted: tuple[bool, ...],
    grads: tuple[TensorType | None, ...],
) -> Trace:
    """The instructions of the vjp of `op`; `args` hold `Slot`s for the operands."""
    known = REGISTRY.get(op)
    pull = _registered_pull(known) if known else _autograd_pull

    def joint(tensors: list[torch.Tensor], cotangents: list[torch.Tensor]) -> Any:
        given = iter(cotangents)
        placed = [None if grad is None else next(given) for grad in grads]
        return pull(lambda every: _run(op, args, kwargs, every), tensors, wanted, placed)

    with fake_mode(), portable_operators():
        tensors = [fake_tensor(type) for type in operands]
        given = [fake_tensor(type) for type in grads if type is not None]
        # Autograd first, on its own: functorch refuses what torch.library differentiates.
        traced = make_fx(joint)(tensors, given)
        graph = make_fx(functionalize(traced, remove="mutations_and_views"))(tensors, given)
    return _read(op, graph.graph, len(operands), wanted, grads)


def _run(
    op: Any, args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...], tensors: list[torch.Tensor]
) -> Any:
    """`op` with tensors in the slots; also its arguments, for a registered vjp."""
    filled = tuple(_fill(arg, tensors) for arg in args)
    return filled, op(*filled, **{key: _fill(value, tensors) for key, value in kwargs})


def _autograd_pull(
    run: Callable[[list[torch.Tensor]], Any],
    tensors: list[torch.Tensor],
    wanted: tuple[bool, ...],
    grads: list[torch.Tensor | None],
) -> tuple[Any, ...]:
    """The results, then the cotangents of the wanted tensors, by autograd."""
    leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
    with torch.enable_grad():
        _, result = run(leaves)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    found = torch.autograd.grad(
        [r for r, grad in zip(results, grads, strict=True) if grad is not None],
        [leaf for leaf, want in zip(leaves, wanted, strict=True) if want],
        [grad for grad in grads if grad is not None],
        allow_unused=True,
    )
    return (*(r.detach() if isinstance(r, torch.Tensor) else r for r in results), *found)


def _registered_pull(known: CustomOp) -> Callable[..., tuple[Any, ...]]:
    """As `_autograd_pull`, by the vjp that the user registered."""

    def pull(
        run: Callable[[list[torch.Tensor]], Any],
        tensors: list[torch.Tensor],
        wanted: tuple[bool, ...],
        grads: list[torch.Tensor | None],
    ) -> tuple[Any, ...]:
        args, result = run(tensors)
        results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        cotangents = tuple(
            torch.zeros_like(r) if grad is None else grad
            for r, grad in zip(results, grads, strict=True)
        )
        found = known.vjp(cotangents, args, results)
        found = (found,) if isinstance(found, torch.Tensor) else tuple(found)
        of_tensors = [g for g, arg in zip(found, args, strict=False) if _is_tensor(arg)]
        return (*results, *(g for g, want in zip(of_tensors, wanted, strict=False) if want))

    return pull


def _is_tensor(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor)


def _fill(arg: Arg, tensors: list[torch.Tensor]) -> Arg:
    if isinstance(arg, Slot):
        return tensors[arg.index]
    if isinstance(arg, tuple):
        return [_fill(item, tensors) for item in arg]
    return arg


_ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}
_VIEWS: dict[Any, Any] = {
    aten.view_copy.default: aten.view.default,
    aten._unsafe_view.default: aten.view.default,
    aten._reshape_copy.default: aten.view.default,
    aten.expand_copy.default: aten.expand.default,
    aten.permute_copy.default: aten.permute.default,
    aten.transpose_copy.int: aten.transpose.int,
    aten.t_copy.default: aten.t.default,
    aten.unsqueeze_copy.default: aten.unsqueeze.default,
    aten.squeeze_copy.dim: aten.squeeze.dim,
    aten.squeeze_copy.dims: aten.squeeze.dims,
    aten.select_copy.int: aten.select.int,
    aten.slice_copy.Tensor: aten.slice.Tensor,
    aten.split_copy.Tensor: aten.split.Tensor,
    aten.split_with_sizes_copy.default: aten.split_with_sizes.default,
    aten.unbind_copy.int: aten.unbind.int,
    aten.detach_copy.default: aten.detach.default,
    aten.alias_copy.default: aten.alias.default,
    aten.diagonal_copy.default: aten.diagonal.default,
    aten.view_as_complex_copy.default: aten.view_as_complex.default,
    aten.view_as_real_copy.default: aten.view_as_real.default,
    aten.unfold_copy.default: aten.unfold.default,
    aten._conj_copy.default: aten.conj_physical.default,
    aten._neg_view_copy.default: aten.neg.default,
}
"""The copying forms that functionalising leaves, and the views that they stand for."""


def _read(
    op: Any,
    graph: torch.fx.Graph,
    num_operands: int,
    wanted: tuple[bool, ...],
    grads: tuple[TensorType | None, ...],
) -> Trace:
    values: dict[torch.fx.Node, Ref | Any] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    given = [i for i, grad in enumerate(grads) if grad is not None]
    for i, node in enumerate(placeholders):
        values[node] = (
            Ref("operand", i) if i < num_operands else Ref("grad", given[i - num_operands])
        )
    (output,) = (node for node in graph.nodes if node.op == "output")
    (returned,) = output.args
    results, found = returned[: len(grads)], returned[len(grads) :]
    made = {
        _unaliased(result): Ref("result", i)
        for i, result in reversed(list(enumerate(results)))
        if isinstance(result, torch.fx.Node)
    }
    if not _repeats(made, found):
        values = {**made, **values}
    reader = _Reader(op, values)
    outputs = iter([None if node is None else reader.value(node) for node in found])
    return Trace(tuple(reader.steps), tuple(next(outputs) if want else None for want in wanted))


def _repeats(results: Mapping[torch.fx.Node, Any], found: Sequence[torch.fx.Node | None]) -> bool:
    """Whether the backward computes again what the results were made of.

    It then takes the results from there too: a norm's asks where its values equal their maximum,
    and the same in another order of sums is not equal.
    """
    made_of = _behind(results, frozenset()) - set(results)
    return bool(made_of & _behind([node for node in found if node is not None], results))


def _behind(nodes: Iterable[torch.fx.Node], ends: Container[torch.fx.Node]) -> set[torch.fx.Node]:
    """The calls that compute `nodes`, those of `ends` and what is behind them left out."""
    calls: set[torch.fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = _unaliased(pending.pop())
        if node.op == "call_function" and node not in calls and node not in ends:
            calls.add(node)
            pending += node.all_input_nodes
    return calls


def _unaliased(node: torch.fx.Node) -> torch.fx.Node:
    target: Any = _VIEWS.get(node.target, node.target)
    while target in _ALIASES:
        node = node.args[0]  # type: ignore[assignment]
        target = _VIEWS.get(node.target, node.target)
    return node


class _Reader:
    """Collects, in order, the instructions that the asked-for values need."""

    def __init__(self, op: Any, values: dict[torch.fx.Node, Any]) -> None:
        self.op, self.values = op, values
        self.steps: list[Instruction] = []

    def value(self, node: torch.fx.Node) -> Any:
        """The reference of a node; its instruction is read first if it has not been."""
        node = _unaliased(node)
        if node not in self.values:
            if node.op != "call_function":
                raise PassError(
                    f"the backward of `{self.op}` holds a constant tensor",
                    help="register an operator with `meshwright.custom` and its vjp",
                )
            self.values[node] = self._read(node)
        return self.values[node]

    def _read(self, node: torch.fx.Node) -> Any:
        args = torch.fx.node.map_arg(node.args, self.value)
        kwargs = torch.fx.node.map_arg(node.kwargs, self.value)
        target = _VIEWS.get(node.target, node.target)
        if target.__module__ == "_operator":
            target = MeshOp("getitem")
        elif torch.Tag.nondeterministic_seeded in target.tags:
            raise PassError(
                f"the backward of `{self.op}` draws random numbers anew",
                help="use `torch.nn.functional.dropout`, or write the mask as an input",
            )
        self.steps.append(
            Instruction(
                target, freeze(args), tuple(sorted(freeze_dict(kwargs))), type_of(node.meta["val"])
            )
        )
        return Ref("step", len(self.steps) - 1)


def freeze_dict(kwargs: dict[str, Arg]) -> list[tuple[str, Arg]]:
    """The items of keyword arguments, hashable."""
    return [(key, freeze(value)) for key, value in kwargs.items()]


def _replay(trace: Trace, context: VjpContext) -> Cotangents:
    emitted: list[Node] = []

    def resolve(ref: Ref) -> Node:
        if ref.kind == "step":
            return emitted[ref.index]
        source = {"operand": context.operands, "result": context.results, "grad": context.grads}[
            ref.kind
        ]
        found = source[ref.index]
        assert found is not None, (context.node.name, ref)
        return found

    def fill(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return resolve(arg)
        return [fill(item) for item in arg] if isinstance(arg, tuple) else arg

    duals = {
        ref.index: (operand.placed.dual(),)
        for ref, operand in zip(trace.outputs, context.operands, strict=True)
        if ref is not None and ref.kind == "step"
    }
    for i, step in enumerate(trace.steps):
        args = tuple(fill(arg) for arg in step.args)
        if step.op == MeshOp("getitem"):
            emitted.append(context.emitter.item(args[0], args[1], context.origin))
            continue
        kwargs = {key: fill(value) for key, value in step.kwargs}
        wanted = duals.get(i, ())
        emitted.append(context.call(step.op, *args, type=step.type, wanted=wanted, **kwargs))
    return [None if ref is None else resolve(ref) for ref in trace.outputs]
