"""Text to parse trees: line continuation, limits, and the one place that runs lark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput
from lark.lark import PostLex
from lark.parsers.lalr_interactive_parser import InteractiveParser

from meshwright.dsl.errors import PlanError
from meshwright.dsl.reading import syntax
from meshwright.dsl.source import Source, token_span
from meshwright.dsl.statements import CONNECTIVES, STATEMENTS

MOST_CHARACTERS = 1 << 16
DEEPEST = 24

_GRAMMAR = Path(__file__).parent.parent / "grammar.lark"


@dataclass(slots=True)
class Reading:
    """The state of reading the tokens of one text."""

    source: Source
    brackets: list[Token] = field(default_factory=list)
    """Those not yet closed, outermost first."""
    comma: Token | None = None
    """The comma that ended the line above, until something follows it."""
    last: Token | None = None
    comments: list[Token] = field(default_factory=list)
    reads: Callable[[str], bool] | None = None
    """Tells whether the grammar accepts a line, so that only such lines are suggested."""

    def filter(self, stream: Iterator[Token]) -> Iterator[Token]:
        """The tokens of the grammar: no comments, and line ends only where a statement ends."""
        for token in stream:
            if token.type == "COMMENT":
                self.comments.append(token)
            elif token.type == "_NL" and self.brackets:
                continue
            elif token.type == "_NL" and self.last is not None and self.last.type == "COMMA":
                self.comma = self.last
            else:
                self._check(token)
                yield token
                self._accepted(token)

    def _check(self, token: Token) -> None:
        if self.comma is not None and token.type in ("WORD", "SELECTOR") and token in STATEMENTS:
            raise syntax.trailing_comma(self.source, self.comma, token)
        if token.type == "SELECTOR" and (token in STATEMENTS or token in CONNECTIVES):
            raise syntax.reserved(token, token_span(self.source, token), self.reads)

    def _accepted(self, token: Token) -> None:
        if token.type in ("LPAR", "LSQB"):
            self.brackets.append(token)
        elif token.type in ("RPAR", "RSQB") and self.brackets:
            self.brackets.pop()
        if len(self.brackets) > DEEPEST:
            raise PlanError(
                "P108",
                f"brackets are nested more than {DEEPEST} deep",
                spans=[token_span(self.source, token)],
                help="give the inner parts names with `let`",
            )
        self.last, self.comma = token, None


class _WordsEverywhere(PostLex):
    """Accepts words everywhere, so that the lexer never cuts a keyword out of a longer word."""

    always_accept = ("_NL", "WORD", "DIGIT_WORD", "COMMENT")

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return stream


def parse_plan(source: Source) -> tuple[list[Tree[Token]], list[Token]]:
    """The trees of the statements, and the comments."""
    tree, comments = _parse(source, source.text + "\n", "plan")
    return [child for child in tree.children if isinstance(child, Tree)], comments


def parse_layout(source: Source) -> Tree[Token]:
    """The tree of a text that is a layout."""
    return _parse(source, source.text, "layout")[0]


def _parse(source: Source, text: str, rule: str) -> tuple[Tree[Token], list[Token]]:
    if len(text) > MOST_CHARACTERS:
        raise PlanError(
            "P108",
            f"the text has more than {MOST_CHARACTERS} characters",
            help="use patterns, so that one statement covers many names",
        )
    reading = Reading(source, reads=_reads if rule == "plan" else None)
    parser = _lark().parse_interactive(text, start=rule)
    try:
        return _feed(parser, reading), reading.comments
    except UnexpectedInput as error:
        accepts = parser.accepts()  # type: ignore[no-untyped-call]
        brackets = tuple(reading.brackets)
        place = syntax.Place(source, rule, reading.last, brackets, accepts, _reads)
        raise syntax.explain(error, place) from None


def _feed(parser: InteractiveParser, reading: Reading) -> Tree[Token]:
    # lark leaves these methods untyped
    tokens = parser.lexer_thread.lex(parser.parser_state)  # type: ignore[no-untyped-call]
    for token in reading.filter(tokens):
        parser.feed_token(token)
    tree: Tree[Token] = parser.feed_eof(reading.last)  # type: ignore[no-untyped-call]
    return tree


def _reads(line: str) -> bool:
    """Whether the grammar accepts a line."""
    source = Source("<line>", line)
    try:
        _feed(_lark().parse_interactive(source.text + "\n", start="plan"), Reading(source))
    except (UnexpectedInput, PlanError):
        return False
    return True


@lru_cache(maxsize=1)
def _lark() -> Lark:
    return Lark(
        _GRAMMAR.read_text(encoding="utf-8"),
        parser="lalr",
        lexer="contextual",
        start=["plan", "layout"],
        postlex=_WordsEverywhere(),
        propagate_positions=True,
    )
