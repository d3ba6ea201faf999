"""The cost of a step as formulas, as users hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from meshwright.compiler.costs.volume import check_convention
from meshwright.compiler.errors import CompilerError
from meshwright.compiler.graph.text import size_text
from meshwright.compiler.program import Compiled
from meshwright.compiler.report.cost.formulas import Computed, Formula, Formulas, Sent
from meshwright.compiler.report.cost.named import Named, total
from meshwright.compiler.report.cost.naming import Naming
from meshwright.compiler.report.memory.holding import Memory
from meshwright.compiler.report.recompute import flops_text
from meshwright.compiler.report.sheet import Column, Sheet
from meshwright.dsl.errors import did_you_mean

PARTS = ("parameters", "gradients", "optimizer", "activations", "peak")
"""What of a rank's memory has a formula."""
_WIDTH = 100
_T = TypeVar("_T")


@dataclass(frozen=True, repr=False)
class Cost:
    """The formulas of what one rank sends, computes and holds in a step. It prints as tables.

    The names in formulas are sizes (`b`, `s`, `layers`, and those of layouts) and axes of the mesh;
    `values` are their numbers in what was compiled. A size without a name is a number, and so is
    what kernels hold inside themselves. `convention` says how much collectives send.

    Where ranks run different stages, a formula is of the rank that has most of it; `places` are
    their coordinates, such as `pp=0`, and each method takes one as `place`.
    """

    convention: str
    values: Mapping[str, int]
    places: tuple[str, ...]
    _formulas: Formulas
    _sent: Mapping[str, Sent]
    _computed: Mapping[str, Computed]
    _held: Mapping[str, Memory]
    _known: dict[tuple[object, ...], Formula] = field(default_factory=dict)

    def sent(
        self, *, phase: str = "", axes: str = "", module: str = "", place: str | None = None
    ) -> Formula:
        """The bytes that a rank sends: of one `phase`, `forward` or `backward`, over some `axes`,
        such as `dp, tp`, of the `module` `blocks.*.up` and those inside it, at one `place`; by
        default all."""

        def of(own: Sent) -> list[Named]:
            found: dict[str, list[Named]] = {}
            for (half, over, path), size in own.items():
                if phase in ("", half) and axes in ("", over) and _within(path, module):
                    found.setdefault(over, []).append(size)
            return [*map(total, found.values())]

        return self._most(("sent", phase, axes, module), self._sent, of, place)

    def flops(self, *, phase: str = "", module: str = "", place: str | None = None) -> Formula:
        """The floating-point operations of a rank: of one `phase`, `forward` or `backward`, and of
        a `module`, at a `place`, as in `sent`; by default all. Products, attention and convolutions
        count."""

        def of(own: Computed) -> list[Named]:
            found = own.items()
            kept = (n for (half, path), n in found if phase in ("", half) and _within(path, module))
            return [total(kept)]

        return self._most(("flops", phase, module), self._computed, of, place)

    def memory(self, part: str = "peak", *, place: str | None = None) -> Formula:
        """The bytes that a rank holds, at one `place`: the `part` is `parameters`, `gradients`,
        `optimizer`, saved `activations`, or the `peak` of a step, which is where it is for the
        compiled sizes.

        Raises `CompilerError` for any other part.
        """
        if part not in PARTS:
            raise CompilerError(f"no part of memory is `{part}`", help=did_you_mean(part, PARTS))
        return self._most((part,), self._held, lambda own: [total([getattr(own, part)])], place)

    def _most(
        self,
        key: tuple[object, ...],
        places: Mapping[str, _T],
        of: Callable[[_T], Sequence[Named]],
        place: str | None,
    ) -> Formula:
        """The formula of a sum of numbers, of the place that has most or of one."""
        if place is not None and place not in places:
            raise CompilerError(f"no rank is at `{place}`", help=did_you_mean(place, places))
        if (*key, place) not in self._known:
            numbers = {each: of(own) for each, own in places.items() if place in (None, each)}
            at = max(numbers, key=lambda each: sum(map(int, numbers[each])))
            self._known[*key, place] = self._formulas.formula(numbers[at], at)
        return self._known[*key, place]

    def __repr__(self) -> str:
        return f"<Cost: {self.sent().expr} bytes sent, {self.flops().expr} operations>"

    def __str__(self) -> str:
        from meshwright.compiler.report.tables import sheet_text  # takes rich, which few runs need

        texts = [f"per rank per step, collectives {self.convention}"]
        for place in self.places:
            texts += [f"at {place}"] if place else []
            for sheet in (
                self._sent_sheet(place),
                self._flops_sheet(place),
                self._held_sheet(place),
            ):
                texts.append(f"{sheet.title}\n{sheet_text(sheet, _WIDTH)}")
        values = ", ".join(f"{name}={value}" for name, value in self._used().items())
        return "\n\n".join([*texts, f"with {values}"])

    def to_json(self) -> dict[str, object]:
        """The same as plain dictionaries and lists, formulas as text."""
        places = {
            place: {
                "sent": [
                    {"phase": key[0], "axes": key[1], "module": key[2], **_data(formula)}
                    for key, formula in self._sent_rows(place)
                ],
                "flops": [
                    {"phase": key[0], "module": key[1], **_data(formula)}
                    for key, formula in self._flops_rows(place)
                ],
                "memory": {part: _data(self.memory(part, place=place)) for part in PARTS},
            }
            for place in self.places
        }
        return {"convention": self.convention, "values": dict(self.values), "places": places}

    def _used(self) -> dict[str, int]:
        """The names that formulas have, with their numbers."""
        symbols = {
            str(each) for formula in self._known.values() for each in formula.expr.free_symbols
        }
        return {name: value for name, value in self.values.items() if name in symbols}

    def _sent_rows(self, place: str) -> Iterator[tuple[tuple[str, str, str], Formula]]:
        for phase, axes, module in self._sent[place]:
            own = self._sent[place][phase, axes, module]
            key = "sent only", phase, axes, module
            found = self._most(key, {place: own}, lambda number: [number], place)
            yield (phase, axes, module), found

    def _flops_rows(self, place: str) -> Iterator[tuple[tuple[str, str], Formula]]:
        for (phase, module), own in self._computed[place].items():
            key = "flops only", phase, module
            yield (phase, module), self._most(key, {place: own}, lambda number: [number], place)

    def _sent_sheet(self, place: str) -> Sheet:
        rows = [(*key, size_text(each.number), str(each)) for key, each in self._sent_rows(place)]
        over = dict.fromkeys((phase, axes) for phase, axes, _ in self._sent[place])
        sums = [(*key, self.sent(phase=key[0], axes=key[1], place=place)) for key in over]
        totals = [(p, a, "in all", size_text(f.number), str(f)) for p, a, f in sums]
        every = self.sent(place=place)
        totals.append(("in all", "", "", size_text(every.number), str(every)))
        return Sheet("bytes sent", _columns("", "axes", "module"), tuple(rows), tuple(totals))

    def _flops_sheet(self, place: str) -> Sheet:
        found = self._flops_rows(place)
        rows = [(*key, flops_text(each.number), str(each)) for key, each in found]
        phases = dict.fromkeys(phase for phase, _ in self._computed[place])
        sums = [(phase, self.flops(phase=phase, place=place)) for phase in (*phases, "")]
        totals = [
            (phase or "in all", "in all" if phase else "", flops_text(each.number), str(each))
            for phase, each in sums
        ]
        columns = _columns("", "module")
        return Sheet("floating-point operations", columns, tuple(rows), tuple(totals))

    def _held_sheet(self, place: str) -> Sheet:
        found = ((part, self.memory(part, place=place)) for part in PARTS)
        rows = tuple((part, size_text(f.number), str(f)) for part, f in found if f.number)
        return Sheet("bytes held", _columns(""), rows)


def _columns(*heads: str) -> tuple[Column, ...]:
    return (*map(Column, heads), Column("", right=True), Column(""))


def _within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")


def _data(formula: Formula) -> dict[str, object]:
    return {"number": formula.number, "formula": str(formula)}


def cost(program: Compiled, names: Naming | None = None, convention: str = "pipelined") -> Cost:
    """The cost of a step of `program`; see `Program.cost`."""
    check_convention(convention)
    formulas = Formulas(program, names, convention)
    sent, computed, held = formulas.sent(), formulas.computed(), formulas.held()
    values = formulas.names.values
    return Cost(convention, values, tuple(formulas.ranks), formulas, sent, computed, held)
