"""Leave out what means nothing in a functional graph, and give the rest one spelling.

identity   alias, contiguous, clone, lift_fresh_copy; a cast, view, slice or expand that changes
           nothing; dropout that is off; `cat` of one tensor (caches join to an empty one)
reshape    view, reshape, flatten, unflatten, view_as, _unsafe_view, with the sizes written out
to         to.dtype, to.device, to.dtype_layout, _to_copy, type_as: a cast to an element type
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from meshwright.compiler.graph.ir import Arg, Node, Op, TensorType

_aten = torch.ops.aten

RESHAPE: Op = _aten.reshape.default
CAST: Op = _aten.to.dtype

_COPIES = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.lift_fresh_copy.default,
    _aten.lift_fresh.default,
    _aten.lift.default,
}
_RESHAPES = {
    _aten.view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.view_as.default,
    _aten._unsafe_view.default,
    _aten.reshape_as.default,
}
_CASTS = {
    _aten.to.dtype,
    _aten.to.device,
    _aten.to.dtype_layout,
    _aten.to.other,
    _aten._to_copy.default,
    _aten.type_as.default,
}
_SAME_IF_SAME_SHAPE = {_aten.expand.default, _aten.expand_as.default, _aten.slice.Tensor}
_DETACHES = {_aten.detach.default, _aten.detach_.default}

Call = tuple[Op, tuple[Arg, ...], dict[str, Arg]]


def simplify(op: Op, args: tuple[Arg, ...], kwargs: Mapping[str, Arg], type: Any) -> Node | Call:
    """The node that this call equals, or the call in its one spelling."""
    if op is _aten.cat.default:
        return _simplify_cat(args, kwargs)
    if op is _aten.copy.default and isinstance(args[1], Node) and isinstance(type, TensorType):
        return _simplify_copy(args[1], type) or (op, args, dict(kwargs))
    source = args[0] if args else None
    if isinstance(source, Node) and isinstance(type, TensorType):
        if _is_identity(op, args, source, type):
            return source
        if op in _RESHAPES:
            return RESHAPE, (source, list(type.shape)), {}
        if op in _CASTS:
            return CAST, (source, type.dtype), {}
    return op, args, {key: value for key, value in kwargs.items() if not _is_noise(key, value)}


def names_dtype(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is a cast to an element type that it names."""
    return op in _CASTS and any(isinstance(each, torch.dtype) for each in (*args, *kwargs.values()))


def _is_identity(op: Op, args: tuple[Arg, ...], source: Node, type: TensorType) -> bool:
    same = source.type == type
    if op in _COPIES or op in _CASTS or op in _RESHAPES:
        return same
    if op in _SAME_IF_SAME_SHAPE:
        return same
    if op is _aten.dropout.default:
        return args[1] == 0 or not args[2]
    return op in _DETACHES and not source.requires_grad


def _simplify_cat(args: tuple[Arg, ...], kwargs: Mapping[str, Arg]) -> Node | Call:
    """`cat` without the empty one-dimensional tensors that it skips."""
    kept = [part for part in args[0] if part.tensor.shape != (0,)] or args[0][:1]
    if len(kept) == 1 and len({part.tensor.dtype for part in args[0]}) == 1:
        return kept[0]  # type: ignore[no-any-return]  # arguments are not typed
    return _aten.cat.default, (kept, *args[1:]), dict(kwargs)


def _simplify_copy(source: Node, type: TensorType) -> Node | Call | None:
    """`copy(x, source)` is `source` in the shape and type of `x`; it has no derivative itself."""
    if source.type == type:
        return source
    if source.tensor.shape == type.shape:
        return CAST, (source, type.dtype), {}
    if source.tensor.dtype == type.dtype:
        return _aten.expand.default, (source, list(type.shape)), {}
    return None


def _is_noise(key: str, value: Arg) -> bool:
    """Whether a keyword is one that every factory carries and that says nothing."""
    return (key, value) in (("pin_memory", False), ("layout", torch.strided)) or value is None
