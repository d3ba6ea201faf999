"""Parse trees of values to values; expressions become sympy terms, node by node.

sympy never sees text: `sympify` would execute it.
"""

from __future__ import annotations

import operator
from fractions import Fraction
from typing import Any, TypeAlias

import sympy
from lark import Token, Transformer, Tree, v_args
from lark.exceptions import VisitError
from lark.tree import Meta

from meshwright.dsl.errors import PlanError
from meshwright.dsl.source import Source, Span, token_span, tree_span
from meshwright.dsl.values import Items, Number, Quoted, Value, Word, parse_bytes, symbolic

_MOST_TERMS = 64
_LONGEST_NUMBER = 24
_LARGEST_EXPONENT = 30
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

Sizing: TypeAlias = tuple[Token, Value]


@v_args(meta=True)
class ValueReader(Transformer[Token, object]):
    """Reads what needs no names: numbers, words, strings, lists, ranges and expressions."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def read(self, tree: Tree[Token]) -> Any:
        """The value of a tree; a `PlanError` is raised as it is, not wrapped by lark."""
        try:
            return self.transform(tree)
        except VisitError as error:
            if isinstance(error.orig_exc, PlanError):
                raise error.orig_exc from None
            raise

    def _span(self, meta: Meta) -> Span:
        return tree_span(self.source, meta)

    def sizing(self, meta: Meta, parts: list[object]) -> Sizing:
        key, value = parts
        assert isinstance(key, Token)
        return key, self._value(value)

    def _value(self, part: object) -> Value:
        """A part as a value; a string is still a token of the grammar."""
        if isinstance(part, Token):
            return Quoted(part[1:-1], token_span(self.source, part))
        assert isinstance(part, (Word, Number, Quoted, Items)), part
        return part

    def items(self, meta: Meta, parts: list[object]) -> Items:
        values = (self._value(part) for part in parts if part is not None)
        return Items(tuple(values), self._span(meta))

    def range(self, meta: Meta, parts: list[object]) -> Items:
        return Items(tuple(map(self._value, parts)), self._span(meta), is_range=True)

    def sum(self, meta: Meta, parts: list[object]) -> Value:
        return self._fold(meta, parts, " ")

    def product(self, meta: Meta, parts: list[object]) -> Value:
        return self._fold(meta, parts, "")

    def negated(self, meta: Meta, parts: list[object]) -> Value:
        value = self._value(parts[-1])
        return Number(-symbolic(value), f"-{value.text}", self._span(meta))

    def group_of(self, meta: Meta, parts: list[object]) -> Value:
        value = self._value(parts[0])
        return Number(symbolic(value), f"({value.text})", self._span(meta))

    def atom(self, meta: Meta, parts: list[object]) -> Value:
        (part,) = parts
        assert isinstance(part, Token), part
        span = token_span(self.source, part)
        if part.type in ("WORD", "DIGIT_WORD"):
            return Word(str(part), span)
        return Number(_literal(part, span), str(part), span)

    def _fold(self, meta: Meta, parts: list[object], space: str) -> Value:
        if len(parts) > 2 * _MOST_TERMS + 1:
            raise PlanError(
                "P108",
                f"an expression has more than {_MOST_TERMS} terms",
                spans=[self._span(meta)],
                help="give parts of it names with `let`",
            )
        values = [self._value(part) for part in parts[::2]]
        signs = [str(sign) for sign in parts[1::2]]
        text = values[0].text + "".join(
            f"{space}{sign}{space}{value.text}"
            for sign, value in zip(signs, values[1:], strict=True)
        )
        total = symbolic(values[0])
        for sign, value in zip(signs, values[1:], strict=True):
            total = _OPERATORS[sign](total, symbolic(value))
        return Number(total, text, self._span(meta))


def _literal(token: Token, span: Span) -> sympy.Rational:
    exponent = token.lower().partition("e")[2].lstrip("+-")
    if len(token) > _LONGEST_NUMBER or (
        token.type == "NUMBER" and exponent and int(exponent) > _LARGEST_EXPONENT
    ):
        raise PlanError(
            "P106", "the number is too large", spans=[span], help="use numbers below 2**63"
        )
    number = parse_bytes(token) if token.type == "SIZE" else Fraction(token)
    return sympy.Rational(number.numerator, number.denominator)
