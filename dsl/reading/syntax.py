"""Syntax errors, in a user's words.

lark reports a token that does not fit; here each such report becomes a `PlanError` that says what
was found, what is expected, and what to write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from lark import Token
from lark.exceptions import UnexpectedInput, UnexpectedToken

from meshwright.dsl.characters import described, is_strange, stand_in
from meshwright.dsl.errors import PlanError, quoted
from meshwright.dsl.reading.slips import advice, example, repaired, verb_for
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
"""What errors call the terminals of the grammar; operators and the rest are not named."""

_IMPLIED = {"NUMBER": {"WORD", "LPAR", "MINUS"}, "COMMA": {"PLUS"}}
"""Terminals that are left out where another is named: an expression may be a word."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the parser stopped: the token before, the brackets still open, what would fit.

    `reads` says whether the grammar accepts a line.
    """

    source: Source
    rule: str
    last: Token | None
    brackets: tuple[Token, ...]
    accepts: Collection[str]
    reads: Callable[[str], bool]


def explain(error: UnexpectedInput, place: Place) -> PlanError:
    """The error for a text that the grammar rejects."""
    if isinstance(error, UnexpectedToken) and error.token.type in ("$END", "_NL"):
        return _stops_early(error.token, place)
    span, found = _culprit(place.source, error)
    if (strange := _strange(span)) is not None:
        return _not_of_the_language(strange, place)
    if place.brackets and found in STATEMENTS and span.line > (place.brackets[-1].line or 0):
        return _never_closed(place, [span])
    if place.brackets and found == {"(": "]", "[": ")"}[place.brackets[-1]]:
        return _never_closed(place, [span])
    if place.last is None or place.last.type == "_NL":
        return _no_verb(found, span, place)
    help = _written_right(span, place)
    if match := re.fullmatch(r"([0-9]+)([^\W\d]\w*)", found):
        if "KEY" in place.accepts:
            help = help or f"begin the name with a letter: `{match[2]}{match[1]}`"
        help = help or f"write `{match[1]}*{match[2]}`"
        return PlanError("P107", f"{quoted(found)} is not a number", spans=[span], help=help)
    help = help or _advice(found, span, place.last) or _expected(place, span)
    return PlanError("P100", f"{quoted(found)} is not expected here", spans=[span], help=help)


def _strange(span: Span) -> Span | None:
    """The first character, from the culprit to the end of its line, that no plan may have."""
    line, at = span.source.line(span.line), span.column - 1
    code = re.sub(r'"[^"]*"|#.*', lambda found: " " * len(found[0]), line)
    column = next((i for i, char in enumerate(code) if i >= at and is_strange(char)), None)
    if column is None:
        return None
    return make_span(span.source, (span.line, column + 1), (span.line, column + 2))


def _not_of_the_language(span: Span, place: Place) -> PlanError:
    """The error for a character that is invisible, or looks like one of the language."""
    char = span.text
    alike = stand_in(char)
    help = _written_right(span, place) or _other_format(span)
    help = help or (f"write `{alike}`" if alike else "remove it")
    shown = f"`{char}` ({described(char)})" if char.isprintable() else f"`{described(char)}`"
    return PlanError("P100", f"{shown} is not a character of the language", spans=[span], help=help)


def _written_right(span: Span, place: Place) -> str:
    """Help that shows the line as the language has it; empty if that is unknown."""
    if place.rule != "plan":
        return ""
    line = repaired(span.source.line(span.line), place.reads)
    return f"write `{line}`" if line else ""


def trailing_comma(source: Source, comma: Token, verb: Token) -> PlanError:
    """The error for a comma at the end of a line, before one that begins with a verb."""
    return PlanError(
        "P104",
        f"the line ends in a comma, but {quoted(verb)} begins another statement",
        spans=[token_span(source, comma), token_span(source, verb)],
        help=f'remove the comma; a name that is `{verb}` goes in quotes: `"{verb}"`',
    )


def reserved(word: str, span: Span, reads: Callable[[str], bool] | None) -> PlanError:
    """The error for a keyword where a name is expected."""
    if line := repaired(span.source.line(span.line), reads) if reads is not None else "":
        help = f"write `{line}`"
    else:
        missing = f"write a name before `{word}`, or " if word in CONNECTIVES else ""
        help = f'{missing}put it in quotes if it is a name: `"{word}"`'
    message = f"{quoted(word)} is a keyword, not a name"
    return PlanError("P105", message, spans=[span], help=help)


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
    span = make_span(place.source, at, at)
    return PlanError(
        "P102",
        "the statement stops too early" if last is not None else "there is nothing to read",
        spans=[span],
        help=_written_right(span, place) or _expected(place, span),
    )


def _never_closed(place: Place, also: list[Span]) -> PlanError:
    bracket = place.brackets[-1]
    return PlanError(
        "P103",
        f"{quoted(bracket)} is never closed",
        spans=[token_span(place.source, bracket), *also],
        help=f"add the missing `{')' if bracket == '(' else ']'}`",
    )


def _no_verb(found: str, span: Span, place: Place) -> PlanError:
    verb = "" if found in STATEMENTS else verb_for(found)
    with_verb = _with_verb(span, found, verb)
    if verb in STATEMENTS and place.reads(with_verb):
        help = f"write `{verb}`"
    elif verb and len(with_verb) == len(verb):
        help = f"write a statement such as `{example(verb)}`"
    else:
        help = _written_right(span, place) or _other_format(span) or advice(found)
    if verb and not help:
        help = f"write `{verb}`, as in `{example(verb)}`"
    help = help or "begin the line with a verb, such as `columns`"
    return PlanError("P101", f"{quoted(found)} is not a verb", spans=[span], help=help)


def _with_verb(span: Span, found: str, verb: str) -> str:
    line = span.source.line(span.line)
    return (line[: span.column - 1] + verb + line[span.column - 1 + len(found) :]).strip()


def _other_format(span: Span) -> str:
    """What to do with a path, a program or a data file in place of a plan."""
    line = span.source.line(span.line).strip()
    if re.fullmatch(r"\S*(/\S+|\.(plan|txt|mesh))", line) and len(span.source.lines) <= 2:
        return f"read a file with `Plan.load({quoted(line, 60)[1:-1]!r})`".replace("'", '"')
    if line.startswith("```"):
        return "remove the line: a plan has no code fences"
    if line[:1] in "{[":
        return "write one statement per line, such as `mesh dp=2, tp=2`"
    return ""


def _culprit(source: Source, error: UnexpectedInput) -> tuple[Span, str]:
    """The place of the error and what was found there: a word, a string, or one character."""
    line, column = max(error.line, 1), max(error.column, 1)
    text = source.line(line)[column - 1 :]
    match = re.match(r'[\w.*{}]+|"[^"]*"|[-=<>]+|.', text)
    found = match[0] if match else "the end"
    return make_span(source, (line, column), (line, column + len(found))), found


def _advice(found: str, span: Span, last: Token) -> str:
    """What to write instead of a few common slips; empty for others."""
    if found.startswith("-") and last.type == "SELECTOR":
        around = re.findall(r"[\w-]+", span.source.line(span.line)[: span.column + 20])
        name = next((word for word in reversed(around) if "-" in word.strip("-")), "layer-1")
        return f'put a name that has a dash in quotes: `"{name}"`'
    if found.startswith("'"):
        return "use double quotes"
    if found == ";":
        return "begin a new line in place of `;`"
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


def _expected(place: Place, span: Span) -> str:
    """Help that names what would fit, with an example of the statement."""
    implied = {each for name in _IMPLIED if name in place.accepts for each in _IMPLIED[name]}
    fits = set(place.accepts) - implied
    names = [text for name, text in TERMINALS.items() if name in fits]
    if {verb.upper() for verb in STATEMENTS} <= fits:
        names = ["a verb such as `columns`"]
    if not names:
        return "remove it"
    *most, last = names
    verb = re.match(r"\s*(\w*)", span.source.line(span.line))
    shown = example(verb[1]) if verb and verb[1] and place.rule == "plan" else ""
    return (
        "write "
        + (f"{', '.join(most)} or {last}" if most else last)
        + (f", as in `{shown}`" if shown else "")
    )
