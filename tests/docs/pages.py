"""Pages of documentation as data: their fenced blocks, headings, links and code spans.

The language of a block says what becomes of it; a block without one is an error.

python   runs, in the order of the page, in one namespace; a first line `# examples/train.py` says
         that the block is that file
plan     is a plan; without a `mesh` it is a part of one
output   was printed, word for word, by the python or sh block before it; after a plan, it is what
         the page's `model` and `example` are told when they are compiled under that
csv      is the table of a schedule for two ranks and two microbatches
sh       is run by a shell in the repository's folder
pyi      is a signature, which `docs/make_api.py` wrote
text     is not run: a picture, or what another program prints
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("python", "plan", "output", "csv", "sh", "pyi", "text")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `line` is that of its fence, counted from 1."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    """A page's path from the repository's folder."""
    return page.relative_to(ROOT).as_posix()


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    return tuple(MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8")))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks, in order."""
    return [
        Block(page, token.map[0] + 1, token.info.strip(), token.content)
        for token in tokens(page)
        if token.type == "fence" and token.map is not None
    ]


def links(page: Path) -> list[tuple[str, str]]:
    """The text and target of each link."""
    found = []
    for token in tokens(page):
        children = token.children or []
        for i, child in enumerate(children):
            if child.type == "link_open":
                text = children[i + 1].content if i + 1 < len(children) else ""
                found.append((text, str(child.attrs["href"])))
    return found


def code_spans(page: Path) -> list[str]:
    """What stands between backticks in running text and tables."""
    return [
        child.content
        for token in tokens(page)
        for child in token.children or []
        if child.type == "code_inline"
    ]


def rows_of(page: Path, heading: str) -> list[list[list[str]]]:
    """The rows of the tables under a heading: the code spans of each cell."""
    found: list[list[list[str]]] = []
    under = False
    for before, token in pairwise(tokens(page)):
        if before.type == "heading_open":
            under = token.content == heading
        elif under and token.type == "tr_open" and before.type != "thead_open":
            found.append([])
        elif under and before.type == "td_open":
            spans = [each.content for each in token.children or [] if each.type == "code_inline"]
            found[-1].append(spans)
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for token, inline in pairwise(tokens(page)):
        if token.type == "heading_open":
            slug = slug_of("".join(child.content for child in inline.children or []))
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


def slug_of(heading: str) -> str:
    """The anchor of a heading: lower case, dashes for spaces, and no punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
