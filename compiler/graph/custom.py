"""Registered operators: what the compiler is told about code that it cannot look into.

    round_ste = custom(RoundSTE, rule="... -> ...", vjp=lambda grads, inputs, outputs: (grads[0],))

A custom `autograd.Function`, or a plain function of tensors, becomes one operator of torch's
library, `meshwright_custom::<name>`, with a rule as in the rules table and a hand-written vjp.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from meshwright.compiler.errors import CaptureError

NAMESPACE = "meshwright_custom"
Vjp: TypeAlias = "Callable[[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]], Any]"


@dataclass(frozen=True, slots=True)
class CustomOp:
    """What is known of one operator.

    `vjp(grads, inputs, outputs)` takes one cotangent per output, all arguments of the call (also
    those that are not tensors) and the outputs; it returns one value per argument, None where there
    is no gradient, or a lone tensor for the first argument. It is traced: use torch operators.
    """

    name: str
    rule: str
    vjp: Vjp
    num_returned: int = 0
    """How many of its first operands it returns as they are. If any, it has no rule, only a vjp."""


REGISTRY: dict[torch._ops.OpOverload, CustomOp] = {}
"""Every operator made so far; one is made when its function is first called."""


@dataclass(slots=True)
class Registered:
    """A function with its rule and vjp; a call is one operator, made for its kinds of arguments."""

    name: str
    function: Callable[..., Any]
    known: CustomOp
    signature: inspect.Signature | None
    """How keyword arguments become positional; None for a function in C, which takes none."""
    overloads: dict[tuple[str, ...], Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.signature is not None:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args = (*bound.args, *bound.kwargs.values())
        kinds = tuple(_kind(value, self.name) for value in args)
        if kinds not in self.overloads:
            self.overloads[kinds] = self._define(kinds, args)
        return self.overloads[kinds](*args)

    def _define(self, kinds: tuple[str, ...], args: tuple[Any, ...]) -> Callable[..., Any]:
        with torch.no_grad():
            result = self.function(*args)
        count = None if isinstance(result, Tensor) else len(result)
        name = f"{self.name}_{len(self.overloads)}" if self.overloads else self.name
        run = functools.partial(_without_aliases, self.function)
        return _defined(name, run, kinds, count, self.known)


_FUNCTIONS: dict[type[torch.autograd.Function], Registered] = {}
_NAMES: dict[str, int] = {}


def custom(
    function: Callable[..., Any] | type[torch.autograd.Function], *, rule: str, vjp: Vjp
) -> Any:
    """Register a function that cannot be traced, and return what a model should call.

    - `function`: an `autograd.Function`, or a function of tensors, numbers and strings that returns
      a tensor or a tuple of them. The class itself is returned for a class: its `apply` becomes one
      operator when a model is captured, and stays what it was elsewhere. For a plain function a
      new one with the same arguments is returned, which `vjp` differentiates everywhere.
    - `rule`: the dims of each tensor argument and result by name, as an einsum has them:
      `"... i, o i -> ... o"`. A dim that a result lacks is summed over; `n!` must be whole on a
      rank; `...` stands for any leading dims. Other dims are computed on each rank's part.
    - `vjp`: called as `vjp(grads, inputs, outputs)` with a gradient for each output, all arguments
      and the outputs. It returns a tuple with a gradient for each argument, None where there is
      none, or a lone tensor for the first. It is traced: use torch's operators.

    The function must treat a part of its tensors as it treats the whole, and keep no state.
    """
    name = _unique(getattr(function, "__name__", ""))
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        run, taken = _forward_of(function)
        _FUNCTIONS[function] = Registered(name, run, CustomOp(name, rule, vjp), taken)
        return function
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C
        signature = None
    return Registered(name, function, CustomOp(name, rule, vjp), signature)


def registered(function: type[torch.autograd.Function]) -> Registered | None:
    """What `custom` was told about this class."""
    return _FUNCTIONS.get(function)


def returning_first(stem: str, vjp: Any, num_operands: int) -> Any:
    """An operator of `num_operands` tensors that returns the first `len(vjp.places)` of them.

    In the backward `vjp` says what their gradients mean for the others.
    """
    name, count = _unique(stem), len(vjp.places)

    def first(*tensors: Tensor) -> Any:
        found = tuple(tensor.clone() for tensor in tensors[:count])
        return found[0] if count == 1 else found

    known = CustomOp(name, "", vjp, num_returned=count)
    kinds = ("Tensor",) * num_operands
    return _defined(name, first, kinds, None if count == 1 else count, known)


def _defined(
    name: str,
    function: Callable[..., Any],
    kinds: Sequence[str],
    count: int | None,
    known: CustomOp,
) -> Callable[..., Any]:
    """A new operator of torch's library that returns one tensor, or a tuple of `count`."""
    taken = ", ".join(f"{kind} a{place}" for place, kind in enumerate(kinds))
    returns = "Tensor" if count is None else f"({', '.join(['Tensor'] * count)})"
    made = torch.library.custom_op(
        f"{NAMESPACE}::{name}", function, mutates_args=(), schema=f"({taken}) -> {returns}"
    )
    made.register_fake(function)
    made.register_autograd(functools.partial(_backward, known.vjp), setup_context=_setup_context)
    REGISTRY[getattr(getattr(torch.ops, NAMESPACE), name).default] = known
    return made


