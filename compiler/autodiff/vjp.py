"""The vector-Jacobian product of one call, traced through autograd on fake tensors.

It is traced once per operator and argument types: layouts play no part, so that a hundred equal
layers on any mesh cost one trace.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from meshwright.compiler.errors import CaptureError, PassError
from meshwright.compiler.graph.custom import REGISTRY, CustomOp
from meshwright.compiler.graph.fragment import Fragment, FragmentCall, read, traced
from meshwright.compiler.graph.ir import (
    GETITEM,
    Arg,
    MeshOp,
    Node,
    NodeType,
    Op,
    Origin,
    TensorType,
)
from meshwright.compiler.graph.slots import filled, slotted
from meshwright.compiler.placing.composite import Cotangents
from meshwright.compiler.placing.emit import Emitter
from meshwright.compiler.placing.fragments import fragment_of
from meshwright.compiler.placing.result_types import result_type
from meshwright.dsl.errors import MeshwrightError, plural

aten = torch.ops.aten


class VjpContext:
    """A call to differentiate, and what emits its backward.

    `results` are the nodes that hold its results, `grads` their cotangents.
    """

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
        self.operands = node.operands()
        self.calls: list[Node] = []
        """The calls of its backward, which are placed when all are there."""
        self._items: dict[tuple[Node, int], Node] = {}

    @property
    def grad(self) -> Node:
        """The cotangent of the first result."""
        assert self.grads[0] is not None, self.node.name
        return self.grads[0]

    def arg(self, position: int, default: Arg = None) -> Arg:
        """A positional argument of the forward call."""
        return self.node.args[position] if position < len(self.node.args) else default

    def call(self, op: Op, *args: Arg, type: NodeType = None, **kwargs: Arg) -> Node:
        """Write one backward call; it is placed with the others."""
        self.calls.append(Node("", op, args, kwargs, type or result_type(op, args, kwargs)))
        return self.calls[-1]

    def item(self, source: Node, index: int) -> Node:
        """One of the results of a call of the backward."""
        if (source, index) not in self._items:
            assert isinstance(source.type, tuple)
            self._items[source, index] = self.call(GETITEM, source, index, type=source.type[index])
        return self._items[source, index]

    def items(self, source: Node) -> list[Node | None]:
        """The results of a call that has multiple."""
        assert isinstance(source.type, tuple)
        return [
            None if type is None else self.item(source, i) for i, type in enumerate(source.type)
        ]

    def placed(self, found: Cotangents) -> Cotangents:
        """What stands for the cotangents of the operands, with the calls that they need emitted."""
        if not self.calls:
            return found
        pairs = zip(self.operands, found, strict=True)
        fragment, taken = fragment_of(self.calls, found)
        wanted = [None if grad is None else x.placed.dual() for x, grad in pairs]
        return self.emitter.replay(fragment, taken, wanted, self.origin)


def traced_cotangents(context: VjpContext) -> Cotangents:
    """Emit the backward of `context.node` as autograd computes it; the cotangent of each operand
    that wants one."""
    node = context.node
    try:
        fragment = trace(
            node.op,
            *slotted(node.args, node.kwargs),
            tuple(operand.tensor for operand in context.operands),
            tuple(operand.requires_grad for operand in context.operands),
            tuple(None if grad is None else grad.tensor for grad in context.grads),
        )
    except Exception as error:
        if not isinstance(error, MeshwrightError):
            raise _untraceable(node, error) from error
        raise
    return _replay(fragment, context)


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


@lru_cache(maxsize=16384)
def trace(
    op: Any,
    args: tuple[Arg, ...],
    kwargs: tuple[tuple[str, Arg], ...],
    operands: tuple[TensorType, ...],
    wanted: tuple[bool, ...],
    grads: tuple[TensorType | None, ...],
) -> Fragment:
    """The vjp of `op`: from its operands, cotangents and results to the cotangent of each operand
    that wants one. `args` hold `Slot`s for the operands."""
    known = REGISTRY.get(op)
    pull = _registered_pull(known) if known else _autograd_pull

    def run(tensors: list[torch.Tensor]) -> Any:
        given = tuple(filled(args, tensors))
        return given, op(*given, **{key: filled(value, tensors) for key, value in kwargs})

    def joint(tensors: list[torch.Tensor]) -> Any:
        cotangents = iter(tensors[len(operands) :])
        placed = [None if grad is None else next(cotangents) for grad in grads]
        return pull(run, tensors[: len(operands)], wanted, placed)

    given = [grad for grad in grads if grad is not None]
    graph = traced(joint, (*operands, *given), functional=True)
    return _read(op, plain(graph), wanted, grads)


def _autograd_pull(
    run: Callable[[list[torch.Tensor]], Any],
    tensors: list[torch.Tensor],
    wanted: tuple[bool, ...],
    grads: list[torch.Tensor | None],
) -> tuple[Any, ...]:
    """The results, then the cotangents of the wanted tensors, as autograd computes them."""
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
    """As `_autograd_pull`, with the vjp that the user registered."""

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
        lone = isinstance(found, torch.Tensor)
        found = (found, *[None] * (len(args) - 1)) if lone else tuple(found)
        if len(found) != len(args):
            given, needed = plural(len(found), "gradient"), plural(len(args), "argument")
            raise ValueError(f"its vjp returns {given} for {needed}")
        pairs = zip(found, args, strict=True)
        of_tensors = [grad for grad, arg in pairs if isinstance(arg, torch.Tensor)]
        return (*results, *(g for g, want in zip(of_tensors, wanted, strict=True) if want))

    return pull


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


def plain(graph: torch.fx.Graph) -> torch.fx.Graph:
    """The graph with views for their copying forms, and without aliases."""
    for node in graph.nodes:
        node.target = _VIEWS.get(node.target, node.target)
        if node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
    return graph


def _read(
    op: Any, graph: torch.fx.Graph, wanted: tuple[bool, ...], grads: tuple[TensorType | None, ...]
) -> Fragment:
    """The vjp without calls that only recompute results of the forward."""
    *given, output = (node for node in graph.nodes if node.op in ("placeholder", "output"))
    (returned,) = output.args
    results, found = returned[: len(grads)], returned[len(grads) :]
    cotangents = iter(given[len(wanted) :])
    parameters = [
        *given[: len(wanted)],
        *(None if grad is None else next(cotangents) for grad in grads),
        *([None] * len(grads) if _repeats(results, found) else results),
    ]
    asked = iter(found)
    outputs = [next(asked) if want else None for want in wanted]
    fragment = read(f"the backward of `{op}`", parameters, outputs)
    if any(_is_random(call.op) for call in fragment.calls):
        raise PassError(
            f"the backward of `{op}` draws random numbers anew",
            help="use `torch.nn.functional.dropout`, or write the mask as an input",
        )
    return fragment


def _is_random(op: Op) -> bool:
    return not isinstance(op, MeshOp) and torch.Tag.nondeterministic_seeded in op.tags


def _repeats(
    results: Sequence[torch.fx.Node | None], found: Sequence[torch.fx.Node | None]
) -> bool:
    """Whether the backward recomputes values behind the results.

    It then recomputes the results too. The backward of a norm, for example, compares values with
    their maximum: one that was computed by a sum in another order equals none of them.
    """
    made = {node for node in results if node is not None}
    return bool((_behind(made, ()) - made) & _behind(found, made))


def _behind(
    nodes: Iterable[torch.fx.Node | None], ends: Container[torch.fx.Node]
) -> set[torch.fx.Node]:
    """The calls that compute `nodes`, without `ends` and the calls behind those."""
    calls: set[torch.fx.Node] = set()
    pending = [node for node in nodes if node is not None]
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node not in calls and node not in ends:
            calls.add(node)
            pending += node.all_input_nodes
    return calls


def _replay(fragment: Fragment, context: VjpContext) -> Cotangents:
    def emit(_: int, call: FragmentCall, args: tuple[Arg, ...], kwargs: dict[str, Arg]) -> Node:
        if call.op == GETITEM:
            return context.item(*args)
        return context.call(call.op, *args, type=call.type, **kwargs)

    return fragment.replay((*context.operands, *context.grads, *context.results), emit)
