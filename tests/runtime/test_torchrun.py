"""Under torchrun: one agent or two, restarts, and agents that are told to stop or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.runtime.forked import runs, wait_until
from tests.runtime.mishaps import compiled
from tests.runtime.models import batch
from tests.runtime.processes import ROOT, environment, free_port

SCRIPT = Path(__file__).with_name("agents.py")
ONE = ("--standalone",)


def torchrun(folder: Path, options: Sequence[str], *mishap: str) -> subprocess.Popen[str]:
    """An agent with its ranks."""
    path = os.pathsep.join([str(ROOT), environment()["PYTHONPATH"]])
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, str(SCRIPT), str(folder), *mishap],
        env=environment() | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def two_agents(folder: Path, *mishap: str) -> tuple[list[str], list[int]]:
    """What two agents of two ranks each print, and their exit codes."""
    options = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "mw")
    options += ("--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1")
    agents = [torchrun(folder, options, *mishap) for _ in range(2)]
    try:
        outputs = [agent.communicate(timeout=150)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return outputs, [agent.returncode for agent in agents]


def losses(num_ranks: int) -> list[float]:
    """The losses of the same three steps on the virtual mesh."""
    run = compiled(num_ranks).launch()
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    found = []
    for number in range(3):
        found.append(run.step(*batch(number))[0].item())
        optimizer.step()
        optimizer.zero_grad()
    return found


def trained(folder: Path, num_ranks: int) -> None:
    """Every rank has the losses of the virtual mesh."""
    expected = pytest.approx(losses(num_ranks), rel=0, abs=1e-11)
    for rank in range(num_ranks):
        assert json.loads((folder / f"losses-{rank}").read_text()) == expected


@pytest.mark.slow
def test_two_agents_of_two_ranks_train_as_the_virtual_mesh_does(tmp_path: Path) -> None:
    outputs, codes = two_agents(tmp_path)
    assert codes == [0, 0], outputs
    trained(tmp_path, 4)
    kinds = json.loads((tmp_path / "shared-0").read_text())
    assert kinds and all(kinds) == (sys.platform == "linux")


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 3])
def test_a_rank_of_one_agent_that_dies_is_named_under_the_other(
    tmp_path: Path, culprit: int
) -> None:
    outputs, codes = two_agents(tmp_path, str(culprit), "kill")
    assert 0 not in codes
    (own,) = [text for text in outputs if "exitcode  : -9" in text]
    (other,) = [text for text in outputs if text is not own]
    assert f"PeerError: rank {culprit} d" in other, other


@pytest.mark.slow
def test_ranks_that_are_restarted_meet_again_and_train(tmp_path: Path) -> None:
    agent = torchrun(tmp_path, ("--standalone", "--max-restarts", "1"), "1", "once")
    output = agent.communicate(timeout=150)[0]
    assert agent.returncode == 0, output
    assert "PeerError: rank 1 failed: ZeroDivisionError: the loss scale is 0" in output
    trained(tmp_path, 2)


@pytest.mark.slow
def test_a_group_of_the_script_is_used_and_need_not_last_as_long_as_the_run(
    tmp_path: Path,
) -> None:
    agent = torchrun(tmp_path, ONE, "", "own group")
    output = agent.communicate(timeout=150)[0]
    assert agent.returncode == 0, output
    trained(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["not launched", "wait"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_end_with_the_agent(tmp_path: Path, number: signal.Signals, what: str) -> None:
    agent = torchrun(tmp_path, ONE, "1", what)
    found: list[int] = []
    try:
        wait_until(lambda: len(list(tmp_path.glob("here-*"))) == 2, 120)
        found = [int(path.name.removeprefix("here-")) for path in tmp_path.glob("here-*")]
        time.sleep(0.5)
        agent.send_signal(number)
        begin = time.monotonic()
        wait_until(lambda: not any(runs(process) for process in found), 60)
        seconds = time.monotonic() - begin
    finally:
        agent.kill()
        # Ranks that are still on their way up keep the pipe open.
        output = agent.communicate(timeout=60)[0]
        for process in found:
            if runs(process):
                os.kill(process, signal.SIGKILL)
    assert seconds < 25, output
    if number == signal.SIGKILL:
        assert output.count("which started this rank, has ended") >= 2, output
