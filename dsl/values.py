"""Values as they are written, and the numbers that they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

import sympy

from meshwright.dsl.errors import PlanError, nearest, quoted
from meshwright.dsl.source import Span

UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
LARGEST = 2**63 - 1
_LONGEST_WORD = 40
_LOOSE_UNITS = {unit.lower().removesuffix("b"): unit for unit in UNITS if unit != "B"} | {
    short: f"{short.upper()}iB" for short in "mgt"
}


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
    """A list in brackets, or a range `[0:6]`, which no option takes."""

    values: tuple[Value, ...]
    span: Span = field(compare=False, repr=False)
    is_range: bool = False

    @property
    def text(self) -> str:
        separator = ":" if self.is_range else ", "
        return f"[{separator.join(value.text for value in self.values)}]"


Value: TypeAlias = "Word | Number | Quoted | Items"
Sizes: TypeAlias = Mapping[str, "sympy.Rational"]


def evaluate(value: Value, sizes: Sizes) -> sympy.Rational:
    """The number that a value stands for, with `let` names replaced by their sizes."""
    if not isinstance(value, (Word, Number)):
        raise wrong_value(value, "is not a number", "write a number or an expression", "P106")
    expression = symbolic(value)
    for name in sorted(symbol.name for symbol in expression.free_symbols):
        if name not in sizes:
            raise unbound_name(name, value.span, sizes)
    number = expression.subs({symbol: sizes[symbol.name] for symbol in expression.free_symbols})
    if not isinstance(number, sympy.Rational):
        help = "change the divisor to a number other than 0"
        raise wrong_value(value, "divides by zero", help, "P122")
    if max(abs(number.p), number.q) > LARGEST:
        raise wrong_value(value, "is too large", "use numbers below 2**63", "P106")
    return number


def symbolic(value: Value) -> sympy.Expr:
    """A word or an expression as a sympy term over `let` names."""
    if isinstance(value, Number):
        return value.expression
    assert isinstance(value, Word), value
    if match := re.fullmatch(r"([0-9]+)([^\W\d]\w*)", value.text):
        if len(value.text) > _LONGEST_WORD:
            raise wrong_value(value, "is not a number", "write a number or the name of one", "P107")
        raise wrong_value(
            value, "is not a number", f"write `{_as_number(*match.groups())}`", "P107"
        )
    return sympy.Symbol(value.text)


def _as_number(digits: str, rest: str) -> str:
    """What `60G`, `1_000`, `0x10` or `2d` was meant to be."""
    if (unit := _LOOSE_UNITS.get(rest.lower().removesuffix("b"))) is not None:
        return f"{digits}{unit}"
    if rest.replace("_", "").isdigit():
        return f"{digits}{rest}".replace("_", "")
    if digits == "0" and re.fullmatch(r"x[0-9a-fA-F]{1,15}", rest):
        return str(int(rest[1:], 16))
    return f"{digits}*{rest}"


def wrong_value(value: Value, what: str, help: str, code: str = "P111") -> PlanError:
    """The error for a wrong value; `what` is the message after the value as it is written."""
    written = value.span.text or value.text
    return PlanError(code, f"{quoted(written)} {what}", spans=[value.span], help=help)


def unbound_name(name: str, span: Span, bound: Mapping[str, object]) -> PlanError:
    """The error for a name in place of a number that no `let` binds."""
    close = nearest(name, bound)
    help = f"write `{close[0]}`" if close else "write a number"
    help += "" if close else f", or add a line such as `let {quoted(name)[1:-1]} = 2`"
    message = f"{quoted(name)} is not a number, and no `let` binds it"
    return PlanError("P120", message, spans=[span], help=help)


def format_bytes(count: int) -> str:
    """The shortest exact way to write a number of bytes with a unit."""
    texts = [f"{count // size}{unit}" for unit, size in UNITS.items() if count % size == 0]
    return min(texts, key=len)


def parse_bytes(text: str) -> Fraction:
    """The number of bytes that `60GiB` stands for."""
    digits = text.rstrip("KMGTiB")
    return Fraction(digits) * UNITS[text[len(digits) :]]
