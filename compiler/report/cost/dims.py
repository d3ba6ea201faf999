"""Dims of values as ordered products of atoms, and which atoms are the same.

An atom is a size that means one thing: the batch, the heads. A view splits atoms into factors
(`[b, s, 3 h]` as `[b, s, 3, heads, hd]`), and a letter of an operator's rule says that two dims are
the same. Numbers that are equal by chance stay apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(eq=False, slots=True)
class Atom:
    """A size that means one thing."""

    size: int
    parts: tuple[Atom, ...] | None = field(default=None, repr=False)
    """What it is the product of, major to minor; one atom where it is the same as that."""
    sums: tuple[Dim, ...] = field(default=(), repr=False)
    plus: int = 0
    """Where it has no name: the dims that it is the sum of, and what is added."""
    axes: tuple[str, ...] = ()
    """Where it is the number of ranks along these."""
    block: tuple[Dim, tuple[str, ...]] | None = field(default=None, repr=False)
    """Where it has no name: the dim of which it is a block, one for each rank along axes."""


Dim: TypeAlias = "tuple[Atom, ...]"
"""Atoms, major to minor; none for a dim of size 1."""


def new(size: int) -> Dim:
    """A dim of which nothing is known yet."""
    return () if size == 1 else (Atom(size),)


def summed(size: int, dims: Sequence[Dim], plus: int) -> Dim:
    """A dim that is the sum of others and a number."""
    return () if size == 1 else (Atom(size, sums=tuple(dims), plus=plus),)


def block(size: int, dim: Dim, axes: tuple[str, ...]) -> Dim:
    """A dim that is what each rank along axes holds of another."""
    return () if size == 1 else (Atom(size, block=(dim, axes)),)


def joined(size: int, dim: Dim) -> Dim:
    """A dim of `size` of which another is a block; one of its own where that is not known."""
    wholes = (atom.block[0] for atom in expanded(dim) if atom.block is not None)
    return next((whole for whole in wholes if size_of(whole) == size), new(size))


def expanded(dim: Iterable[Atom]) -> Dim:
    """The atoms that a dim is made of by now."""
    found: list[Atom] = []
    left = list(dim)[::-1]
    while left:
        atom = left.pop()
        if atom.parts is None:
            found.append(atom)
        else:
            left += atom.parts[::-1]
    return tuple(found)


def size_of(dim: Iterable[Atom]) -> int:
    """The size of a dim."""
    return math.prod(atom.size for atom in dim)


def unify(a: Dim, b: Dim) -> None:
    """Note that two dims, or two rows of dims as one, are the same, minor to minor.

    Where neither of two factors divides the other, nothing more is known of those before them.
    """
    if a is b:
        return
    left, right = list(expanded(a)), list(expanded(b))
    while left and right:
        x, y = left.pop(), right.pop()
        if x is y:
            continue
        if x.parts is not None or y.parts is not None:
            # One was split or joined meanwhile: it stands in this row more than once.
            left += expanded((x,))
            right += expanded((y,))
        elif x.size == y.size:
            _join(x, y)
        elif x.size % y.size == 0:
            left.append(_split(x, y))
        elif y.size % x.size == 0:
            right.append(_split(y, x))
        else:
            return


def _join(x: Atom, y: Atom) -> None:
    keeps = bool(y.axes or y.sums or y.block) and not (x.axes or x.sums or x.block)
    (x if keeps else y).parts = (y if keeps else x,)


def _split(whole: Atom, minor: Atom) -> Atom:
    """The rest of an atom of which another is the minor factor."""
    major = Atom(whole.size // minor.size)
    whole.parts = (major, minor)
    return major
