"""The output of a benchmark: a table, and JSON with the machine, the date and versions."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.interleave import QUIET, Ratio, Round, counted, cpu_ratio, ratio


def machine() -> dict[str, Any]:
    """The machine, the date and the versions of this run."""
    return {
        "date": dt.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "meshwright": _version("meshwright"),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from source"


def result(
    rounds: Sequence[Round], differences: dict[str, float], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """One comparison as plain data; a pair is (peer, reference)."""
    used = counted(rounds)
    names = list(used[0].times)
    return {
        "rounds": len(rounds),
        "rounds_used": len(used),
        "quiet": all(taken.others < QUIET for taken in used),
        "cores_used_by_others": [round(taken.others, 2) for taken in rounds],
        "milliseconds": {
            name: {
                "median": round(statistics.median(taken.times[name] for taken in used), 3),
                "min": round(min(taken.times[name] for taken in used), 3),
                "cpu": round(statistics.median(taken.cpu[name] for taken in used), 3),
            }
            for name in names
        },
        "loss_difference": differences,
        "ratios": [
            {
                "peer": peer,
                "reference": reference,
                **asdict(ratio(used, peer, reference)),
                "cpu": asdict(cpu_ratio(used, peer, reference)),
            }
            for peer, reference in pairs
        ],
    }


def table(title: str, found: dict[str, Any]) -> str:
    """The result as text."""
    heads = f"{'ms per step':>12}{'least':>10}{'cpu ms':>10}{'loss off by':>14}"
    lines = [title, f"  {'peer':<28}{heads}"]
    for name, times in found["milliseconds"].items():
        off = found["loss_difference"][name]
        measured = f"{times['median']:>12.1f}{times['min']:>10.1f}{times['cpu']:>10.1f}"
        lines.append(f"  {name:<28}{measured}{off:>14.1e}")
    for entry in found["ratios"]:
        spread = str(Ratio(entry["median"], entry["low"], entry["high"]))
        pair = f"{entry['peer']} / {entry['reference']}"
        lines.append(f"  {pair:<52}{spread:<24}cpu {Ratio(**entry['cpu'])}")
    used, rounds = found["rounds_used"], found["rounds"]
    state = "on a quiet machine" if found["quiet"] else "ON A BUSY MACHINE: do not quote"
    return "\n".join([*lines, f"  {used} of {rounds} rounds, {state}"])


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Write results with the machine's description, if a path is given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
