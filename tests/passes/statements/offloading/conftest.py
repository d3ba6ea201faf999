"""What is moved in tests of `offload`."""

from __future__ import annotations

import pytest

from meshwright.passes.statements.offloading import amount
from meshwright.runtime.offloading import slabs
from meshwright.runtime.optimizers import chunks


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload what models of tests hold, which is little, in slabs and chunks that are small."""
    monkeypatch.setattr(amount, "SMALL_BYTES", 0)
    monkeypatch.setattr(slabs, "SLAB", 1 << 16)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 12)
