"""Types of torch's operators are those that they give when they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from meshwright.compiler.graph.types import torch_type, type_of

aten = torch.ops.aten


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False])
def test_norms_of_wider_weights_have_the_types_that_run(x_dtype: torch.dtype, wide: bool) -> None:
    x = torch.randn(2, 8, 6).to(x_dtype)
    dtype = torch.float32 if wide else x_dtype

    def check(op: Any, *args: Any) -> Any:
        found = op(*args)
        typed = torch_type(op, tree_map_only(torch.Tensor, type_of, args), {})
        assert typed == type_of(found)
        return found

    weight, sizes = torch.ones(6, dtype=dtype), [6]
    _, mean, rstd = check(aten.native_layer_norm.default, x, sizes, weight, weight, 1e-5)
    backward = aten.native_layer_norm_backward.default
    check(backward, x, x, sizes, mean, rstd, weight, weight, [True, True, True])
    weight, shape = torch.ones(8, dtype=dtype), (2, 8, 6, 4)
    _, mean, rstd = check(aten.native_group_norm.default, x, weight, weight, *shape, 1e-5)
    backward = aten.native_group_norm_backward.default
    check(backward, x, x, mean, rstd, weight, *shape, [True, False, True])
