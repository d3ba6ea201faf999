"""Selectors: globs over fully qualified names.

    blocks.*.attn.qkv     `*` is one segment, and may stand inside one: `*_proj`
    model.**.weight       `**` is any number of segments, including none
    blocks.[0:6]          a range of the numbered children
    {q,k,v}_proj          a choice
    "layer-1".fc          quotes around what is not a plain name; `""` is the model itself

Of two selectors that match one name the more specific wins: compared segment by segment from the
left (a `**` counts for each segment it took), it is nowhere less specific and somewhere more.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from meshwright.dsl.errors import PlanError, quoted
from meshwright.dsl.source import Span

_RANKS = {"literal": 0, "range": 1, "choice": 1, "wildcard": 2, "*": 3, "**": 4}
"""How specific each kind of segment is; less is more specific."""

_MOST_ALTERNATIVES = 256
_PIECE = re.compile(r'"[^"\n]*"|\[[0-9]*:[0-9]*\]|(?:[\w*]|\{[^{}\n]*\})+')
_PLAIN = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of a selector; `globs` are its alternatives, with `*` as the only wildcard."""

    kind: Literal["literal", "range", "choice", "wildcard", "*", "**"]
    text: str
    globs: tuple[str, ...] = ()
    low: int = 0
    high: float = math.inf

    def matches(self, name: str) -> bool:
        """Whether this segment, which is not `**`, matches one segment of a name."""
        if self.kind == "literal":
            return self.globs[0] == name
        if self.kind == "*":
            return True
        if self.kind == "range":
            return name.isascii() and name.isdigit() and self.low <= int(name) < self.high
        return any(_glob_matches(glob, name) for glob in self.globs)


@dataclass(frozen=True, slots=True)
class Selector:
    """A pattern over dotted names. Selectors are equal when their texts are."""

    text: str
    span: Span | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.text

    @property
    def segments(self) -> tuple[Segment, ...]:
        return _segments(self)

    @property
    def is_name(self) -> bool:
        """Whether it has no wildcard, so that it matches one name at most."""
        return all(segment.kind == "literal" for segment in self.segments)

    def check(self) -> None:
        """Raise a `PlanError` if the text is not a selector."""
        _segments(self)

    def match(self, names: Collection[str]) -> list[str]:
        """The names that this selector matches, in their order."""
        segments = self.segments
        literals = itertools.takewhile(lambda segment: segment.kind == "literal", segments)
        start = ".".join(segment.text for segment in literals)
        if self.is_name:
            return [name for name in names if name == start]
        return [name for name in names if name.startswith(start) and self.matches(name)]

    def matches(self, name: str) -> bool:
        return self.ranks(name) is not None

    def ranks(self, name: str) -> tuple[int, ...] | None:
        """How specifically each segment of `name` is matched; `None` if the name is not."""
        parts = tuple(name.split(".")) if name else ()
        segments = self.segments
        fixed = len(segments) - sum(segment.kind == "**" for segment in segments)
        if len(parts) < fixed or (len(parts) > fixed and fixed == len(segments)):
            return None
        return _align(segments, parts)

    def under(self, path: str) -> Selector:
        """The selector over the whole model, for this one relative to the module at `path`."""
        if not path:
            return self
        prefix = ".".join(quote_segment(part) for part in path.split("."))
        text = prefix if self.text == '""' else f"{prefix}.{self.text}"
        return replace(self, text=text)


EVERYTHING = Selector("**")


def quote_segment(name: str) -> str:
    """One segment of a name as a selector writes it."""
    return name if re.fullmatch(r"\w+", name) else f'"{name}"'


def more_specific(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether ranks `first` are nowhere less specific than `second`, and somewhere more."""
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def _align(segments: tuple[Segment, ...], parts: tuple[str, ...]) -> tuple[int, ...] | None:
    """Ranks of `parts` under `segments`, each `**` taking as few of them as it can.

    Dynamic programming over suffixes, so that no pattern takes more than their product in time.
    """
    tails: list[tuple[int, ...] | None] = [None] * len(parts) + [()]
    for segment in reversed(segments):
        if segment.kind == "**":
            for i in reversed(range(len(parts))):
                tail = tails[i + 1]
                if tails[i] is None and tail is not None:
                    tails[i] = (_RANKS["**"], *tail)
        else:
            tails = [
                (_RANKS[segment.kind], *tail)
                if tail is not None and segment.matches(part)
                else None
                for part, tail in zip(parts, tails[1:], strict=True)
            ] + [None]
    return tails[0]


@lru_cache(maxsize=4096)  # equal selectors share an entry: no result has a span
def _segments(selector: Selector) -> tuple[Segment, ...]:
    return tuple(
        itertools.chain.from_iterable(_read(piece, selector) for piece in _pieces(selector))
    )


def _pieces(selector: Selector) -> Iterator[str]:
    at, text = 0, selector.text
    while found := _PIECE.match(text, at):
        yield found[0]
        at = found.end() + 1
        if found.end() == len(text):
            return
        if text[found.end()] != ".":
            break
    raise _unreadable(selector, "write names and patterns joined by dots, such as `blocks.*.up`")


def _read(piece: str, selector: Selector) -> Iterator[Segment]:
    if piece.startswith('"'):
        for name in filter(None, piece.strip('"').split(".")):
            yield Segment("literal", name, (name,))
    elif piece.startswith("["):
        low, high = piece[1:-1].split(":")
        if len(piece) > 24:
            raise _unreadable(selector, "use smaller numbers in the range")
        yield Segment("range", piece, (), int(low or 0), int(high) if high else math.inf)
    elif set(piece) == {"*"}:
        if len(piece) > 2:
            raise _unreadable(selector, "use `*` for one segment and `**` for any number")
        yield Segment("**" if piece == "**" else "*", piece)
    else:
        yield _read_glob(piece, selector)


def _read_glob(piece: str, selector: Selector) -> Segment:
    if "**" in piece:
        raise _unreadable(selector, "write `**` as a segment of its own, between dots")
    parts = re.split(r"(\{[^{}]*\})", piece)
    choices = [_choice(part, selector) if part.startswith("{") else [part] for part in parts]
    if math.prod(len(choice) for choice in choices) > _MOST_ALTERNATIVES:
        raise _unreadable(selector, f"use at most {_MOST_ALTERNATIVES} combinations of choices")
    globs = tuple("".join(combination) for combination in itertools.product(*choices))
    if "*" in piece:
        return Segment("wildcard", piece, globs)
    return Segment("choice" if "{" in piece else "literal", piece, globs)


def _choice(piece: str, selector: Selector) -> list[str]:
    names = [name.strip() for name in piece[1:-1].split(",")]
    if not all(re.fullmatch(r"[\w*-]+", name) and "**" not in name for name in names):
        raise _unreadable(selector, "write a choice as names between commas: `{q,k,v}_proj`")
    return names


def _unreadable(selector: Selector, help: str) -> PlanError:
    return PlanError(
        "P109",
        f"cannot read the selector {quoted(selector.text, 80)}",
        spans=[selector.span],
        help=help,
    )


@lru_cache(maxsize=65536)
def _glob_matches(glob: str, name: str) -> bool:
    """Match with `*` for any run of characters, in linear time: each part at its first place."""
    first, *rest = glob.split("*")
    if not rest:
        return glob == name
    last = rest.pop()
    if not name.startswith(first) or not name.endswith(last):
        return False
    at, end = len(first), len(name) - len(last)
    for part in rest:
        found = name.find(part, at, max(at, end))
        if found < 0:
            return False
        at = found + len(part)
    return at <= end
