"""Statements against the names of a model: which one speaks of which name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

from meshwright.dsl.check import same_content
from meshwright.dsl.errors import PlanError, either, nearest, printable, quoted
from meshwright.dsl.selectors import Selector, more_specific, quote_segment
from meshwright.dsl.statements import CONNECTIVES, STATEMENTS, Data, Targeted

_T = TypeVar("_T", bound=Targeted)

_EVERYTHING = Selector("**")


def resolve(statements: Iterable[_T], names: Collection[str]) -> dict[str, _T]:
    """The statement that holds for each name, for statements of one verb.

    The plan's own win over those that a module's class carries, an outer module's over an inner
    one's; among equals the more specific selector wins. A statement without targets speaks of
    everything. Raises `PlanError` for a selector that matches nothing, and for a tie.
    """
    found: dict[str, list[tuple[_T, Selector]]] = {}
    for statement, selector in _selectors(statements):
        matched = selector.match(names)
        if not matched and statement.targets:
            raise nothing_matches(selector, names)
        for name in matched:
            found.setdefault(name, []).append((statement, selector))
    return {name: _winner(name, found[name]) for name in names if name in found}


def nothing_matches(selector: Selector, names: Collection[str]) -> PlanError:
    """The error for a selector without a match; its help names the nearest names."""
    suggestions = (
        _inside(selector, names)
        or list(dict.fromkeys(_patterns(selector, names)))
        or nearest(selector.text, names, 3)
    )
    if suggestions:
        help = f"write {either(suggestions[:3])}"
    else:
        shown = [printable(name) for name in list(names)[:3] if name]
        help = "use names of the model" + (f", such as {either(shown)}" if shown else "")
    return PlanError(
        "P401", f"{quoted(selector.text)} matches nothing", spans=[selector.span], help=help
    )


def selectors_of(names: Iterable[str]) -> list[str]:
    """Texts of selectors for names: those that differ only in numbers share one with `*`."""
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for name in dict.fromkeys(names):
        parts = name.split(".")
        key = tuple("*" if part.isdigit() else part for part in parts)
        alike.setdefault(key, []).append(parts)
    return [_written([*zip(*matched, strict=True)]) for matched in alike.values()]


def _written(columns: list[tuple[str, ...]]) -> str:
    """A selector for names whose segments, one column each, are equal or different numbers."""
    parts = [each[0] if len(set(each)) == 1 else "*" for each in columns]
    if parts == [""]:
        return '""'
    written = [part if part == "*" else quote_segment(part) for part in parts]
    # A number that stands first, or a word of the language alone, would be read as one.
    reserved = len(parts) == 1 and (parts[0] in STATEMENTS or parts[0] in CONNECTIVES)
    if parts[0][0].isdigit() or reserved:
        written[0] = f'"{parts[0]}"'
    return ".".join(written)


def _selectors(statements: Iterable[_T]) -> Iterator[tuple[_T, Selector]]:
    for statement in statements:
        for selector in statement.targets or (_EVERYTHING,):
            yield statement, selector


def _winner(name: str, candidates: list[tuple[_T, Selector]]) -> _T:
    if len(candidates) > 1:
        outermost = min(_depth(statement) for statement, _ in candidates)
        candidates = [each for each in candidates if _depth(each[0]) == outermost]
    best, best_selector = candidates[0]
    for statement, selector in candidates[1:]:
        if more_specific(_ranks(selector, name), _ranks(best_selector, name)):
            best, best_selector = statement, selector
    for statement, selector in candidates:
        undecided = not more_specific(_ranks(best_selector, name), _ranks(selector, name))
        if undecided and not same_content(statement, best):
            raise _tie(name, (best, best_selector), (statement, selector))
    return best


def _ranks(selector: Selector, name: str) -> tuple[int, ...]:
    ranks = selector.ranks(name)
    assert ranks is not None, (selector, name)
    return ranks


def _depth(statement: Targeted) -> int:
    """How far in the module lies that carries a statement; the plan itself is outermost."""
    if statement.scope is None:
        return 0
    return 1 + len(statement.scope.split(".")) if statement.scope else 1


def _tie(name: str, first: tuple[_T, Selector], second: tuple[_T, Selector]) -> PlanError:
    (one, selector), (other, other_selector) = first, second
    help = f"add a statement for `{name}` itself, or narrow one of the selectors"
    if isinstance(one, Data) and isinstance(other, Data) and one.dim != other.dim:
        help = f"keep one, and write `shard {name} {_both_dims(one, other)}` beside it"
    return PlanError(
        "P305",
        f"two `{one.verb}` statements speak of `{name}`, and neither selector is more specific",
        spans=[selector.span or one.span, other_selector.span or other.span],
        help=help,
    )


def _both_dims(one: Data, other: Data) -> str:
    """A layout that splits an input as two `data` statements would."""
    axes = {statement.dim: statement.over for statement in (one, other)}
    over = {
        dim: each[0] if len(each) == 1 else f"({', '.join(each)})" for dim, each in axes.items()
    }
    dims = [f"d{i}@{over[i]}" if i in over else f"d{i}" for i in range(max(over) + 1)]
    return f"[{', '.join(dims)}, ...]"


def _inside(selector: Selector, names: Collection[str]) -> list[str]:
    """Selectors of what a selector's module or structure holds, where it has no value itself."""
    if not selector.text or not any(Selector(f"{selector.text}.**").match(names)):
        return []
    held = Selector(f"{selector.text}.*").match(names)
    last = dict.fromkeys(quote_segment(name.rpartition(".")[2]) for name in held)
    found = [f"{selector.text}.{segment}" for segment in last]
    deeper = len(Selector(f"{selector.text}.**").match(names)) > len(held)
    return [*found[:2], f"{selector.text}.**"] if deeper else found


def _patterns(selector: Selector, names: Collection[str]) -> Iterator[str]:
    """Selectors that match, and differ from this one in one segment."""
    segments = [segment.text for segment in selector.segments]
    known = sorted({part for name in names for part in name.split(".")})
    for i in reversed(range(len(segments))):
        for word in nearest(segments[i], known, 2):
            text = ".".join([*segments[:i], word, *segments[i + 1 :]])
            if word != segments[i] and any(Selector(text).matches(name) for name in names):
                yield text
