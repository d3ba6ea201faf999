"""What is believed of operators on sequences in another order, against what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.graph.ir import INPUT, Builder, MeshOp, Node, TensorType
from meshwright.compiler.layout.mesh import Mesh
from meshwright.passes.statements.sequences.orders import Places, through
from tests.compiler.placing.rules.brute import Sample, is_tensor
from tests.compiler.placing.rules.samples import SAMPLES

MESH = Mesh((("cp", 2),))


def mapped(value: Any, tensors: Any) -> Any:
    """The arguments of a call with others in place of tensors, in order."""
    if is_tensor(value):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, tensors) for item in value)
    return value


def typed(value: Tensor) -> TensorType:
    return TensorType(tuple(value.shape), value.dtype)


def node_of(sample: Sample, results: Sequence[Tensor | None]) -> Node:
    builder = Builder("graph", MESH)
    inputs = iter(
        [
            builder.emit(INPUT, ("argument", f"x{i}"), type=typed(x))
            for i, x in enumerate(sample.tensors)
        ]
    )
    args = mapped(tuple(sample.args), inputs)
    kwargs = {key: mapped(sample.kwargs[key], inputs) for key in sample.kwargs}
    types = tuple(None if each is None else typed(each) for each in results)
    return builder.emit(sample.op, args, kwargs, type=types if len(types) > 1 else types[0])


def reordered(x: Tensor, places: Places | None, length: int) -> Tensor:
    """The sequences of a tensor turned round."""
    for dim, outer in (places or {}).items():
        apart = (*x.shape[:dim], outer, length, -1, *x.shape[dim + 1 :])
        x = x.reshape(apart).flip(dim + 1).reshape(x.shape)
    return x


def check(sample: Sample, operand: int, dim: int) -> bool:
    """Whether the operator is believed to keep the order of a dim; then it does."""
    torch.manual_seed(0)
    results = sample.run(sample.args, sample.kwargs)
    node = node_of(sample, results)
    tensors = sample.tensors
    length = tensors[operand].shape[dim]
    given: list[Mapping[int, int]] = [{} for _ in tensors]
    given[operand] = {dim: 1}
    found = through(node, given, {}, length, MESH)
    if found is None:
        return False
    wanted, places = found
    turned = iter([reordered(x, way, length) for x, way in zip(tensors, wanted, strict=True)])
    args = mapped(tuple(sample.args), turned)
    torch.manual_seed(0)
    ours = sample.run(args, {key: mapped(value, turned) for key, value in sample.kwargs.items()})
    for here, before, way in zip(ours, results, places, strict=True):
        if here is not None and before is not None:
            expected = reordered(before, way, length)
            torch.testing.assert_close(here, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    return True


SINGLE = [sample for sample in SAMPLES if sample.op not in (MeshOp("dropout"), MeshOp("random"))]


def test_no_operator_is_believed_to_keep_an_order_that_it_does_not() -> None:
    kept = set()
    for sample in SINGLE:
        for operand, tensor in enumerate(sample.tensors):
            for dim in range(tensor.dim()):
                if tensor.shape[dim] > 1 and check(sample, operand, dim):
                    kept.add(str(sample.op))
    assert {"aten.linear.default", "mesh::norm", "mesh::cross_entropy", "aten.view.default"} <= kept
