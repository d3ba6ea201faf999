"""Values of options: as they are written, and the kinds that an option may ask for.

A `Kind` turns a written value into a typed one and back into text, or says why it cannot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

import sympy

from meshwright.dsl.errors import PlanError, did_you_mean, either, quoted
from meshwright.dsl.source import Span

UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Word:
    """A bare word: a name of a `let`, or a keyword such as `ring` or `1f1b`."""

    text: str
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Number:
    """A number or an expression: what is written, and its sympy form over `let` names."""

    expression: sympy.Expr
    text: str
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Quoted:
    """A string in double quotes, without them."""

    value: str
    span: Span = field(compare=False, repr=False)

    @property
    def text(self) -> str:
        return f'"{self.value}"'


@dataclass(frozen=True, slots=True)
class Items:
    """A list in brackets, or a range `[0:6]`, which no verb takes yet."""

    values: tuple[Value, ...]
    span: Span = field(compare=False, repr=False)
    is_range: bool = False

    @property
    def text(self) -> str:
        separator = ":" if self.is_range else ", "
        return f"[{separator.join(value.text for value in self.values)}]"


Value: TypeAlias = "Word | Number | Quoted | Items"
Sizes: TypeAlias = Mapping[str, "sympy.Rational"]


class Kind(Protocol):
    """What an option takes. `read` raises `PlanError`; `write` gives text that reads back."""

    def read(self, value: Value, sizes: Sizes) -> Any: ...

    def write(self, value: Any) -> str: ...


@dataclass(frozen=True)
class Count:
    """A whole number, at least `low`."""

    low: int = 1

    def read(self, value: Value, sizes: Sizes) -> int:
        number = evaluate(value, sizes)
        if number.q != 1 or number < self.low:
            at_least = f"write a whole number, {self.low} or more"
            raise PlanError(
                "P111", _not_a_count(value.text, number), spans=[value.span], help=at_least
            )
        return int(number)

    def write(self, value: int) -> str:
        return str(value)


@dataclass(frozen=True)
class Ratio:
    """A number above `low`, up to `high`."""

    low: float = 0.0
    high: float = math.inf

    def read(self, value: Value, sizes: Sizes) -> float:
        number = float(evaluate(value, sizes))
        if not self.low < number <= self.high:
            limit = f" and at most {self.high:g}" if self.high < math.inf else ""
            raise PlanError(
                "P111",
                f"{value.text} is out of range",
                spans=[value.span],
                help=f"write a number above {self.low:g}{limit}",
            )
        return number

    def write(self, value: float) -> str:
        return repr(value)


@dataclass(frozen=True)
class ByteSize:
    """A number of bytes, written with a unit: `60GiB`."""

    def read(self, value: Value, sizes: Sizes) -> int:
        number = evaluate(value, sizes)
        if number.q != 1 or number < 1:
            raise PlanError(
                "P111",
                f"{value.text} is no number of bytes",
                spans=[value.span],
                help="write a size with a unit, such as `60GiB`",
            )
        return int(number)

    def write(self, value: int) -> str:
        return format_bytes(value)


@dataclass(frozen=True)
class Choice:
    """One of a few words; with `path`, or a string that names a file."""

    words: tuple[str, ...]
    path: bool = False

    def read(self, value: Value, sizes: Sizes) -> str:
        if isinstance(value, Word) and value.text in self.words:
            return value.text
        if self.path and isinstance(value, Quoted) and value.value:
            return value.text
        raise PlanError(
            "P111",
            f"{quoted(value.text)} is not a choice here",
            spans=[value.span],
            help=did_you_mean(value.text, self.words),
        )

    def write(self, value: str) -> str:
        return value


@dataclass(frozen=True)
class Flag:
    """`true` or `false`."""

    def read(self, value: Value, sizes: Sizes) -> bool:
        if isinstance(value, Word) and value.text in ("true", "false"):
            return value.text == "true"
        raise PlanError(
            "P111",
            f"{quoted(value.text)} is not a yes or no",
            spans=[value.span],
            help=f"use {either(['true', 'false'])}",
        )

    def write(self, value: bool) -> str:
        return "true" if value else "false"


@dataclass(frozen=True)
class Words:
    """A list of words: `[sdpa, norm]`; one alone needs no brackets."""

    def read(self, value: Value, sizes: Sizes) -> tuple[str, ...]:
        items = value.values if isinstance(value, Items) and not value.is_range else (value,)
        for item in items:
            if not isinstance(item, Word):
                raise PlanError(
                    "P111",
                    f"{quoted(item.text)} is not a word",
                    spans=[item.span],
                    help="write a list of words, such as `[sdpa, norm]`",
                )
        return tuple(item.text for item in items)

    def write(self, value: tuple[str, ...]) -> str:
        return f"[{', '.join(value)}]"


@dataclass(frozen=True)
class AxisName:
    """The name of a mesh axis, checked against the mesh with the statement's other axes."""

    def read(self, value: Value, sizes: Sizes) -> str:
        if isinstance(value, Word) and not value.text[0].isdigit():
            return value.text
        raise PlanError(
            "P111",
            f"{quoted(value.text)} is not an axis",
            spans=[value.span],
            help="write the name of a mesh axis",
        )

    def write(self, value: str) -> str:
        return value