def _unique(stem: str) -> str:
    stem = re.sub(r"\W", "_", stem).strip("_") or "function"
    stem = f"{stem}_" if keyword.iskeyword(stem) else stem
    _NAMES[stem] = count = _NAMES.get(stem, -1) + 1
    return f"{stem}__{count}" if count else stem


def _forward_of(function: Any) -> tuple[Callable[..., Any], inspect.Signature]:
    """`forward` without the context, and the arguments that `apply` takes."""
    if has_setup_context(function):
        return function.forward, signature_of(function)

    def run(*args: Any) -> Any:
        context: Any = FunctionCtx()
        context.needs_input_grad = (True,) * len(args)
        return function.forward(context, *args)

    return run, signature_of(function)


def has_setup_context(function: Any) -> bool:
    """Whether an `autograd.Function` is in the style whose `forward` is given no context."""
    return function.setup_context is not torch.autograd.Function.setup_context


def signature_of(function: Any) -> inspect.Signature:
    """The arguments that `apply` of an `autograd.Function` takes."""
    signature = inspect.signature(function.forward)
    if has_setup_context(function):
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _without_aliases(function: Callable[..., Any], *args: Any) -> Any:
    """An operator of torch's library may not return its operands or views of them."""
    result = function(*args)
    if isinstance(result, Tensor):
        return result.clone()
    return tuple(value.clone() for value in result)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    outputs = (output,) if isinstance(output, Tensor) else tuple(output)
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.rest = tuple(None if isinstance(value, Tensor) else (value,) for value in inputs)
    ctx.save_for_backward(*tensors, *outputs)


def _backward(vjp: Vjp, ctx: Any, *grads: Any) -> Any:
    saved = iter(ctx.saved_tensors)
    inputs = tuple(next(saved) if rest is None else rest[0] for rest in ctx.rest)
    flat: Sequence[Any] = grads[0] if isinstance(grads[0], (tuple, list)) else grads
    result = vjp(tuple(flat), inputs, tuple(saved))
    return result if isinstance(result, tuple) else (result, *[None] * (len(inputs) - 1))


def _kind(value: Any, name: str) -> str:
    """The schema type of an argument."""
    for kind, types in _KINDS:
        if isinstance(value, types):
            return kind
    if value is None:
        return "Tensor?"
    if isinstance(value, (tuple, list)) and value:
        inner = {_kind(item, name) for item in value}
        if len(inner) == 1 and inner <= _LISTED:
            return f"{inner.pop()}[]"
    raise CaptureError(
        f"`{name}` is given a `{type(value).__name__}`, which no operator can take",
        help="pass tensors, numbers, strings, or lists of numbers or of strings",
    )


_KINDS: tuple[tuple[str, type], ...] = (
    ("Tensor", Tensor),
    ("bool", bool),
    ("int", int),
    ("float", float),
    ("str", str),
)
_LISTED = {"bool", "int", "float", "str"}
"""The kinds of which an argument may be a list: a rule has one term for each tensor."""
