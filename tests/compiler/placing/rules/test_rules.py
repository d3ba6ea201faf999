"""Every rule by brute force: shard, run on each rank, put together, compare; gradients too."""

from __future__ import annotations

import pytest
import torch

from meshwright.compiler.composites.norm import NormStats
from meshwright.compiler.graph.ir import MeshOp
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.composite import COMPOSITES
from meshwright.compiler.placing.rules.lookup import has_rule
from meshwright.compiler.placing.rules.pointwise import POINTWISE
from meshwright.compiler.placing.rules.registry import FUNCTIONS
from meshwright.compiler.placing.rules.table import TABLE
from tests.compiler.placing.rules.brute import (
    LINE,
    SQUARE,
    Sample,
    check_gradients,
    check_values,
    placements,
)
from tests.compiler.placing.rules.forbidden import right_but_forbidden, shown
from tests.compiler.placing.rules.operators import OPERATORS
from tests.compiler.placing.rules.samples import SAMPLES

aten = torch.ops.aten

LIMITS = {LINE: 200, SQUARE: 25}
"""How many layouts of the operands are tried on each mesh."""


@pytest.mark.parametrize("mesh", [LINE, SQUARE], ids=["one_axis", "two_axes"])
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_every_placement_gives_what_it_says(sample: Sample, mesh: Mesh) -> None:
    torch.manual_seed(0)
    results = sample.run(sample.args, sample.kwargs)
    found = placements(sample, results, mesh, LIMITS[mesh], differentiable=False)
    assert found
    for placement in found:
        check_values(sample, results, placement, mesh)


@pytest.mark.parametrize("mesh", [LINE, SQUARE], ids=["one_axis", "two_axes"])
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.gradients], ids=str)
def test_every_placement_has_gradients_in_the_dual_layouts(sample: Sample, mesh: Mesh) -> None:
    torch.manual_seed(0)
    results = sample.run(sample.args, sample.kwargs)
    for placement in placements(sample, results, mesh, LIMITS[mesh], differentiable=True):
        check_values(sample, results, placement, mesh)
        check_gradients(sample, results, placement, mesh)


RING = (
    "mesh::ring_attention",
    "mesh::ring_attention_backward",
    "mesh::ring_step",
    "mesh::ring_step_backward",
)
BLOCKS = (
    *("mesh::summa", "mesh::summa_transposed", "mesh::summa_sum"),
    *("mesh::summa_embedding", "mesh::summa_embedding_backward"),
    *("mesh::product_3d", "mesh::product_3d_transposed", "mesh::product_3d_sum"),
    *("mesh::block_part", "mesh::put_block", "mesh::rows_in_blocks"),
)
OWNED = ("mesh::owner_order", "mesh::by_owner", "mesh::in_order", "mesh::owner_counts")
UNSAMPLED = {
    "aten::empty": "its values are arbitrary",
    "aten::empty_like": "its values are arbitrary",
    "aten::new_empty": "its values are arbitrary",
    **dict.fromkeys(RING, "split in one way alone, and lowered: `test_equivalence_context.py`"),
    **dict.fromkeys(BLOCKS, "split in one way alone, over named axes: `test_summa.py`"),
    **dict.fromkeys(OWNED, "of the rows of one rank: `kernels/test_owners.py`"),
    "mesh::add_panel_product": "it writes over its operand; else as `panel_product`",
    "mesh::add_block_lookup": "it writes over its operand; else as `block_lookup`",
    "mesh::loss_scale": "it multiplies by a number of the run, alike on every rank",
}


def test_every_operator_with_a_rule_has_a_sample() -> None:
    sampled = {sample.op for sample in SAMPLES}
    missing = [op for op in (*TABLE, *FUNCTIONS, *POINTWISE, *COMPOSITES) if op not in sampled]
    names = {str(op) if isinstance(op, MeshOp) else op._schema.name for op in missing}
    assert names == set(UNSAMPLED)


LEFT_OUT = {
    aten.bucketize.Tensor: "counts of split boundaries add up, but boundaries are few",
    aten.conv2d.default: "patches that do not overlap: only where the stride is the kernel's size",
    aten.conv2d.padding: "as conv2d.default",
    aten.conv3d.default: "a kernel as large as its input, split with it: a product in disguise",
    aten.conv3d.padding: "as conv2d.default",
    aten.conv_transpose2d.input: "as conv2d.default",
    aten.conv_transpose3d.input: "as conv2d.default",
    NormStats.op: "squares add up where there is no mean; one step does for both kinds",
    aten.index_copy.default: "copies into zeros add up, but only where no index is there twice",
}
"""Splits that would be right and that no rule allows, with the reason."""

UNCHECKED = {
    aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d_backward.default,
    aten._adaptive_avg_pool2d_backward.default,
}
"""Kernels that trust their operands' shapes: wrong splits of them write outside of memory."""


@pytest.mark.slow
def test_no_rule_forbids_a_split_that_is_right_without_a_reason() -> None:
    torch.manual_seed(0)
    found = {}
    for sample in (sample for sample in SAMPLES if sample.op not in UNCHECKED):
        for placement in right_but_forbidden(sample, LINE):
            found.setdefault(sample.op, shown(sample, placement))
    assert {op: text for op, text in found.items() if op not in LEFT_OUT} == {}
    assert set(LEFT_OUT) == set(found)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_that_models_and_their_backward_use_has_a_rule(name: str) -> None:
    if name.startswith("mesh::"):
        assert has_rule(MeshOp(name.removeprefix("mesh::")))
    else:
        _, op, overload = name.split(".")
        assert has_rule(getattr(getattr(aten, op), overload))
