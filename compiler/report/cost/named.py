"""Numbers that know their formula, so that what counts bytes and operations gives formulas too.

A `Named` is an `int`: whatever compares it, divides by it or takes the larger of two does what it
does with a number. Sums and products carry the formula along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import sympy

Mark: TypeAlias = "tuple[str, int]"
"""A repeated block: the list of modules that it is in, and its index there."""
Term: TypeAlias = "tuple[Mark | None, sympy.Expr]"
"""A monomial, and the block that it is counted in."""


class Named(int):
    """A number, as a sum of terms with coefficients."""

    terms: Mapping[Term, Fraction]

    @classmethod
    def of(cls, value: int, expr: Any) -> Named:
        """A number and its formula, which is a product."""
        coefficient, rest = sympy.sympify(expr).as_coeff_Mul()
        return cls._made(value, {(None, rest): Fraction(int(coefficient.p), int(coefficient.q))})

    @classmethod
    def _made(cls, value: int, terms: Mapping[Term, Fraction]) -> Named:
        found = cls(value)
        found.terms = terms
        return found

    def at(self, mark: Mark | None) -> Named:
        """The same, with what is in no block yet counted in this one."""
        terms = {(own or mark, expr): each for (own, expr), each in self.terms.items()}
        return Named._made(int(self), terms)

    @property
    def expr(self) -> sympy.Expr:
        """The formula, without blocks."""
        rational = (sympy.Rational(n.numerator, n.denominator) for n in self.terms.values())
        return sympy.Add(*(n * expr for n, (_, expr) in zip(rational, self.terms, strict=True)))

    def share(self, part: Any, fraction: Fraction) -> Named:
        """The number times a fraction of which `part` is the formula, rounded down."""
        terms: dict[Term, Fraction] = {}
        for (mark, expr), each in self.terms.items():
            coefficient, rest = (expr * part).as_coeff_Mul()
            key = mark, rest
            scale = Fraction(int(coefficient.p), int(coefficient.q))
            terms[key] = terms.get(key, Fraction(0)) + each * scale
        return Named._made(int(int(self) * fraction), terms)

    def __add__(self, other: int) -> Named:
        if not isinstance(other, int):
            return NotImplemented
        terms = dict(self.terms)
        for key, each in terms_of(other).items():
            terms[key] = terms.get(key, Fraction(0)) + each
        return Named._made(int(self) + int(other), terms)

    __radd__ = __add__

    def __neg__(self) -> Named:
        return Named._made(-int(self), {key: -each for key, each in self.terms.items()})

    def __sub__(self, other: int) -> Named:
        return self + -other

    def __rsub__(self, other: int) -> Named:
        return -self + other

    def __mul__(self, other: int) -> Named:
        if not isinstance(other, int):
            return NotImplemented
        terms: dict[Term, Fraction] = {}
        for (mark, a), x in self.terms.items():
            for (own, b), y in terms_of(other).items():
                key = mark or own, a * b
                terms[key] = terms.get(key, Fraction(0)) + x * y
        return Named._made(int(self) * int(other), terms)

    __rmul__ = __mul__


def terms_of(number: int) -> Mapping[Term, Fraction]:
    """The terms of a number; one without a formula is one term."""
    if isinstance(number, Named):
        return number.terms
    return {(None, sympy.Integer(1)): Fraction(number)} if number else {}


def total(numbers: Iterable[int]) -> Named:
    """The sum, with its terms."""
    terms: dict[Term, Fraction] = {}
    value = 0
    for number in numbers:
        value += int(number)
        for key, each in terms_of(number).items():
            terms[key] = terms.get(key, Fraction(0)) + each
    return Named._made(value, terms)
