"""Every operator of torch's own table equals eager mode under every plan, or is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from docs.make_operators import PAGE, page, reason, row
from tests.operators import label, operators, walk

TABLE = {label(op): op for op in operators()}
CHUNKS = 16

FAST = (
    "add", "amax", "as_strided", "cdouble", "cumsum", "diff", "exp", "fft.rfft2",
    "count_nonzero", "frexp", "gather",
    "linalg.cholesky", "linalg.det", "linalg.matrix_norm", "linalg.svd", "linalg.slogdet",
    "max (reduction_with_dim)", "nn.functional.batch_norm", "nn.functional.bilinear",
    "nn.functional.conv2d", "nn.functional.cross_entropy", "nn.functional.glu",
    "nn.functional.interpolate (bilinear)", "nn.functional.layer_norm", "nn.functional.max_pool3d",
    "nn.functional.pad (reflect)", "sort", "split (list_args)", "unfold", "view_as_complex",
)  # fmt: skip
"""One or two of each kind, and those that were once wrong or refused without need."""


@pytest.mark.parametrize("name", FAST)
def test_an_operator_in_the_middle_of_a_model_is_equal_to_eager_under_every_plan(name: str) -> None:
    outcomes = walk(TABLE[name])
    assert {each.verdict for each in outcomes} <= {"equal", "eager"}, outcomes
    assert any(each.verdict == "equal" for each in outcomes)


def test_each_reason_to_refuse_an_operator_has_a_text_with_a_way_on(
    golden: Callable[[str, str], None],
) -> None:
    texts: dict[str, str] = {}
    for name in REFUSED:
        for each in walk(TABLE[name], plans=("dp",)):
            if each.verdict == "refused":
                text = re.sub(r"operators\.py:\d+", "operators.py:LINE", each.reason)
                texts.setdefault(reason(each), f"# {name}: {reason(each)}\n{text}")
    golden("operators-refused", "\n\n".join(texts.values()))


REFUSED = ("allclose", "masked_select", "nonzero", "linalg.lstsq", "to_sparse")


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_the_page_of_operators_says_what_the_walk_finds(chunk: int) -> None:
    listed = dict(map(_listed, _table()))
    for name in list(TABLE)[chunk::CHUNKS]:
        assert row(walk(TABLE[name])) == listed.get(name)


def test_the_page_of_operators_lists_each_of_torchs_and_adds_up() -> None:
    lines = _table()
    assert [name for name, _ in map(_listed, lines)] == [label(op) for op in operators()]
    assert page(lines) == PAGE.read_text(encoding="utf-8")


def _table() -> list[str]:
    """The page's lines about operators, which are its last."""
    _, _, lines = PAGE.read_text(encoding="utf-8").rpartition("| --- |\n")
    return lines.splitlines()


def _listed(line: str) -> tuple[str, Any]:
    return line.strip("|").partition("|")[0].strip(), line