def evaluate(value: Value, sizes: Sizes) -> sympy.Rational:
    """The number that a value stands for, with `let` names replaced by their sizes."""
    if isinstance(value, Word):
        value = Number(symbol_of(value), value.text, value.span)
    if not isinstance(value, Number):
        raise PlanError(
            "P106",
            f"{quoted(value.text)} is not a number",
            spans=[value.span],
            help="write a number or an expression",
        )
    unbound = sorted(s.name for s in value.expression.free_symbols if s.name not in sizes)
    if unbound:
        raise unbound_name(unbound[0], value.span, sizes)
    number = value.expression.subs(
        {symbol: sizes[symbol.name] for symbol in value.expression.free_symbols}
    )
    if not isinstance(number, sympy.Rational):
        raise PlanError(
            "P122",
            f"{quoted(value.text)} divides by zero",
            spans=[value.span],
            help="change the divisor to a number other than 0",
        )
    if max(abs(number.p), number.q) > LARGEST:
        raise PlanError(
            "P106",
            f"{quoted(value.text)} is too large",
            spans=[value.span],
            help="use numbers below 2**63",
        )
    return number


def unbound_name(name: str, span: Span, sizes: Sizes) -> PlanError:
    """A word where a number is due, which no `let` binds."""
    close = did_you_mean(name, sizes) if sizes else ""
    help = close if close.startswith("write") else f"bind it: `let {name} = ...`"
    return PlanError(
        "P120", f"{quoted(name)} is no number: no `let` binds it", spans=[span], help=help
    )


def symbol_of(word: Word) -> sympy.Symbol:
    match = re.fullmatch(r"([0-9]+)([^\W\d]\w*)", word.text)
    if match:
        raise PlanError(
            "P107",
            f"{quoted(word.text)} is no number",
            spans=[word.span],
            help=f"write `{match[1]}*{match[2]}`",
        )
    return sympy.Symbol(word.text)


def _not_a_count(text: str, number: sympy.Rational) -> str:
    is_number = "" if text == str(number) else f" is {number}, which"
    return f"`{text}`{is_number} is {'too small' if number.q == 1 else 'not a whole number'}"


def format_bytes(count: int) -> str:
    """The shortest exact way to write a number of bytes with a unit."""
    texts = [f"{count // size}{unit}" for unit, size in UNITS.items() if count % size == 0]
    return min(texts, key=len)


def parse_bytes(text: str) -> Fraction:
    """The number of bytes that `60GiB` stands for."""
    digits = text.rstrip("KMGTiB")
    return Fraction(digits) * UNITS[text[len(digits) :]]
