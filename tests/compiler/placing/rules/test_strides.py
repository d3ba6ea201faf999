"""Operators as generated code calls them give the same numbers whatever the strides of an operand.

Sharding changes strides: a rank's part may be a slice, a transposed gather or an expanded value
where the model's own tensor was contiguous.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from meshwright.compiler.codegen.functions import FAST
from meshwright.compiler.codegen.lowering import OUT
from meshwright.compiler.graph.ir import MeshOp
from tests.compiler.placing.rules.brute import Sample
from tests.compiler.placing.rules.samples import SAMPLES
from tests.compiler.strides import strided

TORCH_SAMPLES = [sample for sample in SAMPLES if not isinstance(sample.op, MeshOp)]


def _run(sample: Sample, operands: list[Any], spec: Any) -> list[Any]:
    args, kwargs = tree_unflatten(operands, spec)
    function: Any = FAST[sample.op][1] if sample.op in FAST else sample.op
    torch.manual_seed(0)
    return tree_leaves(function(*args, **kwargs))


def _unwritten(sample: Sample) -> bool:
    """Whether the result is memory that nothing was written to."""
    return "empty" in str(sample.op)


@pytest.mark.parametrize("sample", [s for s in TORCH_SAMPLES if not _unwritten(s)], ids=str)
def test_an_operator_takes_operands_of_any_strides(sample: Sample) -> None:
    operands, spec = tree_flatten((sample.args, sample.kwargs))
    places = [i for i, x in enumerate(operands) if isinstance(x, Tensor)]
    expected = _run(sample, operands, spec)
    for place in places:
        for name, x in strided(operands[place]):
            given = [*operands[:place], x, *operands[place + 1 :]]
            for ours, theirs in zip(_run(sample, given, spec), expected, strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True, msg=f"{place} {name}")


def _f(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


BUCKETED = {
    torch.ops.aten.mm.default: (_f(4, 3), _f(3, 5)),
    torch.ops.aten.sum.dim_IntList: (_f(4, 3, 5), (0, 1)),
    torch.ops.aten.add.Tensor: (_f(4, 3), _f(4, 3)),
}


@pytest.mark.parametrize("op", BUCKETED, ids=str)
def test_a_gradient_written_into_its_bucket_takes_operands_of_any_strides(op: Any) -> None:
    assert set(BUCKETED) == OUT
    operands, function = BUCKETED[op], FAST[op][1]
    expected = function(*operands)
    bucket = torch.zeros(3 * expected.numel(), dtype=expected.dtype)
    part = bucket.narrow(0, expected.numel(), expected.numel()).view(expected.shape)
    for place, operand in enumerate(operands):
        for name, x in strided(operand) if isinstance(operand, Tensor) else ():
            function(*operands[:place], x, *operands[place + 1 :], out=part)
            torch.testing.assert_close(part, expected, msg=f"{place} {name}")
            assert bucket.count_nonzero() == expected.count_nonzero()
