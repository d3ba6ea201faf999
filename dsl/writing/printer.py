"""Plans as text: one statement per line, in aligned columns, as `meshwright fmt` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshwright.dsl import statements as s
from meshwright.dsl.layouts import format_axes
from meshwright.dsl.values import format_bytes

_WIDEST = 40
"""The width beyond which a cell does not widen its column."""


@dataclass(slots=True)
class Line:
    """One line of a plan: cells, a comment or both; a blank line may come before it."""

    cells: list[str] = field(default_factory=list)
    comment: str = ""
    blank_before: bool = False


def cells(statement: s.Statement) -> list[str]:
    """The cells of a statement: verb, subject, place and the rest."""
    subject, place = _SUBJECTS.get(type(statement), _targets)(statement), ""
    options = options_text(statement)
    if isinstance(statement, s.Shard):
        place = f"{s.ARROWS[statement.of]} {statement.layout}".lstrip()
    elif isinstance(statement, s.Spread) and statement.over:
        place = f"over {_spelt(statement, 'over', format_axes(statement.over))}"
    if isinstance(statement, s.Fused) and statement.factors is not None:
        options = f"as {_composite(statement)} {options}".rstrip()
    found = [statement.verb, subject, place or options, options if place else ""]
    return found if subject else [statement.verb, *found[2:]]


def options_text(statement: s.Statement) -> str:
    """Every option that was written or is not at its default, in the order of the fields."""
    return " ".join(
        f"{name}={_spelt(statement, name, each.metadata['kind'].write(value))}"
        for each in statement.options()
        for name in (s.option_name(each),)
        if (value := getattr(statement, each.name)) is not None
        and (name in statement.parts or value != each.default)
    )


def align(lines: Sequence[Line]) -> str:
    """The text of these lines, each cell but the last padded to its column."""
    widths = [_width(lines, column) for column in range(3)]
    text: list[str] = []
    for line in lines:
        if line.blank_before and text:
            text.append("")
        filled = [cell for cell in line.cells if cell]
        padded = [cell.ljust(width) for cell, width in zip(filled[:-1], widths, strict=False)]
        text.append("  ".join(filter(None, [" ".join([*padded, *filled[-1:]]), line.comment])))
    return "".join(f"{line}\n" for line in text)


def _width(lines: Sequence[Line], column: int) -> int:
    """The width of a column: that of its widest cell that another one follows."""
    followed = (
        len(line.cells[column])
        for line in lines
        if any(line.cells[column + 1 :]) and len(line.cells[column]) <= _WIDEST
    )
    return max(followed, default=0)


def _spelt(statement: s.Statement, part: str, canonical: str) -> str:
    return statement.spelling.get(part) or canonical


def _composite(statement: s.Fused) -> str:
    text = str(statement.factors)
    return text if text.startswith("(") else f"({text})"


def _targets(statement: s.Statement) -> str:
    assert isinstance(statement, (s.Targeted, s.Memory)), statement
    return ", ".join(map(str, statement.targets)) if isinstance(statement, s.Targeted) else ""


def _sizings(statement: s.Statement, pairs: Iterable[tuple[str, Any]], equals: str) -> str:
    return ", ".join(
        f"{name}{equals}{_spelt(statement, name, str(value))}" for name, value in pairs
    )


def _mesh(mesh: s.MeshStatement) -> str:
    return _sizings(mesh, mesh.axes, "=")


def _let(let: s.Let) -> str:
    return _sizings(let, let.values, " = ")


def _axes(axes: s.Axes) -> str:
    return ", ".join(f"{name} = {format_axes(members)}" for name, members in axes.groups)


def _zero(zero: s.Zero) -> str:
    return " ".join(filter(None, [str(zero.level), _targets(zero)]))


def _stages(stages: s.Stages) -> str:
    if stages.count is None:
        return f"at {_targets(stages)}"
    return _spelt(stages, "count", str(stages.count))


def _of_what(statement: s.Offload | s.Allow) -> str:
    return " ".join(filter(None, [statement.what, _targets(statement)]))


def _expect(expect: s.Expect) -> str:
    axes = f"[{_spelt(expect, 'axes', format_axes(expect.axes))}]" if expect.axes else ""
    bound = str(expect.bound)
    if expect.metric in ("bytes", "peak_memory") and isinstance(expect.bound, int):
        bound = format_bytes(expect.bound)
    limit = f"{expect.metric}{axes} {expect.comparison} {_spelt(expect, 'bound', bound)}"
    per = f"per {_targets(expect)}" if expect.targets else ""
    return " ".join(filter(None, [limit, expect.window, per]))


_SUBJECTS: dict[type[s.Statement], Callable[[Any], str]] = {
    s.MeshStatement: _mesh,
    s.Let: _let,
    s.Axes: _axes,
    s.Precision: lambda precision: str(precision.dtype),
    s.Accumulate: lambda accumulate: _spelt(accumulate, "count", str(accumulate.count)),
    s.Zero: _zero,
    s.Stages: _stages,
    s.Offload: _of_what,
    s.Allow: _of_what,
    s.Expect: _expect,
}
"""What stands after the verb; for the verbs not listed, their targets."""
