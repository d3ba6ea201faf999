"""Each benchmark runs, and every peer computes the single process's losses (checked in the run)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpt import SIZES
from benchmarks.interleave import Round, counted, cpu_ratio, ratio
from benchmarks.stages import VIRTUAL, balanced

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, folder: Path, *options: str, quick: bool = True) -> dict[str, Any]:
    out = folder / "out.json"
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", module, *["--quick"] * quick, "--json", str(out), *options]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["results"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp=2", "dp=2, tp=2"])
def test_tensor_parallel_peers_all_compute_the_same_losses(mesh: str, tmp_path: Path) -> None:
    found = run("benchmarks.tensor_parallel", tmp_path, "--size", "tiny", "--mesh", mesh)
    result = found[f"tiny, {mesh}"]
    assert len(result["milliseconds"]) == 9
    assert len(result["ratios"]) == 9
    assert max(result["loss_difference"].values()) < 5e-6


@pytest.mark.slow
def test_data_parallel_peers_all_compute_the_same_losses(tmp_path: Path) -> None:
    result = run("benchmarks.data_parallel", tmp_path, "--size", "tiny")["tiny, dp=2"]
    assert list(result["milliseconds"]) == ["ddp", "flat", "meshwright"]
    assert max(result["loss_difference"].values()) < 5e-6


@pytest.mark.slow
def test_comparing_inputs_changes_no_loss(tmp_path: Path) -> None:
    arguments = ("--size", "tiny", "--mesh", "dp=2")
    result = run("benchmarks.input_check", tmp_path, *arguments)["tiny, dp=2"]
    assert len(result["ratios"]) == 2
    assert max(result["loss_difference"].values()) < 5e-6


@pytest.mark.slow
def test_peers_with_sharded_state_all_compute_the_same_losses(tmp_path: Path) -> None:
    arguments = ("--size", "tiny", "--systems", "fsdp2-resharded,ddp-zero,zero-3")
    found = run("benchmarks.zero", tmp_path, *arguments)["tiny, dp=2"]
    assert list(found) == ["whole", "accumulate", "bf16", "memory"]
    for variant in ("whole", "accumulate"):
        assert len(found[variant]["ratios"]) == 2
        assert max(found[variant]["loss_difference"].values()) < 5e-6
    assert found["bf16"]["loss_difference"]["meshwright zero 3"] < 1e-3
    assert min(found["memory"]["megabytes"].values()) > 100


@pytest.mark.slow
def test_pipelines_of_both_systems_compute_the_same_losses(tmp_path: Path) -> None:
    arguments = ("--size", "tiny", "--mesh", "pp=2", "--schedules", "1f1b,zbv")
    found = run("benchmarks.pipeline", tmp_path, *arguments)["tiny, pp=2"]
    assert len(found["time"]["milliseconds"]) == 4
    assert max(found["time"]["loss_difference"].values()) < 5e-6
    assert len(found["time"]["ratios"]) == len(found["memory"]["ratios"]) == 2
    assert min(found["memory"]["megabytes"].values()) > 100


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("schedule", VIRTUAL)
def test_the_head_counts_where_stages_are_balanced(schedule: str, ranks: int) -> None:
    cut = balanced(SIZES["base"], schedule, ranks)
    assert [i for blocks in cut.blocks for i in blocks] == list(range(8))
    assert len(cut.blocks) == len(cut.ranks) == ranks * VIRTUAL[schedule]
    held = [
        sum(len(b) for b, r in zip(cut.blocks, cut.ranks, strict=True) if r == rank)
        for rank in range(ranks)
    ]
    assert held[cut.ranks[-1]] == min(held)


@pytest.mark.slow
def test_peaks_of_memory_are_those_of_processes_of_their_own(tmp_path: Path) -> None:
    found = run("benchmarks.resident", tmp_path, "--size", "tiny")
    assert list(found) == ["tiny, dp=2", "tiny, tp=2"]
    for result in found.values():
        assert min(result["megabytes"].values()) > 100
        assert result["ratio"]["median"] < 1.5


@pytest.mark.slow
def test_what_saves_memory_computes_the_same_losses_and_stays_within_a_budget(
    tmp_path: Path,
) -> None:
    others = "torch selective,torch offload"
    own = "meshwright selective,meshwright offload,meshwright fits selective"
    arguments = ("--size", "tiny", "--mesh", "dp=1", "--systems", f"{others},{own}")
    found = run("benchmarks.memory", tmp_path, *arguments)["tiny, dp=1"]
    assert max(found["loss_difference"].values()) < 5e-6
    peaks = {entry["peer"]: entry["peak"] for entry in found["ratios"]}
    assert len(peaks) == 3
    assert peaks["meshwright fits selective"] <= 1


@pytest.mark.slow
def test_compile_time_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    found = run("benchmarks.compile_time", tmp_path)
    assert found["dp=2, tp=2"]["ranks"] == 4
    assert found["dp=2, tp=2"]["nodes"] > 100


def test_a_ratio_is_the_median_over_rounds_and_busy_rounds_do_not_count() -> None:
    rounds = [
        Round({"a": a, "b": 2.0}, {"a": 2 * a, "b": 2.0}, others)
        for a, others in [(1.0, 0.0), (3.0, 0.0), (2.0, 0.1), (90.0, 1.5)]
    ]
    found = ratio(counted(rounds), "a", "b")
    assert (found.median, found.low, found.high) == (1.0, 0.5, 1.5)
    assert cpu_ratio(counted(rounds), "a", "b").median == 2.0
    assert counted(rounds[2:]) == rounds[2:]


@pytest.mark.slow
def test_mixtral_computes_the_losses_of_its_own_module(tmp_path: Path) -> None:
    systems = ("--systems", "dense,topk,transformers,meshwright")
    found = run("benchmarks.experts", tmp_path, "--size", "tiny", *systems)["tiny, ep=1"]
    assert [each["peer"] for each in found["ratios"]] == ["meshwright topk", "meshwright mixtral"]
    assert 0 < found["loss_difference"]["meshwright mixtral"] < 1e-5
    assert 0 < found["moving"]["meshwright topk"]["median"] < 1
    assert found["peaks"]["topk"] > found["peaks"]["dense"] > 2**20


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_what_a_gpu_is_to_show_runs_on_a_cpu(part: str, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--parts", part)
    found = run("benchmarks.gpu", tmp_path, *options, quick=False)[part]
    assert len(found) > 2
    for name, result in found.items():
        assert "error" not in result, name
        assert result.get("equal", "yes") == "yes", name


def test_a_part_that_fails_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(device: str) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "step", {"loss": 2.0}
        yield "step", {"ms": 1.0}
        raise RuntimeError(device)

    monkeypatch.setitem(gpu.PARTS, "one", (failing, 1))
    out = tmp_path / "found.json"
    with pytest.raises(RuntimeError):
        gpu.part("one", out, "cpu")
    assert json.loads(out.read_text()) == {"step": {"loss": 2.0, "ms": 1.0}}


@pytest.mark.parametrize("apart", [True, False])
def test_what_takes_too_long_is_stopped_and_what_fails_says_so(apart: bool) -> None:
    def ended(script: str) -> str:
        return gpu._run([sys.executable, "-c", script], os.environ, 1, apart=apart)

    assert ended("import time; time.sleep(600)") == "stopped after 1 s"
    assert ended("raise SystemExit('no GPU')") == "exit code 1: no GPU\n"
    assert ended("") == ""
