"""Memory that kernels need inside themselves, which no tensor shows: blocked copies, tables.

No rule gives it: it depends on the library, the processor and the number of threads. So each kind
of call is made once on this machine, on zeros, while torch's allocator is watched, and its figure
is kept in a table for the process. That is done on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig

from meshwright.compiler.graph.aliasing import is_view
from meshwright.compiler.report.memory.counter import StorageCounter

_autograd: Any = torch.autograd  # whose stubs leave out its profiler
_MOST_BYTES = 1 << 24
"""Of the tensors of a call that is tried out; of larger ones a smaller call is."""
_NUMBER_BYTES = 16
"""Of a number that is an operand: it becomes a tensor, and is cast."""
_LIBRARIES = ("aten::", "mkldnn::")
"""Those of torch's operators; one of a user's own might do more than compute."""
_LISTS = ("aten::_foreach_", "aten::_fused_")
"""Operators on lists of tensors, whose kernels need nothing."""


class Like(NamedTuple):
    """What a tensor looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The bytes from its first element to its last."""
        steps = zip(self.shape, self.stride, strict=True)
        last = sum((size - 1) * step for size, step in steps) if 0 not in self.shape else -1
        return (last + 1) * self.dtype.itemsize


class OperatorCall(NamedTuple):
    """A call of an operator, equal to others on tensors that look the same."""

    function: Any
    args: Any
    kwargs: Any


class KernelCounter(StorageCounter):  # type: ignore[no-untyped-call]
    """Counts storages, and notes what calls may need besides."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[OperatorCall, int] = {}
        """The most bytes alive after each kind of call."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = call_of(func, args, kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, self.alive + _NUMBER_BYTES)
        if call is not None:
            self._calls[call] = max(self.alive, self._calls.get(call, 0))
        return result

    def peak_with_scratch(self) -> int:
        """The most bytes alive at once, with what kernels need inside themselves. Outside of the
        context, since calls are tried out."""
        return max([self.peak, *(n + scratch_bytes(call) for call, n in self._calls.items())])


def call_of(function: Any, args: Any, kwargs: Any) -> OperatorCall | None:
    """What decides how much a call needs; None for operators that need nothing, as those that work
    element by element on one type."""
    if not _is_opaque(function):
        return None
    call = OperatorCall(function, _described(args), _described(tuple((kwargs or {}).items())))
    if torch.Tag.pointwise in function.tags and len({each.dtype for each in likes(call)}) == 1:
        return None
    try:
        hash(call)
    except TypeError:
        return None
    return call


@lru_cache(maxsize=4096)
def _is_opaque(function: Any) -> bool:
    """Whether kernels of an operator may need memory: not one that views, only makes tensors, or
    draws numbers, which a trial would take from the caller."""
    schema = getattr(function, "_schema", None)
    if schema is None or not schema.name.startswith(_LIBRARIES) or schema.name.startswith(_LISTS):
        return False
    takes = any("Tensor" in str(argument.type) for argument in schema.arguments)
    draws = torch.Tag.nondeterministic_seeded in function.tags
    return takes and not is_view(function) and not draws


def scratch_bytes(call: OperatorCall) -> int:
    """The most bytes that a call holds besides its operands and results."""
    found = likes(call)
    total = sum(each.num_bytes for each in found)
    small = call if total <= _MOST_BYTES else _smaller(call, found)
    num_threads = torch.get_num_threads()
    if _autograd._profiler_enabled():
        # There is one to a thread.
        with ThreadPoolExecutor(1) as apart:
            scratch = apart.submit(_tried, small, num_threads).result()
    else:
        scratch = _tried(small, num_threads)
    return scratch if small is call else math.ceil(scratch * total / _bytes(small))


def likes(arg: Any) -> list[Like]:
    """The tensors among arguments."""
    if isinstance(arg, Like):
        return [arg]
    return [like for item in arg for like in likes(item)] if isinstance(arg, tuple) else []


def _bytes(call: OperatorCall) -> int:
    return sum(each.num_bytes for each in likes(call))


def _smaller(call: OperatorCall, found: list[Like]) -> OperatorCall:
    """The same call with its largest sizes halved, equal ones alike, until it can be tried out."""
    sizes, small = {size: size for like in found for size in like.shape}, call
    while _bytes(small) > _MOST_BYTES and (largest := max(sizes.values())) > 1:
        sizes = {size: now // 2 if now == largest else now for size, now in sizes.items()}
        small = _mapped(call, partial(_resized, sizes=sizes))
    return small


def _resized(like: Like, sizes: dict[int, int]) -> Like:
    """A tensor of other sizes whose dims lie in memory in the same order."""
    shape, stride, step = tuple(sizes[size] for size in like.shape), list(like.stride), 1
    for dim in sorted(range(len(shape)), key=lambda i: (like.stride[i], -i)):
        if stride[dim]:
            stride[dim] = step
            step *= shape[dim]
    return Like(shape, tuple(stride), like.dtype)


@lru_cache(maxsize=4096)
def _tried(call: OperatorCall, num_threads: int) -> int:
    """What one call of the operator has the allocator give out and take back."""
    args, kwargs = _mapped(call.args, _zeros), dict(_mapped(call.kwargs, _zeros))
    try:
        with torch.no_grad(), allocations() as log:
            result = call.function(*args, **kwargs)
    except (ArithmeticError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return 0  # zeros are nothing that it can compute with
    held = peak = 0
    for _, size in log:
        held += size
        peak = max(peak, held)
    del result
    return peak - held


@contextmanager
def allocations() -> Iterator[list[tuple[str, int]]]:
    """What torch's allocator gives out and takes back on the CPU meanwhile, in order: the bytes,
    negative for what is taken back. Operators and marks that begin have a name, and 0 bytes."""
    found: list[tuple[str, int]] = []
    options = (_autograd.ProfilerState.CPU, False, True, False, False, False)
    config = _autograd.ProfilerConfig(*options, _ExperimentalConfig())
    _autograd._enable_profiler_legacy(config)
    try:
        yield found
    finally:
        for thread in _autograd._disable_profiler_legacy():
            events = (each for each in thread if each.kind() in ("push", "memory_alloc"))
            found += [(each.name(), each.cpu_memory_usage()) for each in events]


def _described(arg: Any) -> Any:
    if isinstance(arg, (tuple, list)):
        return tuple(map(_described, arg))
    return Like(tuple(arg.shape), arg.stride(), arg.dtype) if isinstance(arg, Tensor) else arg


def _mapped(arg: Any, function: Callable[[Like], Any]) -> Any:
    if isinstance(arg, Like):
        return function(arg)
    if isinstance(arg, OperatorCall):
        return OperatorCall(arg.function, *(_mapped(each, function) for each in arg[1:]))
    return tuple(_mapped(each, function) for each in arg) if isinstance(arg, tuple) else arg


def _zeros(like: Like) -> Tensor:
    memory = torch.zeros(like.num_bytes // like.dtype.itemsize, dtype=like.dtype)
    return memory.as_strided(like.shape, like.stride)
