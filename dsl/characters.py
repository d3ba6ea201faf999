"""Characters of plan text: which are accepted, which are refused, and how errors name them.

A byte order mark, the line ends of other systems and spaces of any width are accepted. A character
that is invisible or looks like another one is refused, and the error names it.
"""

from __future__ import annotations

import unicodedata

_LOOK_ALIKES = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2018\u2019\u201a\u2032\u2033`", '"'),
    **dict.fromkeys("\u2192\u21d2", "->"),
    **dict.fromkeys("\u2190\u21d0", "<-"),
    "\u2264": "<=", "\u2265": ">=", "\u2260": "!=", "\u00d7": "*", "\u00b7": "*", "\u2217": "*",
    "\u22c5": "*", "\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u2223": "|", "\u2236": ":",
    "\u2022": "-",
}  # fmt: skip
"""What word processors and formulas use in place of characters of the language."""

_CONTROLS = {
    0x00: "null", 0x07: "bell", 0x08: "backspace", 0x1B: "escape", 0x1C: "file separator",
    0x1D: "group separator", 0x1E: "record separator", 0x1F: "unit separator", 0x7F: "delete",
    0x85: "next line",
}  # fmt: skip
_BYTE_ORDER_MARK = "\ufeff"


def normalised(text: str) -> str:
    """`text` without a byte order mark, with line feeds as its only line ends."""
    text = text.removeprefix(_BYTE_ORDER_MARK)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def plain(text: str) -> str:
    """`text` in the characters of the language: look-alikes replaced, invisible ones left out."""
    return text if text.isascii() and text.isprintable() else "".join(map(stand_in, text))


def stand_in(char: str) -> str:
    """The language's spelling of a character; empty for one that is invisible."""
    if char in _LOOK_ALIKES:
        return _LOOK_ALIKES[char]
    if not is_strange(char):
        return char
    alike = unicodedata.normalize("NFKC", char)
    return alike if alike.isascii() and alike.isprintable() else ""


def is_strange(char: str) -> bool:
    """Whether a character has no place in a plan: not in the language, a name or white space."""
    if char.isascii():
        return char == "`" or not (char.isprintable() or char in "\t\n\v\f")
    if char.isalnum():
        return unicodedata.normalize("NFKC", char).isascii()
    return unicodedata.category(char) != "Zs"


def described(char: str) -> str:
    """The code point and name of a character: `U+00A0 no-break space`."""
    name = unicodedata.name(char, "").lower() or _CONTROLS.get(ord(char), "")
    return f"U+{ord(char):04X} {name or 'unnamed character'}"


def width(text: str) -> int:
    """The number of terminal cells that `text` takes."""
    if text.isascii():
        return len(text)
    return sum(map(_cells, text))


def _cells(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
