"""M6 on its clusters, and its recipe: `examples/m6`."""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from examples.m6 import measure, train
from examples.m6.model import SETTINGS
from examples.m6.paper import PUBLISHED

ROOT = Path(__file__).parents[2]
COMPILED = """
import resource, time
from examples.m6 import measure
from examples.m6.model import SETTINGS
before = time.process_time()
found = SETTINGS["10T"].compiled("offload parameters budget=32GB")
print(time.process_time() - before)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(found.memory().peak)
print(sum(n for name, n in measure.sizes_of(found).items() if ".experts." in name))
kept = {measure.layer(name): each.kept for name, each in found.parameters.items()}
print(sum(each.update.away for each in kept.values()), found.memory().host)
"""


@pytest.mark.slow
def test_experts_are_what_was_published_and_a_gpu_has_its_part() -> None:
    """Of one layer: all are alike."""
    setting = replace(SETTINGS["100B"], layers=1)
    found = measure.figures(setting, "real", "")
    assert found.in_experts * 24 == pytest.approx(PUBLISHED["100B"].in_experts, rel=1e-3)
    assert found.held == 4 * found.parameters / setting.gpus
    assert found.fits


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_of_the_pseudo_stage_a_gpu_has_one_layer(name: str) -> None:
    """Each further layer adds what it saves for the backward, and no gradient of its own."""
    setting = SETTINGS[name]
    few, more = (measure.figures(replace(setting, layers=n), "pseudo", "") for n in (3, 5))
    assert few.parameters == pytest.approx(more.parameters, rel=0.01)
    assert few.fits
    one = measure.figures(replace(setting, layers=1), "real", "")
    assert few.parts["parameters"] == pytest.approx(one.parts["parameters"], rel=0.2)


@pytest.mark.slow
def test_the_least_offloading_is_that_of_the_optimizer_for_a_trillion() -> None:
    found = list(measure.least(SETTINGS["1T"], "real", lambda text: None))
    assert [each.fits for each in found] == [False, False, True]
    assert found[-1].offload == "offload optimizer budget=32GB"
    assert found[-1].in_experts == pytest.approx(PUBLISHED["1T"].in_experts, rel=1e-3)
    assert 0 < found[-1].away < 24


@pytest.mark.slow
def test_ten_trillion_compile_on_a_laptop_and_fit_with_offloading_alone() -> None:
    """Without it, the states alone are too much."""
    printed = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, resident, peak, experts, away, host = map(float, printed.stdout.split())
    assert seconds < 60  # 32 to 35 where nothing runs beside it
    assert resident < 8e9
    assert peak <= measure.LIMIT_BYTES
    assert experts == pytest.approx(PUBLISHED["10T"].in_experts, rel=1e-3)
    assert 0 < away <= 50
    assert host > 100e9
    without = measure.figures(SETTINGS["10T"], "real", "offload optimizer")
    assert without.peak > without.parts["parameters"] > measure.LIMIT_BYTES


@pytest.mark.slow
def test_the_recipe_goes_on_where_the_pseudo_stage_ends() -> None:
    said: list[str] = []
    found = train.train((120, 120), said.append)
    assert found.before == found.after
    means = [statistics.mean(part) for part in (found.pseudo[:20], found.pseudo[-20:])]
    means += [statistics.mean(found.real[:20]), statistics.mean(found.real[-20:])]
    assert all(later < earlier for earlier, later in pairwise(means))
    assert any("pseudo" in each for each in said)
