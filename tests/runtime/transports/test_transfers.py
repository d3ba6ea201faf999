"""Transfers between two ranks: what arrives, and what happens where it does not."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.compiler.costs.volume import bytes_sent
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Start, Wait, Wire
from meshwright.runtime.errors import DeadlockError, MismatchError, spell_wire
from meshwright.runtime.transports.virtual import run_virtual
from tests.runtime.processes import finish, start

TRANSFERS = Path(__file__).with_name("transfers.py")
PIPELINE = Mesh((("dp", 2), ("pp", 3)))
SECONDS = 120.0


def transfer(source: int, target: int, channel: str = "forward") -> Wire:
    return Wire("transfer", ("pp",), index=0, ends=(source, target), channel=channel)


def started(*given: tuple[Wire, Tensor]) -> Generator[Any, Any, list[Tensor]]:
    """Start all, then wait for the last one first."""
    handles: list[Any] = []
    for wire, tensor in given:
        handle = yield Start(wire, tensor)
        handles.insert(0, handle)
    results = []
    for handle in handles:
        result: Tensor = yield Wait(handle)
        results.append(result)
    return results


def test_the_target_receives_into_its_buffer_and_the_source_keeps_its_operand() -> None:
    sent = [torch.full((2, 3), float(rank)).T for rank in range(6)]
    buffers = [torch.zeros(3, 2) for _ in range(6)]
    programs = []
    for rank in range(6):
        place = rank % 3
        own = [(transfer(place - 1, place), buffers[rank])] if place else []
        own += [(transfer(place, place + 1), sent[rank])] if place < 2 else []
        programs.append(started(*own))
    results = run_virtual(programs, PIPELINE)
    for rank in range(6):
        expected = [sent[rank]] * (rank % 3 < 2) + [buffers[rank]] * (rank % 3 > 0)
        assert all(a is b for a, b in zip(results[rank], expected, strict=True))
        assert buffers[rank].eq(rank - 1 if rank % 3 else 0).all()


def test_each_channel_of_each_directed_edge_has_an_order_of_its_own() -> None:
    mesh = Mesh((("pp", 2),))
    wires = [transfer(0, 1), transfer(0, 1, "backward"), transfer(1, 0)]
    here = [torch.tensor([float(i)]) for i in range(3)]
    there = [torch.zeros(1) for _ in range(3)]
    sources = started((wires[0], here[0]), (wires[1], here[1]), (wires[2], there[2]))
    targets = started((wires[2], here[2]), (wires[1], there[1]), (wires[0], there[0]))
    run_virtual([sources, targets], mesh)
    assert there == here
    assert len({wire.label for wire in wires}) == len({wire.lane for wire in wires}) == 3


def test_only_the_operand_of_the_source_counts_as_sent() -> None:
    assert bytes_sent(transfer(0, 2), 10, 8, PIPELINE) == 80
    assert spell_wire(transfer(0, 2), ["h"]) == "`h` (transfer over `pp`, 0 to 2, forward)"


@pytest.mark.parametrize("other", [torch.ones(2), torch.ones(3, dtype=torch.float64)])
def test_ends_with_different_shapes_or_types_are_an_error_that_names_both(other: Tensor) -> None:
    wire = transfer(0, 1)
    idle = [started() for _ in range(4)]
    with pytest.raises(MismatchError) as caught:
        run_virtual([started((wire, torch.ones(3))), started((wire, other)), *idle], PIPELINE)
    spelled = f"{str(other.dtype).removeprefix('torch.')}{list(other.shape)}"
    assert str(caught.value) == (
        "ranks 0 and 1 disagree on their collective over `pp`\n"
        "  rank 0: collective 0 (transfer over `pp`, 0 to 1, forward) of float32[3]\n"
        f"  rank 1: collective 0 (transfer over `pp`, 0 to 1, forward) of {spelled}\n"
        "  help: run the same program on every rank of a group"
    )


def test_a_value_that_nobody_sends_is_a_deadlock_that_names_both_ends() -> None:
    programs = [started() for _ in range(6)]
    programs[4] = started((transfer(0, 1), torch.ones(3)))
    with pytest.raises(DeadlockError) as caught:
        run_virtual(programs, PIPELINE, ["h"])
    assert "rank 4 waits for rank 3 in `h` (transfer over `pp`, 0 to 1, forward)" in str(
        caught.value
    )


@pytest.mark.parametrize("shared_memory", ["1", "0"])
def test_processes_transfer_every_shape_and_type_and_64_mib(
    shared_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHWRIGHT_SHARED_MEMORY", shared_memory)
    processes = start(TRANSFERS, 2, "every", "large")
    assert finish(processes, SECONDS) == ["every\nlarge\n"] * 2
    assert [process.returncode for process in processes] == [0, 0]


def test_processes_that_wait_in_a_circle_say_so() -> None:
    """Rank 0 is in no channel between ranks 1 and 2, and knows who waits there."""
    outputs = finish(start(TRANSFERS, 3, "circle"), SECONDS)
    for output in outputs:
        assert "DeadlockError: no rank can go on: each waits for another" in output
        assert "rank 1 waits in transfer over `pp`, 2 to 1, forward" in output


def test_a_rank_that_is_killed_between_send_and_receive_ends_the_others() -> None:
    source, _, target = finish(start(TRANSFERS, 3, "killed"), SECONDS)
    for output in (source, target):
        assert "PeerError: rank 1 died" in output, output
        assert "waits in transfer over `pp`" in output


def test_processes_with_different_sizes_at_two_ends_say_so() -> None:
    outputs = finish(start(TRANSFERS, 2, "other"), SECONDS)
    assert any(
        "MismatchError: members of a group asked for different operations" in output
        and "rank 0: transfer of 12 bytes" in output
        and "rank 1: transfer of 8 bytes" in output
        for output in outputs
    ), outputs
