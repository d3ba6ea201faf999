"""Schedules as text, in the notation of torch.distributed.pipelining."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import meshwright
from meshwright.compiler.schedules.files import read_table, table_text
from meshwright.compiler.schedules.named import NAMED, planned_table
from meshwright.compiler.schedules.tables import Size
from meshwright.dsl.errors import PlanError
from meshwright.dsl.source import Source
from meshwright.dsl.statements import SCHEDULES, Stages

OWN = "0F0,0F1,,0B0,, 0B1\n,1F0,1I0,1F1,1W0,1B1\n"


def statement(options: str) -> Stages:
    plan = meshwright.Plan.parse(f"mesh pp=2\nstages 2 over pp {options}", "gpt.plan")
    (found,) = plan.of(Stages)
    return found


@pytest.mark.parametrize("name", NAMED)
def test_every_schedule_is_read_as_it_was_written(name: str) -> None:
    size = Size(4, 8, SCHEDULES[name][0])
    table = NAMED[name].fill(size)
    again = read_table(Source("own.csv", table_text(table)), size)
    assert (again.rows, again.overlapped) == (table.rows, table.overlapped)
    assert [set(held) for held in again.holders] == [set(held) for held in table.holders]


def test_a_file_is_named_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.csv").write_text(OWN)
    table = planned_table(statement('schedule="own.csv"'), Size(2, 2))
    assert table_text(table) == "0F0,0F1,0B0,0B1\n1F0,1I0,1F1,1W0,1B1\n"


@pytest.mark.parametrize("file", ["other.csv", "text.csv"])
def test_a_file_that_cannot_be_read_is_named_with_its_place_in_the_plan(
    file: str, golden: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.csv").write_bytes(b"0F0\xff")
    with pytest.raises(PlanError, match="P113") as caught:
        planned_table(statement(f'schedule="{file}"'), Size(2, 2))
    golden(f"unreadable-{file}", str(caught.value))


WRONG = {
    "cell": OWN.replace("1I0", "1X0"),
    "cell-of-a-move": OWN.replace("1I0", "1RECV_F0"),
    "stage": OWN.replace("1I0", "2I0"),
    "microbatch": OWN.replace("1I0", "1I2"),
    "lines": OWN + OWN,
    "missing": OWN.replace("1W0", ""),
    "twice": OWN.replace("1W0", "1W0,1W0"),
    "order": OWN.replace("1I0,1F1,1W0", "1W0,1F1,1I0"),
    "apart": OWN.replace("1W0", "").replace(", 0B1", ", 0B1,1W0"),
    "waits": "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n",
    "copies": "0F0,1F0,1B0,0B0,1F1,1B1\n0F1,0B1\n",
    "before": "0F0,1F0,0B0,1B0\n0F1,1F1,1B1,0B1\n",
    "empty": "",
    "fewer-stages": "0F0,0B0\n0F1,0B1\n",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_a_file_has_its_golden_text(
    name: str, golden: Callable[[str, str], None]
) -> None:
    named = statement('schedule="own.csv"').at("schedule")
    with pytest.raises(PlanError) as caught:
        read_table(Source("own.csv", WRONG[name]), Size(2, 2), named)
    golden(f"file-{name}", str(caught.value))


def test_no_stage_is_on_three_ranks(golden: Callable[[str, str], None]) -> None:
    stages = [f"{stage}{kind}" for kind, order in (("F", "012"), ("B", "210")) for stage in order]
    lines = [",".join(f"{action}{i}" for action in stages) for i in range(3)]
    with pytest.raises(PlanError) as caught:
        read_table(Source("own.csv", "\n".join(lines)), Size(3, 3))
    golden("file-three-copies", str(caught.value))


MISFITS = {
    "interleaved-rounds": ("interleaved", Size(4, 11, 2)),
    "interleaved-rounds-of-many": ("interleaved", Size(4, 13, 3)),
    "dualpipe-odd-ranks": ("dualpipe", Size(3, 8)),
    "dualpipe-few": ("dualpipe", Size(4, 6)),
    "dualpipe-one": ("dualpipe", Size(2, 1)),
    "dualpipe-odd": ("dualpipe", Size(2, 5)),
    "dualpipev-few": ("dualpipev", Size(4, 7, 2)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_schedule_that_does_not_fit_has_its_golden_text(
    name: str, golden: Callable[[str, str], None]
) -> None:
    schedule, size = MISFITS[name]
    virtual = size.virtual
    plan = f"mesh pp={size.coordinates}\nstages {size.coordinates * virtual} over pp"
    plan += f" schedule={schedule} microbatches={size.microbatches} virtual={virtual}"
    (found,) = meshwright.Plan.parse(plan, "gpt.plan").of(Stages)
    with pytest.raises(PlanError) as caught:
        planned_table(found, size)
    golden(f"misfit-{name}", str(caught.value))


def test_what_the_help_of_a_misfit_says_fits() -> None:
    sizes = ("interleaved", 4, 2), ("zb", 6, 3), ("dualpipe", 4, 1), ("dualpipev", 3, 2)
    for m in range(1, 40):
        for name, p, v in sizes:
            if misfit := NAMED[name].misfit(Size(p, m, v)):
                for word in misfit[2].split():
                    if "microbatches=" in word:
                        count = int(word.strip("`").partition("=")[2])
                        assert NAMED[name].misfit(Size(p, count, v)) is None
            else:
                NAMED[name].fill(Size(p, m, v))
