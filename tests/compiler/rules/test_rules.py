"""Every rule by brute force: shard, run on each rank, put together, compare; gradients too."""

from __future__ import annotations

import pytest
import torch

from meshwright.compiler.mesh import Mesh
from tests.compiler.rules.brute import (
    LINE,
    SQUARE,
    Sample,
    check_gradients,
    check_values,
    placements,
)
from tests.compiler.rules.samples import SAMPLES

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
