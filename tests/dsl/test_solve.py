from __future__ import annotations

import pytest

from meshwright.dsl import Columns, Plan, PlanError
from meshwright.dsl.solve import Dim


def shown(dims: tuple[Dim, ...]) -> str:
    """`3·12@tp·64, 768`, the way layouts print."""
    return ", ".join(" | ".join("·".join(map(factor, part)) for part in dim) for dim in dims)


def factor(pair: tuple[int, tuple[str, ...]]) -> str:
    size, axes = pair
    return f"{size}@{'+'.join(axes)}" if axes else str(size)


LAYOUTS = [
    ("[f@tp, d]", "", (192, 48), "192@tp, 48"),
    ("[b@(dp, tp), ...]", "", (8, 4, 3), "8@dp+tp, 4, 3"),
    ("[..., d@tp]", "", (8, 4, 6), "8, 4, 6@tp"),
    ("[..., d@tp]", "", (6,), "6@tp"),
    ("[64@model]", "", (64,), "64@dp+tp"),
    ("[(3 heads@tp hd), d]", "heads = 12", (2304, 768), "3·12@tp·64, 768"),
    ("[(3 heads@tp hd), d]", "hd = 64", (2304, 768), "3·12@tp·64, 768"),
    ("[(3 heads@tp hd), d]", "", (2304, 768), "3·768@tp, 768"),
    ("[(heads@tp hd a)]", "heads = 4", (48,), "4@tp·12"),
    ("[(a b heads@tp hd)]", "heads = 4, hd = 2", (48,), "6·4@tp·2"),
    ("[(heads hd), (heads@tp 5)]", "", (48, 20), "4·12, 4@tp·5"),
    ("[(n n@tp)]", "", (16,), "4·4@tp"),
    ("[(f@tp | f@tp), d]", "", (24, 6), "12@tp | 12@tp, 6"),
    ("[(q@tp hd | kv@tp hd | kv@tp hd)]", "q = 4, hd = 8", (64,), "4@tp·8 | 2@tp·8 | 2@tp·8"),
    ("[(a@tp b | 4)]", "", (28,), "24@tp | 4"),
    ("[(2 a@tp b | a@tp b)]", "", (36,), "2·12@tp | 12@tp"),
    ("[d, d@tp]", "", (6, 6), "6, 6@tp"),
    ("[1@tp1, d]", "", (1, 6), "1@tp1, 6"),
    ("[(8@dp 2@tp), ...]", "", (16,), "8@dp·2@tp"),
]


@pytest.mark.parametrize(("layout", "let", "shape", "expected"), LAYOUTS)
def test_sizes_come_from_literals_from_let_and_from_the_shape(
    layout: str, let: str, shape: tuple[int, ...], expected: str
) -> None:
    text = "mesh dp=2, tp=2, tp1=1\naxes model = (dp, tp)\n" + (f"let {let}\n" if let else "")
    plan = Plan.parse(text)
    assert shown(plan.dims(plan.layout(layout), shape)) == expected


COLUMNS = [
    ("", "", 192, "192@tp"),
    ("as (3 heads hd)", "", 144, "3·48@tp"),
    ("as (3 heads hd)", "heads = 4", 144, "3·4@tp·12"),
    ("as (heads hd | kv hd | kv hd)", "heads = 8, kv = 2", 96, "8@tp·8 | 2@tp·8 | 2@tp·8"),
    ("as (f | f)", "", 24, "12@tp | 12@tp"),
    ("as (heads 3 hd)", "hd = 4", 48, "4@tp·3·4"),
]


@pytest.mark.parametrize(("factors", "let", "size", "expected"), COLUMNS)
def test_columns_split_the_first_named_factor_of_every_segment(
    factors: str, let: str, size: int, expected: str
) -> None:
    lets = f"let {let}\n" if let else ""
    plan = Plan.parse(f"mesh tp=2\n{lets}columns qkv over tp {factors}")
    (columns,) = plan.of(Columns)
    assert shown((plan.columns_dim(columns, (size,)),)) == expected


def test_an_unknown_factor_before_a_split_one_must_be_bound() -> None:
    plan = Plan.parse("mesh tp=2")
    with pytest.raises(PlanError, match="not determined"):
        plan.dims(plan.layout("[(a b@tp)]"), (28,))


def test_names_have_sizes_for_each_tensor_anew() -> None:
    plan = Plan.parse("mesh tp=2")
    layout = plan.layout("[(heads@tp 4), heads]")
    assert shown(plan.dims(layout, (8, 2))) == "2@tp·4, 2"
    assert shown(plan.dims(layout, (16, 4))) == "4@tp·4, 4"
