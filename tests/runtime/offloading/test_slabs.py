"""Blocks of slabs: none overlaps another, and what is free is used again."""

from __future__ import annotations

import random
from itertools import pairwise

from meshwright.runtime.offloading.slabs import ALIGNMENT, SLAB, Block, Slabs


def spans(blocks: list[Block[int]]) -> list[tuple[int, int, int]]:
    return sorted((block.index, block.start, block.start + block.size) for block in blocks)


def test_blocks_begin_at_pages_and_do_not_overlap_whatever_is_taken_and_given_back() -> None:
    drawn = random.Random(0)
    slabs: Slabs[int] = Slabs(lambda size: size)
    blocks: list[Block[int]] = []
    for _ in range(2000):
        if blocks and drawn.random() < 0.5:
            blocks.pop(drawn.randrange(len(blocks)))
        else:
            blocks.append(
                slabs.take(drawn.choice([1, ALIGNMENT, 12345, SLAB // 3, SLAB, 3 * SLAB]))
            )
        assert all(block.start % ALIGNMENT == 0 for block in blocks)
        assert all(block.start + block.size <= block.slab for block in blocks)
        found = spans(blocks)
        for (slab, _, end), (other, start, _) in pairwise(found):
            assert slab != other or end <= start
        assert sum(block.size for block in blocks) <= slabs.peak <= slabs.reserved
    blocks.clear()
    slabs.take(1)
    assert slabs.free == [
        (i, ALIGNMENT if i == 0 else 0, size) for i, size in enumerate(slabs.slabs)
    ]


def test_slabs_grow_so_that_a_terabyte_is_in_few_files() -> None:
    slabs: Slabs[int] = Slabs(lambda size: size)
    blocks = [slabs.take(SLAB) for _ in range(1 << 15)]
    assert len(blocks) * SLAB <= slabs.reserved <= 1.3 * len(blocks) * SLAB
    assert slabs.slabs[:8] == [SLAB] * 8 and len(slabs.slabs) < 80


def test_a_step_uses_the_slabs_of_the_one_before() -> None:
    slabs: Slabs[int] = Slabs(lambda size: size)
    for _ in range(5):
        blocks = [slabs.take(size) for size in (SLAB // 2, SLAB // 2, 3 * SLAB)]
        del blocks
    assert slabs.slabs == [SLAB, 4 * SLAB]
    assert slabs.peak == 4 * SLAB
