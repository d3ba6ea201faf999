"""Fold the names of equal layers into selectors of the plan language: `blocks.*.up.weight`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product


def fold(names: Sequence[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Selectors that together match `names`, in their order, each with what it stands for.

    A numbered segment becomes `*` where every name of `known` that differs in numbers alone is
    among `names`, `[0:6]` where a run of them is, else `{0,2,5}`. A name alone stays as it is. No
    selector matches a name of the same form that is not among `names`.
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(starred(name), []).append(name)
    totals = Counter(starred(name) for name in known)
    found: list[tuple[str, list[str]]] = []
    for star, group in groups.items():
        if len(group) == 1 or len(group) == totals[star]:
            found.append((star if len(group) > 1 else group[0], group))
        else:
            found += _narrowed(star, group)
    return dict(found)


def starred(name: str) -> str:
    """`name` with a star for each number among its segments."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def numbers(name: str) -> tuple[int, ...]:
    """The numbers among the segments of `name`: what stands for the stars of `starred(name)`."""
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def _narrowed(star: str, names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Selectors for some of the names that a starred one stands for."""
    by_numbers = {numbers(name): name for name in names}
    for box in _boxes(sorted(by_numbers)):
        sets = iter(box)
        parts = [_number_text(next(sets)) if part == "*" else part for part in star.split(".")]
        yield ".".join(parts), [by_numbers[each] for each in sorted(product(*box))]


def _boxes(points: Sequence[tuple[int, ...]]) -> list[list[list[int]]]:
    """Sets of numbers, one for each place, whose products together are these points."""
    sets = [sorted(set(column)) for column in zip(*points, strict=True)]
    if math.prod(map(len, sets)) == len(points):
        return [sets]
    rests: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first in sets[0]:
        rest = tuple(point[1:] for point in points if point[0] == first)
        rests.setdefault(rest, []).append(first)
    return [[firsts, *box] for rest, firsts in rests.items() for box in _boxes(rest)]


def _number_text(held: Sequence[int]) -> str:
    if len(held) == 1:
        return str(held[0])
    if list(held) == list(range(held[0], held[-1] + 1)):
        return f"[{held[0]}:{held[-1] + 1}]"
    return "{" + ",".join(map(str, held)) + "}"
