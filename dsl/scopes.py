"""Fragments: the statements that a module's class carries in `__plan__`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from meshwright.dsl import statements as s
from meshwright.dsl.check import check
from meshwright.dsl.errors import PlanError
from meshwright.dsl.names import Names, collect
from meshwright.dsl.reading.parser import parse_plan
from meshwright.dsl.reading.reader import Reader
from meshwright.dsl.selectors import EVERYTHING, Selector
from meshwright.dsl.source import Source

_MODULE = Selector('""')


def fragment(source: Source, paths: Iterable[str], outer: Names) -> Iterator[s.Statement]:
    """The fragment's statements for the module at each path, over the whole model's names."""
    trees, _ = parse_plan(source)
    names = collect(trees, source, outer)
    reader = Reader(source, names)
    statements = [reader.read(tree) for tree in trees]
    check(statements, names.mesh)
    for statement in statements:
        if not isinstance(statement, (s.Targeted, s.Let)) or isinstance(
            statement, (s.Stages, s.Share)
        ):
            raise PlanError(
                "P114",
                f"`{statement.verb}` is about the whole run, not about a module",
                spans=[statement.span],
                help="move it to the plan",
            )
    for path in paths:
        for statement in statements:
            if isinstance(statement, s.Targeted):
                yield _placed(statement, path)


def _placed(statement: s.Targeted, path: str) -> s.Targeted:
    """The statement for the module at `path`."""
    default = _MODULE if isinstance(statement, s.Expect) else EVERYTHING
    targets = tuple(target.under(path) for target in statement.targets or (default,))
    return replace(statement, targets=targets, scope=path, spelling={})
