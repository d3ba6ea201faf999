"""The global types of values; those of torch's operators come from its own shape functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.compiler.graph.ir import Arg, NodeType, Op, TensorType
from meshwright.compiler.graph.slots import freeze

aten = torch.ops.aten


def torch_type(op: Op, args: tuple[Arg, ...], kwargs: Mapping[str, Arg]) -> NodeType:
    """The type, or tuple of types, that a torch operator gives; types stand for its operands."""
    return _torch_type(op, freeze(args), tuple((k, freeze(v)) for k, v in kwargs.items()))


_NORMS = {
    aten.native_layer_norm.default: (0, 2),
    aten.native_group_norm.default: (0, 1),
    aten.native_group_norm_backward.default: (1, 4),
}
"""Operators whose first result is of the type of what they normalise, and the others, where it is
narrower, of the type of the weight: the positions of both. Torch's fakes give other types."""


class Fakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Torch's fake mode, with the types that operators give when they run."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found: Any = super().__torch_dispatch__(func, types, args, kwargs or {})
        if func not in _NORMS:
            return found
        x, weight = (args[place] for place in _NORMS[func])
        if weight is None or weight.dtype == x.dtype:
            return found
        first, *others = found
        typed = [(first, x), *((each, weight) for each in others)]
        return tuple(each if each is None else _as(each, like.dtype) for each, like in typed)


def _as(fake: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return fake if fake.dtype == dtype else torch.empty_like(fake, dtype=dtype)


@lru_cache(maxsize=1)
def fake_mode() -> FakeTensorMode:
    """The one fake mode in which operators are typed and vjps traced."""
    return Fakes()


@contextmanager
def portable_operators() -> Iterator[None]:
    """While this is open, torch takes no operator of oneDNN in place of its own.

    It does for some types (for an LSTM in float32, not in float64), and what those operators save
    for their backward exists only on the device that ran them.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def fake_tensor(type: TensorType) -> torch.Tensor:
    """A contiguous fake tensor of this type; must be called inside `fake_mode()`."""
    return torch.empty(type.shape, dtype=type.dtype)


@lru_cache(maxsize=65536)
def _torch_type(op: Any, args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...]) -> NodeType:
    with fake_mode():
        result = op(*_thaw(args, _list_positions(op)), **{key: _thaw(v) for key, v in kwargs})
    return type_of(result)


@lru_cache(maxsize=4096)
def _list_positions(op: Any) -> frozenset[int]:
    """Positional arguments that the schema wants as a list of optional tensors (indices)."""
    return frozenset(i for i, a in enumerate(op._schema.arguments) if "Tensor?[]" in str(a.type))


def _thaw(arg: Arg, lists: frozenset[int] = frozenset()) -> Arg:
    if isinstance(arg, TensorType):
        return fake_tensor(arg)
    if isinstance(arg, tuple):
        return [_thaw(item) for item in arg] if not lists else tuple(_thaw(item) for item in arg)
    return arg


def type_of(value: Any) -> NodeType:
    """The type of a tensor, or of each of multiple tensors."""
    if isinstance(value, torch.Tensor):
        return TensorType.of(value)
    if isinstance(value, (tuple, list)):
        return tuple(
            TensorType.of(item) if isinstance(item, torch.Tensor) else None for item in value
        )
    return None
