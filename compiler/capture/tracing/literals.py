"""Compute beside the trace what follows from the literals of a forward.

A trace records `torch.tensor([True, False])` without its values. Here the same operators run on
real tensors too, as long as only literals go into them, so that a mask made in the forward is known
as well as one that the model holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from meshwright.compiler.graph.ir import TensorType

_LARGEST = 1 << 20
"""The most elements that are computed; a larger literal is only traced."""

_SOURCES = {
    *("tensor", "as_tensor", "asarray", "arange", "linspace", "logspace", "ones", "zeros", "full"),
    *("eye", "tril_indices", "triu_indices"),
}

_OF_ANOTHER = {
    *("new_tensor", "new_ones", "new_zeros", "new_full"),
    *("ones_like", "zeros_like", "full_like"),
}
"""Functions that take only the type or the shape of their first operand, not its values."""

_SIZED = {
    *("nonzero", "argwhere", "unique", "unique_consecutive", "repeat_interleave", "bincount"),
}
"""Functions whose result has a size that depends on values: with known values it is not traced."""


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Numbers that were read from unknown tensors."""

_CUSTOM = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
"""Operators called by name, which may do anything."""


class Literals(TorchFunctionMode):
    """Follows the literals of the forward that is traced inside this."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        self._versions: dict[int, int] = {}
        """By storage, how often it was written to when its values were last followed."""

    def value(self, tensor: Any) -> Tensor | None:
        """The values of a tensor, if they are known: it is real, or made of literals alone."""
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            return None
        if not isinstance(tensor, FakeTensor):
            return None if is_functorch_wrapped_tensor(tensor) else tensor
        found = self._found.get(id(tensor))
        if found is None or self._versions[_storage(tensor)] != tensor._version:
            return None
        return found[1]

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = self._operands(function, args, kwargs)
        if given is not None and _sizes(function, args, kwargs):
            real = _run(function, *given)
            if real is not None:
                return real
        result = function(*args, **kwargs)
        if given is not None:
            self._follow(function, given, (args, kwargs), result)
        return result

    def _operands(self, function: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The arguments with real tensors in the place of stand-ins, if all are known."""
        name = getattr(function, "__name__", "")
        if name not in _OF_ANOTHER and any(map(self._is_unknown, args)):
            return None  # Most calls of a trace end here, so this comes first.
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, _SYMBOLS) for leaf in leaves) or isinstance(function, _CUSTOM):
            return None
        if not tensors:
            return (args, kwargs) if name in _SOURCES else None
        if name.startswith(("empty", "new_empty", "resize")):
            return None
        values = []
        for leaf in leaves:
            value = self.value(leaf) if isinstance(leaf, Tensor) else leaf
            if value is None and name in _OF_ANOTHER and len(tensors) == 1 and leaf is args[0]:
                value = _like(leaf, name)
            if isinstance(leaf, Tensor) and (value is None or value.numel() > _LARGEST):
                return None
            real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
            values.append(_copy(value) if real else value)
        found: tuple[Any, Any] = pytree.tree_unflatten(values, tree)
        return found

    def _is_unknown(self, argument: Any) -> bool:
        return isinstance(argument, FakeTensor) and id(argument) not in self._found

    def _follow(
        self, function: Any, given: tuple[Any, Any], traced: tuple[Any, Any], result: Any
    ) -> None:
        made = [v for v in pytree.tree_leaves(result) if isinstance(v, FakeTensor)]
        if not made and getattr(function, "__name__", "") != "__setitem__":
            return
        if any(not _is_small(fake) for fake in made):
            return
        real = _run(function, *given)
        results = [v for v in pytree.tree_leaves(real) if isinstance(v, Tensor)]
        if [TensorType.of(v) for v in made] != [TensorType.of(v) for v in results]:
            return
        if not any(isinstance(v, Tensor) for v in pytree.tree_leaves(given)):
            results = [_copy(v) for v in results]  # `as_tensor` shares the memory of an array.
        self._found |= {id(f): (f, r) for f, r in zip(made, results, strict=True)}
        operands = [v for v in pytree.tree_leaves(traced) if id(v) in self._found]
        self._versions |= {_storage(fake): fake._version for fake in (*operands, *made)}


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    """What `function` gives outside of the trace; None if it fails or draws a random number."""
    with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        try:
            result = function(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):  # The trace raises it too.
            return None
        return result if torch.equal(before, torch.get_rng_state()) else None


def _sizes(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether the size of the result depends on values. It does not where `repeats` is a number:
    then a trace says more than a constant would."""
    name = getattr(function, "__name__", "")
    if name == "repeat_interleave":
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        return not isinstance(repeats, int)
    return name in _SIZED or (name == "where" and len(args) == 1)


def _like(tensor: Tensor, name: str) -> Tensor | None:
    """Some tensor of the type of `tensor`, and of its shape where `name` takes that."""
    if not name.startswith("new") and not _is_small(tensor):
        return None
    with _disable_current_modes():
        return torch.empty(0 if name.startswith("new") else tensor.shape, dtype=tensor.dtype)


def _copy(value: Any) -> Any:
    with _disable_current_modes():
        return value.detach().clone()


def _is_small(tensor: Tensor) -> bool:
    return all(isinstance(n, int) for n in tensor.shape) and tensor.numel() <= _LARGEST


def _storage(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place
