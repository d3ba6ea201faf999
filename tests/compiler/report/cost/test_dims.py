"""Dims as products of atoms, and numbers that know their formula."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import sympy
from hypothesis import given
from hypothesis import strategies as st

from meshwright.compiler.report.cost.dims import Dim, expanded, new, size_of, unify
from meshwright.compiler.report.cost.named import Named, total

X, Y = sympy.symbols("x y", positive=True, integer=True)


def row(*sizes: int) -> Dim:
    return tuple(atom for size in sizes for atom in new(size))


def test_a_view_splits_atoms_into_the_factors_of_both_sides() -> None:
    before, after = row(8, 192), row(8, 3, 4, 16)
    unify(before, after)
    assert [atom.size for atom in expanded(before)] == [8, 3, 4, 16]
    assert expanded(before) == expanded(after)


def test_a_split_is_seen_wherever_the_atom_stands() -> None:
    (h,) = new(64)
    weight, activation = (h, *new(64)), (*new(8), h)
    unify((h,), row(4, 16))
    assert [atom.size for atom in expanded(weight)] == [4, 16, 64]
    assert [atom.size for atom in expanded(activation)] == [8, 4, 16]


def test_factors_that_do_not_divide_stay_apart() -> None:
    a, b = row(6, 4), row(4, 6)
    unify(a, b)
    assert set(expanded(a)).isdisjoint(expanded(b))


@given(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=5), st.data())
def test_unifying_keeps_sizes_and_makes_both_sides_one(
    sizes: list[int], data: st.DataObject
) -> None:
    cuts = data.draw(st.sets(st.integers(1, max(1, len(sizes) - 1))))
    bounds = [0, *sorted(cut for cut in cuts if cut < len(sizes)), len(sizes)]
    joined = [math.prod(sizes[a:b]) for a, b in pairwise(bounds)]
    fine, coarse = row(*sizes), row(*joined)
    unify(fine, coarse)
    assert expanded(fine) == expanded(coarse)
    assert size_of(expanded(coarse)) == math.prod(sizes)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(-5, 5))
def test_a_named_number_computes_as_its_formula(a: int, b: int, c: int) -> None:
    x, y = Named.of(a, X), Named.of(b, Y)
    for found in (
        x + y,
        x * y + c,
        c - x * 2,
        (x + y) * (x + 1),
        math.prod((2, x, y)),
        sum((x, y)),
    ):
        assert found.expr.subs({X: a, Y: b}) == int(found)
    assert (x < y, x == a, max(x, y)) == (a < b, True, max(a, b))


def test_a_share_is_rounded_down_and_its_formula_is_not() -> None:
    found = Named.of(5, X).share(1 / Y, Fraction(1, 2))
    assert (int(found), found.expr) == (2, X / Y)


def test_terms_keep_the_block_that_they_are_counted_in() -> None:
    blocks = [Named.of(5, X).at(("blocks", i)) for i in range(3)]
    found = total([*blocks, Named.of(2, 2)])
    assert int(found) == 17
    assert {mark for mark, _ in found.terms} == {None, *(("blocks", i) for i in range(3))}
