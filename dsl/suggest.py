"""Suggestions for a selector that matches nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from meshwright.dsl.characters import described
from meshwright.dsl.errors import PlanError, either, nearest, printable, quoted
from meshwright.dsl.selectors import Selector, quote_segment
from meshwright.dsl.statements import CONNECTIVES, STATEMENTS

_MOST_SHOWN = 3
_LONGEST = 400
_PARAMETERS = ("weight", "bias")


def nothing_matches(selector: Selector, names: Collection[str], inputs: bool = False) -> PlanError:
    """The error for a selector without a match; its help suggests selectors that have one.

    `names` are the names that it could match: those of a model's inputs, if `inputs`.
    """
    found = _suggestions(selector, names, inputs) if len(selector.text) <= _LONGEST else []
    if found:
        help = f"write {either(found)}"
    else:
        outer = {name.rpartition(".")[0] for name in names}
        leaves = [printable(name) for name in names if name and name not in outer]
        shown = selectors_of(leaves)[:_MOST_SHOWN]
        what = "the inputs" if inputs else "the model"
        help = f"use names of {what}" + (f", such as {either(shown)}" if shown else "")
    strange = next((char for char in selector.text if not char.isascii()), None)
    return PlanError(
        "P401",
        f"{quoted(selector.text)} matches nothing",
        spans=[selector.span],
        subject=f"`{strange}` is {described(strange)}" if strange is not None else "",
        help=help,
    )


def selectors_of(names: Iterable[str]) -> list[str]:
    """Texts of selectors for names: those that differ only in numbers share one with `*`."""
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for name in dict.fromkeys(names):
        parts = name.split(".")
        key = tuple("*" if part.isdigit() else part for part in parts)
        alike.setdefault(key, []).append(parts)
    return [_written([*zip(*matched, strict=True)]) for matched in alike.values()]


def _written(columns: list[tuple[str, ...]]) -> str:
    """A selector for names whose segments, one column each, are equal or different numbers."""
    parts = [each[0] if len(set(each)) == 1 else "*" for each in columns]
    if parts == [""]:
        return '""'
    written = [part if part == "*" else quote_segment(part) for part in parts]
    # A leading number, or a keyword on its own, would be read as that.
    reserved = len(parts) == 1 and (parts[0] in STATEMENTS or parts[0] in CONNECTIVES)
    if parts[0][0].isdigit() or reserved:
        written[0] = f'"{parts[0]}"'
    return ".".join(written)


def _suggestions(selector: Selector, names: Collection[str], inputs: bool) -> list[str]:
    """The first kind of mistake that explains the selector, as selectors that match."""
    if inputs and selector.text == "*":
        return ["**"]
    for attempt in (_inside, _rewritten, _extended, _shortened, _misspelt, _alike):
        found = list(dict.fromkeys(attempt(selector, names)))
        if inputs and attempt is _inside and found:
            return found[-1:] if found[-1].endswith("**") else [f"{selector.text}.*"]
        if found:
            return found[:_MOST_SHOWN]
    return []


def _inside(selector: Selector, names: Collection[str]) -> Iterator[str]:
    """Selectors for what is inside the module or structure that a selector names."""
    inner = Selector(f"{selector.text}.**").match(names) if selector.segments else []
    if not inner:
        return
    held = Selector(f"{selector.text}.*").match(names)
    last = dict.fromkeys(quote_segment(name.rpartition(".")[2]) for name in held)
    deeper = len(inner) > len(held)
    for segment in list(last)[: 2 if deeper else None]:
        yield f"{selector.text}.{segment}"
    if deeper:
        yield f"{selector.text}.**"


def _rewritten(selector: Selector, names: Collection[str]) -> Iterator[str]:
    """The selector without quotes around a pattern, braces around a range, or wrong capitals."""
    text = re.sub(
        r"\{(\d+)-(\d+)\}", lambda at: f"[{at[1]}:{int(at[2]) + 1}]", selector.text[:_LONGEST]
    )
    lower = {name.lower(): name for name in names}
    for candidate in (text, text.replace('"', ""), lower.get(text.lower(), "")):
        if candidate != selector.text and _matches(candidate, names):
            yield candidate


def _shortened(selector: Selector, names: Collection[str]) -> Iterator[str]:
    """The selector without a parameter's name at its end, or without its first segments."""
    parts = [segment.text for segment in selector.segments]
    ends = [len(parts) - 1] if parts[-1:] and parts[-1] in _PARAMETERS else []
    for start in range(len(parts)):
        for end in (len(parts), *ends):
            text = ".".join(parts[start:end])
            if not text.strip("*."):
                continue
            if (start, end) != (0, len(parts)) and _matches(text, names):
                yield text
                return


def _extended(selector: Selector, names: Collection[str]) -> Iterator[str]:
    """Selectors for names that have all its segments in order, with others before or between."""
    parts = [segment.text for segment in selector.segments if segment.kind != "**"]
    ends = parts[:-1] if parts[-1:] and parts[-1] in _PARAMETERS else parts
    for each in (parts, ends):
        if each and any(part.strip("*") for part in each):
            yield from selectors_of(Selector("**." + ".**.".join(each)).match(names))


def _misspelt(selector: Selector, names: Collection[str]) -> Iterator[str]:
    """Selectors that match, and differ from this one in one segment."""
    segments = [segment.text for segment in selector.segments]
    known = sorted({part for name in names for part in name.split(".")})
    for i in reversed(range(len(segments))):
        words = ["*"] if segments[i].isdigit() or segments[i].startswith("[") else []
        for word in (*nearest(segments[i], known, 2), *words):
            text = ".".join([*segments[:i], word, *segments[i + 1 :]])
            if word != segments[i] and _matches(text, names):
                yield text


def _alike(selector: Selector, names: Collection[str]) -> Iterator[str]:
    """Patterns of names that look like the selector as a whole."""
    yield from nearest(selector.text, selectors_of(names), _MOST_SHOWN)


def _matches(text: str, names: Collection[str]) -> bool:
    """Whether a text is a selector that matches any of these names."""
    try:
        return bool(text) and any(name and Selector(text).matches(name) for name in names)
    except PlanError:
        return False
