"""Links between pages lead somewhere, and files that are named are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, code_spans, links, name_of

FOLDERS = ("dsl", "compiler", "passes", "runtime", "src", "tests", "docs", "examples", "benchmarks")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    dead = []
    for text, target in links(page):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            dead.append(f"[{text}]({target})")
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_named_with_its_folder_is_there(page: Path) -> None:
    named = (
        re.fullmatch(r"([\w.-]+/)+[\w-]+\.(py|plan|lark|md)", text) for text in code_spans(page)
    )
    paths = [match.group() for match in named if match]
    known = [path for path in paths if path.partition("/")[0] in FOLDERS]
    assert [path for path in known if not (ROOT / path).is_file()] == []


def test_every_page_is_in_the_index_and_the_readme_leads_to_it() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / target).resolve() for _, target in links(index)}
    pages = [page for page in PAGES if page.parent == index.parent and page != index]
    assert [name_of(page) for page in pages if page.resolve() not in listed] == []
    assert "docs/README.md" in [target for _, target in links(ROOT / "README.md")]
