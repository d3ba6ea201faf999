"""The statement that holds for each name of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

from meshwright.dsl.check import same_content
from meshwright.dsl.errors import PlanError
from meshwright.dsl.layouts import format_axes
from meshwright.dsl.selectors import EVERYTHING, Selector, more_specific
from meshwright.dsl.statements import Data, Targeted
from meshwright.dsl.suggest import nothing_matches

_T = TypeVar("_T", bound=Targeted)


def resolve(statements: Iterable[_T], names: Collection[str]) -> dict[str, _T]:
    """The statement that holds for each name, for statements of one verb.

    The plan's own win over those that a module's class carries, an outer module's over an inner
    one's; among equals the more specific selector wins. A statement without targets matches
    everything. Raises `PlanError` for a selector that matches nothing, and for a tie.
    """
    found: dict[str, list[tuple[_T, Selector]]] = {}
    for statement, selector in _selectors(statements):
        matched = selector.match(names)
        if not matched and statement.targets:
            raise nothing_matches(selector, names, inputs=isinstance(statement, Data))
        for name in matched:
            found.setdefault(name, []).append((statement, selector))
    return {name: _winner(name, found[name]) for name in names if name in found}


def _selectors(statements: Iterable[_T]) -> Iterator[tuple[_T, Selector]]:
    for statement in statements:
        for selector in statement.targets or (EVERYTHING,):
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
    """The depth of the module whose class carries a statement; 0 for the plan's own."""
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
        f"two `{one.verb}` statements match `{name}`, and neither selector is more specific",
        spans=[selector.span or one.span, other_selector.span or other.span],
        help=help,
    )


def _both_dims(one: Data, other: Data) -> str:
    """A layout that splits an input as two `data` statements would."""
    axes = {statement.dim: statement.over for statement in (one, other)}
    dims = [f"d{i}@{format_axes(axes[i])}" if i in axes else f"d{i}" for i in range(max(axes) + 1)]
    return f"[{', '.join(dims)}, ...]"
