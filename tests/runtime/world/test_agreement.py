"""An error on one rank is raised on every rank, in the same words, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.errors import MismatchError
from meshwright.runtime.transports.virtual import run_virtual
from meshwright.runtime.world.agreement import agreed
from tests.runtime.forked import Forked
from tests.runtime.test_run import compiled
from tests.runtime.world.agreeing import Case, drive, fails, rest


def test_the_virtual_mesh_raises_what_any_rank_met_and_goes_on(
    golden: Callable[[str, str], None],
) -> None:
    golden("agreement", drive(compiled().launch()))


def test_processes_all_raise_the_same_words_and_go_on(
    golden: Callable[[str, str], None], forked: Forked
) -> None:
    outputs = forked.outputs("tests.runtime.world.agreeing", 4)
    golden("agreement", outputs[0].rstrip("\n"))
    assert outputs == outputs[:1] * 4


def programs(size: int, case: Case) -> list[Any]:
    mesh = Mesh((("dp", size),))
    cpu = torch.device("cpu")
    states = [SimpleNamespace(mesh=mesh, rank=rank, device=cpu) for rank in range(size)]
    return [agreed(state, case.get(state.rank, bool)) for state in states]  # type: ignore[arg-type]


def test_the_error_of_a_large_mesh_is_short() -> None:
    with pytest.raises(mw.RunError) as caught:
        run_virtual(programs(64, rest(64)), Mesh((("dp", 64),)))
    assert len(str(caught.value).splitlines()) < 12
    assert "  and on 55 more ranks" in str(caught.value)
    assert caught.value.peers == tuple(range(64))


def test_an_error_that_names_its_ranks_has_no_note_of_the_rank_that_raised_it_first() -> None:
    for case in ({1: fails("full")}, dict.fromkeys(range(2), fails("full"))):
        with pytest.raises(mw.RunError) as caught:
            run_virtual(programs(2, case), Mesh((("dp", 2),)))
        assert not hasattr(caught.value, "__notes__")


def test_memory_that_torch_cannot_have_is_an_error_of_the_run() -> None:
    with pytest.raises(mw.RunError, match="on rank 1: ran out of memory"):
        run_virtual(programs(2, {1: lambda: torch.empty(1 << 60)}), Mesh((("dp", 2),)))


def test_an_error_that_is_not_of_a_run_goes_through_as_it_is() -> None:
    def bug() -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_virtual(programs(2, {0: bug}), Mesh((("dp", 2),)))


def test_ranks_that_called_different_methods_are_told_by_name() -> None:
    mesh, cpu = Mesh((("dp", 3),)), torch.device("cpu")
    states: list[Any] = [SimpleNamespace(mesh=mesh, rank=rank, device=cpu) for rank in range(3)]
    called = zip(states, ["save", "load", "save"], strict=True)
    with pytest.raises(MismatchError) as caught:
        run_virtual([agreed(state, bool, method) for state, method in called], mesh)
    assert str(caught.value).startswith(
        "ranks called different methods\n  `save` on ranks 0 and 2\n  `load` on rank 1\n"
    )


def test_agreeing_costs_one_all_reduce_where_all_is_well() -> None:
    (program,) = programs(1, {})
    wire, operand = program.send(None)
    assert (wire.kind, operand.numel()) == ("all_reduce", 3)
    with pytest.raises(StopIteration) as end:
        program.send(operand)
    assert end.value.value is False
