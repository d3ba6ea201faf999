"""A plan: statements, the names they use, and the text they came from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import sympy
from lark import Token

from meshwright.dsl import statements as s
from meshwright.dsl.check import check
from meshwright.dsl.errors import PlanError, plural, spelled
from meshwright.dsl.files import check_text, read_file
from meshwright.dsl.layouts import LayoutTemplate
from meshwright.dsl.names import Names, collect
from meshwright.dsl.reading.layout_reader import LayoutReader
from meshwright.dsl.reading.parser import parse_layout, parse_plan
from meshwright.dsl.reading.reader import Reader
from meshwright.dsl.resolve import resolve
from meshwright.dsl.scopes import fragment
from meshwright.dsl.solve import Dim, solve, solve_columns
from meshwright.dsl.source import Source, Span
from meshwright.dsl.writing.arrange import arrange
from meshwright.dsl.writing.html import html_table
from meshwright.dsl.writing.printer import align

if TYPE_CHECKING:
    from meshwright.dsl.builder import PlanBuilder

_S = TypeVar("_S", bound=s.Statement)
_T = TypeVar("_T", bound=s.Targeted)


@dataclass(frozen=True, eq=False)
class Plan:
    """How a model runs on a mesh, as a plan's text says it. Made by `parse`, `load` or `build`.

    Two plans are equal when they say the same, in any order. `print(plan)` is its canonical text.
    `statements` are objects of `meshwright.dsl`, one class per verb; `source` has the `name`
    and the `text` that was read.
    """

    statements: tuple[s.Statement, ...] = ()
    source: Source = field(default_factory=lambda: Source("<plan>", ""))
    names: Names = field(default_factory=Names, repr=False)
    comments: tuple[Token, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.statements, tuple):
            raise PlanError(
                "P115",
                f"a plan is made of statements, not of {spelled(self.statements)}",
                help="read it: `Plan.parse(text)` or `Plan.load(path)`",
            )

    @staticmethod
    def parse(text: str, name: str = "<plan>") -> Plan:
        """Read a plan from `text`; errors call it by its `name`.

        Raises `PlanError`, and nothing else, for any text that is not a plan.
        """
        check_text(text, name)
        source = Source(name, text)
        trees, comments = parse_plan(source)
        names = collect(trees, source)
        reader = Reader(source, names)
        statements = tuple(reader.read(tree) for tree in trees)
        check(statements, names.mesh)
        return Plan(statements, source, names, tuple(comments))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read the plan file at `path`, in UTF-8; errors call it by its file name.

        Raises `PlanError` for a file that cannot be read (P113) and for what is wrong in it.
        """
        return Plan.parse(read_file(path), Path(path).name)

    @staticmethod
    def build(mesh: Mapping[str, int] | None = None, name: str = "<built plan>") -> PlanBuilder:
        """Begin a plan in Python with this `mesh`; errors call it by its `name`.

        Returns a `PlanBuilder`, whose methods are the statements of the language.
        """
        from meshwright.dsl.builder import PlanBuilder

        return PlanBuilder(mesh, name)

    @property
    def mesh(self) -> tuple[tuple[str, int], ...]:
        """The axes and their sizes, as pairs; the first varies slowest over the ranks."""
        return tuple(self.names.mesh.items())

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """The named groups of axes: what `axes model = (row, col)` says."""
        return self.names.groups

    @property
    def lets(self) -> dict[str, int | sympy.Rational]:
        """The sizes that `let` binds: integers, or exact fractions."""
        return {k: int(v) if v.q == 1 else v for k, v in self.names.sizes.items()}

    def of(self, verb: type[_S]) -> tuple[_S, ...]:
        """The statements of one `verb`, a class of `meshwright.dsl`, in the order of the text."""
        return tuple(each for each in self.statements if isinstance(each, verb))

    def resolve(self, verb: type[_T], names: Collection[str], **fields: object) -> dict[str, _T]:
        """The statement of this verb that holds for each of a model's names, where there is one.

        `fields` select among the statements of a verb: `of="output"` for `Shard`, `dim=1` for
        `Data`, `what="local"` for `Allow`.
        """
        return resolve(
            (
                each
                for each in self.of(verb)
                if all(getattr(each, name) == value for name, value in fields.items())
            ),
            names,
        )

    def layout(self, text: str) -> LayoutTemplate:
        """Read a layout on its own, such as `[b@dp, s, d]`, with this plan's names."""
        source = Source("<layout>", text)
        layout: LayoutTemplate = LayoutReader(source, self.names).read(parse_layout(source))
        return layout

    def dims(
        self, layout: LayoutTemplate, shape: Sequence[int], tensor: str = ""
    ) -> tuple[Dim, ...]:
        """The factors of each dim of a tensor of this shape; see `solve`."""
        return solve(layout, shape, dict(self.mesh), tensor)

    def columns_dim(
        self,
        fused: s.Fused,
        shape: Sequence[int],
        dim: int = 0,
        tensor: str = "",
        over: tuple[str, ...] = (),
    ) -> Dim:
        """The factors of a linear's split output features; see `solve_columns`."""
        return solve_columns(fused, shape, dim, dict(self.mesh), tensor, over)

    def merged(self, paths: Iterable[str], text: str, name: str = "__plan__") -> Plan:
        """This plan with the fragment `text` from the class of the modules at `paths`.

        The fragment's selectors are relative to the module. Where statements of the plan and of the
        fragment match one name, the plan's hold (see `resolve`), and so do its `let`s.
        """
        added = fragment(Source(name, text), paths, self.names)
        statements = (*self.statements, *added)
        check(statements, self.names.mesh)
        return replace(self, statements=statements)

    def with_text(self, statement: s.Statement, *texts: str) -> Plan:
        """This plan with other statements, each read from one of `texts`, in place of one of its
        own and on the same line."""
        line = statement.span.line if statement.span is not None else 1
        found: list[s.Statement] = []
        for text in texts:
            source = Source(self.source.name, "\n" * (line - 1) + text)
            (tree,), _ = parse_plan(source)
            found.append(Reader(source, self.names).read(tree))
        place = next(i for i, each in enumerate(self.statements) if each is statement)
        before, after = self.statements[:place], self.statements[place + 1 :]
        return replace(self, statements=(*before, *found, *after))

    def without(self, verb: type[s.Statement]) -> Plan:
        """The plan without the statements of one `verb`, a class of `meshwright.dsl`, whose lines
        are empty in its text."""
        kept = tuple(each for each in self.statements if not isinstance(each, verb))
        lines = list(self.source.lines)
        for span in (each.span for each in self.of(verb)):
            if span is not None and span.source == self.source:
                lines[span.line - 1 : span.last_line] = [""] * (span.last_line - span.line + 1)
        found = Plan.parse("\n".join(lines), self.source.name)
        return found if found.statements == kept else replace(self, statements=kept)

    def error(
        self,
        code: str,
        message: str,
        at: s.Statement | Span | Iterable[s.Statement | Span | None] | None = None,
        *,
        subject: str | Iterable[str] = (),
        help: str = "",
    ) -> PlanError:
        """An error at these statements or places, for what is found after the plan was read."""
        places = [at] if at is None or isinstance(at, (s.Statement, Span)) else list(at)
        spans = [each.span if isinstance(each, s.Statement) else each for each in places]
        return PlanError(code, message, spans=spans, subject=subject, help=help)

    def format(self) -> str:
        """The canonical text: aligned, comments and paragraphs kept; it parses to an equal plan."""
        return align(arrange(self.statements, self.comments, self.source))

    def __str__(self) -> str:
        return self.format()

    def __repr__(self) -> str:
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh)
        where = f"mesh {mesh}" if mesh else "no mesh"
        return f"<Plan {self.source.name}: {plural(len(self.statements), 'statement')}, {where}>"

    def _repr_html_(self) -> str:
        text = self.source.text or self.format()
        lines = text.rstrip("\n").split("\n")
        rows = [(str(number), line) for number, line in enumerate(lines, start=1)]
        return html_table(("", ""), rows, title=f"plan {self.source.name}", right="r ")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return False
        return frozenset(self.statements) == frozenset(other.statements)

    def __hash__(self) -> int:
        return hash(frozenset(self.statements))
