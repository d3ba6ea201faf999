from __future__ import annotations

import pytest

from meshwright.dsl import Columns, Plan, PlanError, Rows, Shard

PATHS = ["blocks.0.mlp", "blocks.1.mlp"]
NAMES = [f"{path}{part}" for path in PATHS for part in ("", ".up", ".down")]
FRAGMENT = "let f = 4\ncolumns up over tp as (f d)\nrows down over tp"


def test_selectors_of_a_fragment_are_relative_to_its_module() -> None:
    plan = Plan.parse("mesh tp=2, dp=2").merged(PATHS, FRAGMENT)
    assert list(plan.resolve(Rows, NAMES)) == ["blocks.0.mlp.down", "blocks.1.mlp.down"]
    columns = plan.resolve(Columns, NAMES)["blocks.1.mlp.up"]
    assert plan.columns_dim(columns, (12,)) == (((4, ("tp",)), (3, ())),)


def test_the_plan_file_wins_where_it_names_the_same_target() -> None:
    plan = Plan.parse("mesh tp=2, dp=2\ncolumns **.up over dp").merged(PATHS, FRAGMENT)
    assert plan.resolve(Columns, NAMES)["blocks.0.mlp.up"].over == ("dp",)
    assert plan.resolve(Rows, NAMES)["blocks.0.mlp.down"].over == ("tp",)


def test_a_let_of_the_plan_wins_over_that_of_a_fragment() -> None:
    plan = Plan.parse("mesh tp=2\nlet f = 6").merged(PATHS, FRAGMENT)
    columns = plan.resolve(Columns, NAMES)["blocks.0.mlp.up"]
    assert plan.columns_dim(columns, (12,)) == (((6, ("tp",)), (2, ())),)


def test_what_a_fragment_derives_from_a_name_follows_the_let_of_the_plan() -> None:
    fragment = "let f = 4, d = 2*f\ncolumns up over tp as (f d)"
    plan = Plan.parse("mesh tp=2\nlet f = 6").merged(PATHS, fragment)
    columns = plan.resolve(Columns, NAMES)["blocks.0.mlp.up"]
    assert plan.columns_dim(columns, (72,)) == (((6, ("tp",)), (12, ())),)


def test_an_outer_module_wins_over_an_inner_one() -> None:
    plan = Plan.parse("mesh tp=2, dp=2").merged(["blocks.0.mlp"], "rows down over tp")
    plan = plan.merged(["blocks.0"], "rows mlp.down over dp")
    assert plan.resolve(Rows, NAMES)["blocks.0.mlp.down"].over == ("dp",)


def test_the_module_itself_and_a_dashed_path_can_be_named() -> None:
    plan = Plan.parse("mesh tp=2").merged(["layer-1", ""], 'shard "" -> [b@tp, ...]')
    assert list(plan.resolve(Shard, ["", "layer-1", "layer-2"])) == ["", "layer-1"]


def test_a_statement_about_the_whole_run_has_no_place_in_a_fragment() -> None:
    with pytest.raises(PlanError, match="P114"):
        Plan.parse("mesh tp=2").merged(["a"], "precision bf16", "MLP.__plan__")


def test_a_merged_plan_prints_and_reads_back() -> None:
    plan = Plan.parse("mesh tp=2").merged(PATHS, "rows down over tp")
    assert Plan.parse(plan.format()) == plan
