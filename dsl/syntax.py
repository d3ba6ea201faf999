"""What the parser could not read, in the words of a user.

lark reports a token that does not fit; here each such report becomes a `PlanError` that names
what stands there, what is expected, and what to write.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from lark import Token
from lark.exceptions import UnexpectedInput, UnexpectedToken

from meshwright.dsl.errors import PlanError, nearest, quoted
from meshwright.dsl.source import Source, Span, make_span, token_span
from meshwright.dsl.statements import CONNECTIVES, STATEMENTS

TERMINALS = {
    "OVER": "`over` and a mesh axis",
    "AT": "`at` and a module",
    "PER": "`per` and a selector",
    "AS": "`as (3 heads hd)`",
    "NUMBER": "a number or an expression",
    "SELECTOR": "a name or pattern such as `blocks.*.up`",
    "WORD": "a word",
    "STRING": "a string in double quotes",
    "COMPARE": "a comparison such as `<=`",
    "ARROW": "`->` or `<-`",
    "FORWARD": "`forward`, `backward` or `step`",
    "ELLIPSIS": "`...`", "_SPLIT": "`@`", "EQUAL": "`=`", "COLON": "`:`", "VBAR": "`|`",
    "LPAR": "`(`", "LSQB": "`[`", "COMMA": "`,`", "RPAR": "`)`", "RSQB": "`]`",
    "PARTIAL": "`partial(axis)`",
    "KEY": "an option `key=value`",
    "_NL": "the end of the line",
}  # fmt: skip
"""How each terminal of the grammar is called in an error; operators and the rest go unnamed."""

_IMPLIED = {"NUMBER": {"WORD", "LPAR", "MINUS"}, "COMMA": {"PLUS"}}
"""Terminals that go without saying where another is named: an expression may be a word."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the parser stopped: the token before, the brackets still open, what would fit."""

    source: Source
    last: Token | None
    brackets: tuple[Token, ...]
    accepts: Collection[str]


def explain(error: UnexpectedInput, place: Place) -> PlanError:
    """The error for a text that the grammar does not take."""
    if isinstance(error, UnexpectedToken) and error.token.type in ("$END", "_NL"):
        return _stops_early(error.token, place)
    span, found = _culprit(place.source, error)
    if place.brackets and found in STATEMENTS and span.line > (place.brackets[-1].line or 0):
        return _never_closed(place, [span])
    if place.last is None or place.last.type == "_NL":
        return _no_verb(found, span)
    if match := re.fullmatch(r"([0-9]+)([^\W\d]\w*)", found):
        help = f"write `{match[1]}*{match[2]}`"
        return PlanError("P107", f"{quoted(found)} is no number", spans=[span], help=help)
    help = _advice(found, span, place.last) or _expected(place.accepts)
    return PlanError("P100", f"{quoted(found)} is not expected here", spans=[span], help=help)


def trailing_comma(source: Source, comma: Token, verb: Token) -> PlanError:
    """A comma carries the statement on to a line that begins with a verb."""
    return PlanError(
        "P104",
        f"the line ends in a comma, but {quoted(verb)} begins another statement",
        spans=[token_span(source, comma), token_span(source, verb)],
        help=f'remove the comma; a name that is `{verb}` goes in quotes: `"{verb}"`',
    )


def reserved(word: str, span: Span) -> PlanError:
    """A word of the language stands where a name is due."""
    missing = f"write a name before `{word}`, or " if word in CONNECTIVES else ""
    return PlanError(
        "P105",
        f"{quoted(word)} is a word of the language, not a name",
        spans=[span],
        help=f'{missing}put it in quotes if it is a name: `"{word}"`',
    )


def _stops_early(token: Token, place: Place) -> PlanError:
    last = place.last
    if place.brackets:
        return _never_closed(place, [])
    if last is not None and last.type == "COMMA":
        return PlanError(
            "P104",
            "a comma ends the line, and nothing follows it",
            spans=[token_span(place.source, last)],
            help="remove the comma",
        )
    at = (token.line or 1, token.column or 1)
    if token.type == "$END" and last is not None:
        at = (last.end_line or 1, last.end_column or 1)
    return PlanError(
        "P102",
        "the statement stops too early" if last is not None else "there is nothing to read",
        spans=[make_span(place.source, at, at)],
        help=_expected(place.accepts),
    )


def _never_closed(place: Place, also: list[Span]) -> PlanError:
    bracket = place.brackets[-1]
    return PlanError(
        "P103",
        f"{quoted(bracket)} is never closed",
        spans=[token_span(place.source, bracket), *also],
        help=f"add the missing `{')' if bracket == '(' else ']'}`",
    )


def _no_verb(found: str, span: Span) -> PlanError:
    close = nearest(found, STATEMENTS)
    help = f"write `{close[0]}`" if close else "begin the line with a verb, such as `columns`"
    return PlanError("P101", f"{quoted(found)} is not a verb", spans=[span], help=help)


def _culprit(source: Source, error: UnexpectedInput) -> tuple[Span, str]:
    """Where it went wrong and what stands there: a word, a string, or else one character."""
    line, column = max(error.line, 1), max(error.column, 1)
    text = source.line(line)[column - 1 :]
    match = re.match(r'[\w.*{}]+|"[^"]*"|[-=<>]+|.', text)
    found = match[0] if match else "the end"
    return make_span(source, (line, column), (line, column + len(found))), found


def _advice(found: str, span: Span, last: Token) -> str:
    """What to write instead of a few well-known slips."""
    if found.startswith("-") and last.type == "SELECTOR":
        around = re.findall(r"[\w-]+", span.source.line(span.line)[: span.column + 20])
        name = next((word for word in reversed(around) if "-" in word.strip("-")), "layer-1")
        return f'put a name that has a dash in quotes: `"{name}"`'
    if found.startswith("'"):
        return "use double quotes"
    if found.startswith("{"):
        return "close the choice with `}`: `{q,k,v}_proj`"
    if found == '"':
        return 'close the string with `"` on the same line'
    if found.startswith("*") and last.type == "STAR":
        return "write a power as a product: `d*d`"
    if found.startswith("*") and last.type in ("WORD", "NUMBER"):
        return "bind the product with `let`, and write its name"
    if found == "," and last.type in ("WORD", "NUMBER", "SIZE", "RSQB", "DIGIT_WORD"):
        return "separate options by spaces"
    return ""


def _expected(accepts: Collection[str]) -> str:
    """A help line that names what would fit."""
    implied = {each for name in _IMPLIED if name in accepts for each in _IMPLIED[name]}
    fits = set(accepts) - implied
    names = [text for name, text in TERMINALS.items() if name in fits]
    if {verb.upper() for verb in STATEMENTS} <= fits:
        names = ["a verb such as `columns`"]
    if not names:
        return "remove it"
    *most, last = names
    return "write " + (f"{', '.join(most)} or {last}" if most else last)
