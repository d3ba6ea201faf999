"""The global type of an operator's results: torch's own shape functions, ours for composites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import Arg, MeshOp, NodeType, Op, TensorType, map_nodes


def result_type(op: Op, args: tuple[Arg, ...], kwargs: dict[str, Arg]) -> NodeType:
    """The type, or tuple of types, that `op` gives on these arguments."""
    typed = map_nodes(args, lambda node: node.tensor)
    typed_kwargs = {
        key: map_nodes(value, lambda node: node.tensor) for key, value in kwargs.items()
    }
    if isinstance(op, MeshOp):
        return _mesh_type(op, typed)
    return _torch_type(op, freeze(typed), tuple((k, freeze(v)) for k, v in typed_kwargs.items()))


def freeze(arg: Arg) -> Arg:
    """The same argument with tuples for lists, so that it can be hashed."""
    if isinstance(arg, (list, tuple)):
        return tuple(freeze(item) for item in arg)
    return arg


@lru_cache(maxsize=1)
def fake_mode() -> FakeTensorMode:
    """The one fake mode in which operators are typed and vjps traced."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def portable_operators() -> Iterator[None]:
    """While this is open, torch takes no operator of oneDNN in place of its own.

    It would for some types (an LSTM's in float32, not in float64), and what they leave for their
    backward exists only on the device that ran them.
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
    """The type of a tensor, or of each of several."""
    if isinstance(value, torch.Tensor):
        return TensorType(tuple(int(size) for size in value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(
            TensorType(tuple(item.shape), item.dtype) if isinstance(item, torch.Tensor) else None
            for item in value
        )
    return None


MESH_TYPES: dict[str, Callable[..., NodeType]] = {}
"""The shape functions of mesh operators that do not simply keep their first operand's type."""


def mesh_type(name: str) -> Callable[[Callable[..., NodeType]], Callable[..., NodeType]]:
    """Register the shape function of a mesh operator; it is given types in place of nodes."""

    def register(function: Callable[..., NodeType]) -> Callable[..., NodeType]:
        MESH_TYPES[name] = function
        return function

    return register


def _mesh_type(op: MeshOp, args: tuple[Arg, ...]) -> NodeType:
    if op.name in MESH_TYPES:
        return MESH_TYPES[op.name](*args)
    if not args or not isinstance(args[0], TensorType):
        raise PassError(f"`{op}` has no shape function", help="register one with `mesh_type`")
    return args[0]


@mesh_type("getitem")
def _getitem(source: NodeType, index: int) -> NodeType:
    assert isinstance(source, tuple)
    return source[index]


@mesh_type("embedding")
def _embedding(weight: TensorType, index: TensorType, *_: Arg) -> NodeType:
    return TensorType((*index.shape, *weight.shape[1:]), weight.dtype)


@mesh_type("embedding_backward")
def _embedding_backward(
    grad: TensorType, index: TensorType, weight: TensorType, *_: Arg
) -> NodeType:
    return TensorType(weight.shape, grad.dtype)


@mesh_type("grouped_mm")
def _grouped_mm(x: TensorType, weight: TensorType, group: TensorType) -> NodeType:
    return TensorType((*group.shape, weight.shape[2]), x.dtype)


@mesh_type("grouped_mm_weight")
def _grouped_mm_weight(
    x: TensorType, grad: TensorType, group: TensorType, num_groups: int
) -> NodeType:
    return TensorType((num_groups, x.shape[-1], grad.shape[2]), grad.dtype)


@mesh_type("random")
def _random(
    like: TensorType | None, shape: tuple[int, ...], kind: str, dtype: torch.dtype, *_: Arg
) -> NodeType:
    return TensorType(tuple(shape), dtype)


@mesh_type("standard_gamma")
@mesh_type("dirichlet")
@mesh_type("poisson")
def _sampled(x: TensorType, shape: tuple[int, ...], *_: Arg) -> NodeType:
    """The shape is given too: a padded operand would draw other numbers."""
    return TensorType(tuple(shape), x.dtype)


@mesh_type("binomial")
def _binomial(count: TensorType, p: TensorType, shape: tuple[int, ...], *_: Arg) -> NodeType:
    return TensorType(tuple(shape), count.dtype)


def statistic(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of values of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@mesh_type("cross_entropy")
def _cross_entropy(logits: TensorType, target: TensorType, *_: Arg) -> NodeType:
    rows = TensorType(logits.shape[:-1], statistic(logits.dtype))
    return (rows, rows)


@mesh_type("cross_entropy_backward")
def _cross_entropy_backward(grad_rows: TensorType, logits: TensorType, *_: Arg) -> NodeType:
    return logits


@mesh_type("norm")
def _norm(x: TensorType, *rest: Arg) -> NodeType:
    rows = TensorType(x.shape[:-1], statistic(x.dtype))
    return (x, rows if rest[-1] == "layer" else None, rows)


@mesh_type("norm_backward")
def _norm_backward(
    grad: TensorType,
    x: TensorType,
    mean: TensorType,
    rstd: TensorType,
    weight: TensorType | None,
    bias: TensorType | None,
    *_: Arg,
) -> NodeType:
    return (x, weight, bias)


@mesh_type("attention")
def _attention(q: TensorType, k: TensorType, v: TensorType, *_: Arg) -> NodeType:
    out = TensorType((*q.shape[:-1], v.shape[-1]), q.dtype)
    return (out, TensorType(q.shape[:-1], statistic(q.dtype)))


@mesh_type("attention_backward")
def _attention_backward(
    grad: TensorType,
    q: TensorType,
    k: TensorType,
    v: TensorType,
    out: TensorType,
    lse: TensorType,
    bias: TensorType | None,
    *rest: Arg,
) -> NodeType:
    return (q, k, v, bias if rest[-1] else None)


@mesh_type("extend")
def _extend(x: TensorType, dim: int, size: int) -> NodeType:
    return TensorType((*x.shape[:dim], size, *x.shape[dim + 1 :]), x.dtype)


@mesh_type("cross_entropy_combine")
def _cross_entropy_combine(stats: TensorType, *_: Arg) -> NodeType:
    rows = TensorType(stats.shape[2:], stats.dtype)
    return (rows, rows)


@mesh_type("norm_backward_sums")
def _norm_backward_sums(grad: TensorType, x: TensorType, *_: Arg) -> NodeType:
    return TensorType((2, *x.shape[:-1]), statistic(x.dtype))


@mesh_type("norm_backward_apply")
def _norm_backward_apply(sums: TensorType, *backward: Arg) -> NodeType:
    return _norm_backward(*backward)
