"""Fold the names of equal layers into selectors of the plan language: `blocks.*.up.weight`."""

from __future__ import annotations

from collections.abc import Sequence


def fold(names: Sequence[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Selectors that together match `names`, in their order, each with what it stands for.

    A numbered segment becomes `*` where every name of `known` that differs in numbers alone is
    among `names`, `[0:6]` where a run of them is, else `{0,2,5}`. A name alone stays as it is.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(starred(name), []).append(name)
    totals: dict[str, int] = {}
    for name in known:
        totals[starred(name)] = totals.get(starred(name), 0) + 1
    return {
        (star if len(group) == totals.get(star) else _narrowed(star, group))
        if len(group) > 1
        else group[0]: group
        for star, group in groups.items()
    }


def starred(name: str) -> str:
    """`name` with a star for each number among its segments."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def numbers(name: str) -> tuple[int, ...]:
    """The numbers among the segments of `name`: what stands for the stars of `starred(name)`."""
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def _narrowed(star: str, names: Sequence[str]) -> str:
    parts = [name.split(".") for name in names]
    found: list[str] = []
    for i, part in enumerate(star.split(".")):
        held = sorted({int(each[i]) for each in parts}) if part == "*" else []
        if not held:
            found.append(part)
        elif len(held) == 1:
            found.append(str(held[0]))
        elif held == list(range(held[0], held[-1] + 1)):
            found.append(f"[{held[0]}:{held[-1] + 1}]")
        else:
            found.append("{" + ",".join(map(str, held)) + "}")
    return ".".join(found)
