"""Large matrix products in float32 on a CPU, by oneDNN where torch's own take twice as long.

Torch's wheels multiply with MKL, which uses AVX-512 on Intel's processors alone. On an EPYC with
AVX-512 it does 95 GFLOP/s per core in float32 and oneDNN, which is in the same wheels, 215. What
torch does faster stays torch's: 64-bit numbers, small products, and all on other processors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.kernels.blocks import enough

# Multiplications from which on the longer way to oneDNN pays (measured: even at 2**20), and the
# least that every dim has: with fewer a product is bound by memory.
LEAST_PRODUCT = 1 << 21
LEAST_DIM = 32
BLOCK = 1 << 20
"""Elements of the products and operands that a large total is given one after the other."""


def is_large(rows: int, inner: int, columns: int) -> bool:
    """Whether a product of `[rows, inner]` and `[inner, columns]` is long enough to be worth it."""
    return min(rows, inner, columns) >= LEAST_DIM and rows * inner * columns >= LEAST_PRODUCT


def is_faster(device: torch.device) -> bool:
    """Whether oneDNN multiplies faster than torch on this machine: a rule, not a measurement, so
    that every run gives the same bits."""
    if device.type != "cpu" or not (torch._C.has_mkl and torch._C._has_mkldnn):
        return False
    # Older releases of torch have no such function. SSE4a is in AMD's processors alone.
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch._C._get_mkldnn_enabled() and bool(known.get("avx512_f") and known.get("sse4a"))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x[..., k]` by `weight[n, k]`, and `bias[n]`."""
    if not (_has_rows(weight) or _has_rows(weight.t())):
        weight = weight.contiguous()
    call = torch.ops.mkldnn._linear_pointwise.default
    # It reads a bias as if that were contiguous.
    dense = None if bias is None else bias.contiguous()
    found: Tensor = call(x.contiguous(), weight, dense, "none", [], "")
    return found


def _has_rows(matrix: Tensor) -> bool:
    """Whether the entries of a row are next to each other, and rows do not overlap."""
    step, between = matrix.stride()
    return between == 1 and step >= matrix.shape[1]


def matmul(x: Tensor, b: Tensor) -> Tensor:
    """`x[..., k]` by `b[k, n]`."""
    return linear(x, b.t())


def addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a[m, k]` by `b[k, n]`, and `bias[n]`."""
    return linear(a, b.t(), bias)


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`a[m, k]` by `b[k, n]`."""
    if out is None and a.is_contiguous():
        return linear(a, b.t())
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]))
    return _in_blocks(out, a, b, Tensor.copy_)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`a[e, m, k]` by `b[e, k, n]`, a product for each e."""
    out = a.new_empty((*a.shape[:2], b.shape[2]))
    for each in zip(out, a, b, strict=True):
        _in_blocks(*each, Tensor.copy_)
    return out


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total[m, n]` with the product of `a[m, k]` and `b[k, n]` added to it, in place."""
    return _in_blocks(total, a, b, Tensor.add_)


def _in_blocks(
    out: Tensor, a: Tensor, b: Tensor, put: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Products of some rows at a time, put into `out`: oneDNN writes to memory of its own only, and
    reads `a` by rows."""
    step = max(LEAST_DIM, BLOCK // max(b.shape))
    for start in enough(range(0, len(a), step), a):
        block = slice(start, start + step)
        put(out[block], linear(a[block], b.t()))
    return out


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _bmm_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:2], b.shape[2]))


def _as_operator(
    function: Callable[..., Tensor], signature: str, shape: Callable[..., Tensor]
) -> torch._ops.OpOverload:
    """A product as an operator of torch, whose result `shape` makes without data."""
    name = f"large_{function.__name__}"
    _LIBRARY.define(f"{name}{signature} -> Tensor")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"meshwright::{name}", shape, lib=_LIBRARY)
    found: torch._ops.OpOverload = getattr(torch.ops.meshwright, name).default
    return found


_LIBRARY = torch.library.Library("meshwright", "FRAGMENT")  # type: ignore[no-untyped-call]
_LINEAR = _as_operator(linear, "(Tensor x, Tensor weight, Tensor? bias=None)", _linear_shape)
_BMM = _as_operator(bmm, "(Tensor a, Tensor b)", _bmm_shape)
OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    linear: _LINEAR,
    matmul: lambda x, b: _LINEAR(x, b.t()),
    addmm: lambda bias, a, b: _LINEAR(a, b.t(), bias),
    mm: lambda a, b: _LINEAR(a, b.t()),
    bmm: _BMM,
}
"""The products for a compiler of kernels, to which each is one call that it leaves as it is."""
