"""A custom `autograd.Function` in the graph: its forward inline, its backward as an adjoint.

Before:  y = Gelu.apply(x)
Traced:  y0 = <the operators of Gelu.forward, without gradients>
         y  = meshwright_custom::Gelu(y0, x, saved)

The operator returns `y0`; its vjp runs the class's own `backward` on what the forward saved. Both
sides are made of torch operators, and so are laid out by rules under any plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils import _pytree as pytree

from meshwright.compiler.autodiff import vjp
from meshwright.compiler.capture.origin import current_line
from meshwright.compiler.errors import CaptureError, PassError
from meshwright.compiler.graph.custom import (
    REGISTRY,
    has_setup_context,
    returning_first,
    signature_of,
)
from meshwright.compiler.graph.ir import Graph, Node
from meshwright.compiler.graph.slots import Slot
from meshwright.dsl.errors import MeshwrightError

Function = type[torch.autograd.Function]


class Context(FunctionCtx):
    """What a `forward` and a `backward` see as `ctx`; attributes are the function's own."""

    def __init__(self, needs_input_grad: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs_input_grad)
        self.to_save: tuple[Any, ...] = ()
        self.non_differentiable: tuple[Any, ...] = ()
        self.materialize_grads = True

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        return self.to_save

    def save_for_forward(self, *tensors: Any) -> None: ...

    def mark_dirty(self, *tensors: Any) -> None:
        raise CaptureError(
            "a custom autograd.Function writes to its input (`mark_dirty`)",
            code="function",
            culprit=current_line(),
            help="return a new tensor from its forward instead",
        )


def traced(function: Function, *args: Any, **kwargs: Any) -> Any:
    """The results of `apply` with these arguments: operators, and one that carries the backward."""
    if has_setup_context(function):
        bound = signature_of(function).bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    inputs = (*args, *kwargs.values())
    needs = [isinstance(arg, Tensor) and arg.requires_grad for arg in inputs]
    context = Context(needs)
    with torch.no_grad():
        output = _forward(function, context, args, kwargs)
    if not torch.is_grad_enabled() or not any(needs):
        return output
    results = list(output) if isinstance(output, (tuple, list)) else [output]
    places = [i for i, result in enumerate(results) if _has_gradient(result, context)]
    if not places:
        return output
    context.non_differentiable = ()
    leaves, tree = pytree.tree_flatten(vars(context))
    held = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    pull = _Backward(
        function,
        tree,
        tuple(None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves),
        tuple(isinstance(arg, Tensor) for arg in inputs),
        tuple(places),
        len(results),
        line=current_line(),
    )
    operands = [*(results[i] for i in places), *(a for a in inputs if isinstance(a, Tensor)), *held]
    attached = _operator(pull, len(operands))(*operands)
    for place, value in zip(places, pytree.tree_leaves(attached), strict=True):
        results[place] = value
    return tuple(results) if isinstance(output, (tuple, list)) else results[0]


def check_backwards(graph: Graph) -> None:
    """Raise `CaptureError` for a custom function whose backward cannot be traced."""
    for node in graph.nodes:
        known = REGISTRY.get(node.op)  # type: ignore[arg-type]  # a mesh operator is in no registry
        if known is not None and isinstance(known.vjp, _Backward) and node.requires_grad:
            _check(node, known.vjp)


def _check(node: Node, backward: _Backward) -> None:
    operands = list(node.operands())
    types = node.type if isinstance(node.type, tuple) else (node.type,)
    slots = tuple(Slot(i) for i in range(len(operands)))
    wanted = tuple(operand.requires_grad for operand in operands)
    with _tracing(backward.function, "backward", backward.line):
        vjp.trace(node.op, slots, (), tuple(o.tensor for o in operands), wanted, types)


@contextmanager
def _tracing(function: Function, part: str, line: str) -> Iterator[None]:
    """Turn each error into one that names the function while this is open."""
    try:
        yield
    except PassError as error:
        raise _cannot_trace(function, part, error.problem, line) from error
    except MeshwrightError:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "no message")
        raise _cannot_trace(function, part, f"{type(error).__name__}: {first}", line) from error


def _cannot_trace(function: Function, part: str, why: str, line: str) -> CaptureError:
    """The error for a function that must be registered with `mw.custom`."""
    given = ", ".join(signature_of(function).parameters)
    returned = ", ".join(f"grad_{name}" for name in signature_of(function).parameters)
    many = "," if "," not in returned else ""
    name = function.__qualname__.rpartition(".")[2]
    return CaptureError(
        f"the {part} of `{name}`, a custom autograd.Function, cannot be traced: {why}",
        code="function",
        culprit=line,
        help=f"register it: `mw.custom({name}, rule=..., vjp=vjp)` with `def vjp(grads, inputs, "
        f"outputs)`, where `inputs` is `({given}{many})` and `({returned}{many})` is returned",
    )


@dataclass(frozen=True)
class _Backward:
    """The vjp of one kind of call; equal for calls that differ in their tensors alone.

    The operands are the differentiable results, the tensor arguments, and what `ctx` held.
    """

    function: Function
    tree: pytree.TreeSpec
    constants: tuple[tuple[Any] | None, ...]
    """The leaves of the context, boxed; None for a tensor, which is an operand."""
    tensors: tuple[bool, ...]
    """Which arguments of `apply` are tensors."""
    places: tuple[int, ...]
    """The results that have gradients."""
    num_results: int
    line: str = field(compare=False, default="")

    def __call__(
        self, grads: tuple[Any, ...], inputs: tuple[Any, ...], outputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        first, last = len(self.places), len(self.places) + sum(self.tensors)
        held = iter(inputs[last:])
        leaves = [next(held) if box is None else box[0] for box in self.constants]
        context = Context(())
        vars(context).update(pytree.tree_unflatten(leaves, self.tree))
        given: list[Any] = [None] * self.num_results
        for place, grad, result in zip(self.places, grads, inputs, strict=False):
            missing = torch.zeros_like(result) if context.materialize_grads else None
            given[place] = missing if grad is None else grad
        found = self.function.backward(context, *given)
        found = list(found) if isinstance(found, (tuple, list)) else [found]
        wanted = [g for g, tensor in zip(found, self.tensors, strict=False) if tensor]
        fitted = [_fitted(g, x) for g, x in zip(wanted, inputs[first:last], strict=True)]
        return (*[None] * first, *fitted, *[None] * (len(inputs) - last))


_OPERATORS: dict[Any, Any] = {}


def _operator(backward: _Backward, num_operands: int) -> Any:
    """The operator of these calls: layers that call one function alike share it."""
    try:
        if (backward, num_operands) not in _OPERATORS:
            made = returning_first(backward.function.__name__, backward, num_operands)
            _OPERATORS[backward, num_operands] = made
        return _OPERATORS[backward, num_operands]
    except TypeError:  # something that is not hashable on the context
        return returning_first(backward.function.__name__, backward, num_operands)


def _forward(function: Any, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _tracing(function, "forward", current_line()):
        if not has_setup_context(function):
            return function.forward(context, *args, **kwargs)
        output = function.forward(*args, **kwargs)
        function.setup_context(context, args, output)
        return output


def _has_gradient(value: Any, context: Context) -> bool:
    floating = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return floating and all(value is not other for other in context.non_differentiable)


def _fitted(grad: Any, like: Tensor) -> Any:
    """A gradient in the shape and type of its argument, as autograd itself brings it there."""
    if not isinstance(grad, Tensor):
        return grad
    return grad.sum_to_size(like.shape).to(like.dtype)
