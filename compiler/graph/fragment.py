"""Traced pieces of graphs: what an operator is made of, and what its backward is.

A function of tensors is run on fake ones, once for the shapes and types of its arguments. The
operators that it calls are kept as a `Fragment`, which is replayed on nodes wherever it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import GETITEM, Arg, MeshOp, Node, NodeType, Op, TensorType
from meshwright.compiler.graph.slots import Slot, filled, freeze
from meshwright.compiler.graph.types import fake_mode, fake_tensor, portable_operators, type_of


@dataclass(frozen=True, slots=True)
class FragmentCall:
    """One call of a fragment; the `Slot`s of its arguments count the parameters, then the calls."""

    op: Op
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    type: NodeType


Emit = Callable[[int, FragmentCall, tuple[Arg, ...], dict[str, Arg]], Node]
"""Emits the call in a slot, with these arguments."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of a graph: calls on parameters, in an order in which they can run."""

    calls: tuple[FragmentCall, ...]
    results: tuple[int | None, ...]
    """The slot of each result; `None` where there is no result."""

    def replay(self, parameters: Iterable[Node | None], emit: Emit) -> list[Node | None]:
        """The results on these parameters, each call emitted by `emit`."""
        values = list(parameters)
        for call in self.calls:
            own = tuple if isinstance(call.op, MeshOp) else list
            args = tuple(filled(arg, values, own) for arg in call.args)
            kwargs = {key: filled(value, values, own) for key, value in call.kwargs}
            values.append(emit(len(values), call, args, kwargs))
        return [None if slot is None else values[slot] for slot in self.results]


def traced(
    function: Callable[..., Any], parameters: Sequence[TensorType], *, functional: bool = False
) -> torch.fx.Graph:
    """The operators that `function` calls on a list of tensors of these types.

    With `functional`, those that write in place or return views are replaced by others.
    """
    with fake_mode(), portable_operators():
        tensors = [fake_tensor(type) for type in parameters]
        module = make_fx(function)(tensors)
        if functional:
            # Traced before: functorch refuses what torch.library differentiates.
            module = make_fx(functionalize(module, remove="mutations_and_views"))(tensors)
    return module.graph


def read(
    what: str,
    parameters: Sequence[torch.fx.Node | None],
    results: Sequence[torch.fx.Node | None],
    calls_in_order: Iterable[torch.fx.Node] = (),
) -> Fragment:
    """The calls that compute `results` from `parameters`: `calls_in_order`, and the others each
    just before it is first needed. None stands for an unused parameter, or for no result.

    Raises `PassError` where `what` needs a tensor that is neither given nor computed.
    """
    slots = {node: i for i, node in reversed(list(enumerate(parameters))) if node is not None}
    calls: list[FragmentCall] = []

    def slot(node: torch.fx.Node) -> Any:
        if node not in slots:
            if node.op != "call_function":
                raise PassError(
                    f"{what} holds a constant tensor",
                    help="register an operator with `meshwright.custom` and its vjp",
                )
            args = freeze(torch.fx.node.map_arg(node.args, slot))
            named: Any = torch.fx.node.map_arg(node.kwargs, slot)
            kwargs = tuple((key, freeze(named[key])) for key in sorted(named))
            op = node.target if isinstance(node.target, torch._ops.OpOverload) else GETITEM
            slots[node] = len(parameters) + len(calls)
            calls.append(FragmentCall(op, args, kwargs, type_of(node.meta["val"])))
        return Slot(slots[node])

    for node in (*calls_in_order, *results):
        if node is not None:
            slot(node)
    return Fragment(tuple(calls), tuple(None if node is None else slots[node] for node in results))
