"""The virtual mesh: matching, results, and the errors of programs that do not match."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Start, Wait, Wire, combine
from meshwright.runtime.errors import DeadlockError, MismatchError
from meshwright.runtime.transports.virtual import run_virtual

GRID = Mesh((("dp", 2), ("tp", 3)))
PAIR = Mesh((("tp", 2),))
Program = Generator[Any, Any, Any]


def one(wire: Wire, tensor: Tensor) -> Program:
    result: Tensor = yield wire, tensor
    return result


def several(*requests: tuple[Wire, Tensor]) -> Program:
    results = []
    for wire, tensor in requests:
        result: Tensor = yield wire, tensor
        results.append(result)
    return results


def on_every_rank(mesh: Mesh, wire: Wire, tensors: list[Tensor]) -> list[Tensor]:
    return run_virtual([one(wire, tensor) for tensor in tensors], mesh)


def test_all_reduce_sums_over_its_axes_only() -> None:
    given = [torch.tensor([float(10**rank)]) for rank in range(6)]
    results = on_every_rank(GRID, Wire("all_reduce", ("tp",)), given)
    assert [int(result) for result in results] == [111] * 3 + [111000] * 3
    results = on_every_rank(GRID, Wire("all_reduce", ("dp", "tp")), given)
    assert [int(result) for result in results] == [111111] * 6


def test_the_order_of_the_axes_is_the_order_of_the_group() -> None:
    given = [torch.tensor(rank) for rank in range(6)]
    results = on_every_rank(GRID, Wire("all_gather", ("tp", "dp")), given)
    assert all(result.tolist() == [0, 3, 1, 4, 2, 5] for result in results)


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (Wire("all_reduce", ("tp",), reduce="max"), [[[11, 12], [13, 14]]] * 2),
        (Wire("all_reduce", ("tp",), reduce="min"), [[[1, 2], [3, 4]]] * 2),
        (Wire("reduce_scatter", ("tp",)), [[12, 14], [16, 18]]),
        (Wire("all_to_all", ("tp",)), [[[1, 2], [11, 12]], [[3, 4], [13, 14]]]),
        (Wire("permute", ("tp",), shift=1), [[[11, 12], [13, 14]], [[1, 2], [3, 4]]]),
        (Wire("broadcast", ("tp",), root=1), [[[11, 12], [13, 14]]] * 2),
        (Wire("reduce", ("tp",), root=1), [[[0, 0], [0, 0]], [[12, 14], [16, 18]]]),
    ],
    ids=lambda value: value.kind if isinstance(value, Wire) else "",
)
def test_each_kind_gives_what_it_says(wire: Wire, expected: list[Any]) -> None:
    given = [torch.tensor([[1, 2], [3, 4]]), torch.tensor([[11, 12], [13, 14]])]
    results = on_every_rank(PAIR, wire, given)
    assert [result.tolist() for result in results] == expected


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all", "permute", "broadcast"])
def test_no_result_shares_memory_with_another_or_with_an_operand(kind: str) -> None:
    given = [torch.ones(2), torch.ones(2)]
    results = on_every_rank(PAIR, Wire(kind, ("tp",)), given)
    places = {tensor.untyped_storage().data_ptr() for tensor in (*given, *results)}
    assert len(places) == 4


def test_a_started_collective_is_waited_for_in_any_order() -> None:
    def program(rank: int) -> Program:
        first = yield Start(Wire("all_reduce", ("tp",), index=0), torch.tensor(rank))
        second = yield Start(Wire("permute", ("tp",), shift=1, index=1), torch.tensor(rank))
        moved = yield Wait(second)
        total = yield Wait(first)
        return int(moved), int(total)

    assert run_virtual([program(0), program(1)], PAIR) == [(1, 1), (0, 1)]


def test_ranks_may_run_different_programs() -> None:
    row, column = Wire("all_reduce", ("tp",)), Wire("permute", ("dp",), shift=1)
    mesh = Mesh((("dp", 2), ("tp", 2)))

    def first(rank: int) -> Program:
        value = torch.tensor(rank)
        for _ in range(3):
            value = yield row, value
        return (yield column, value)

    def second(rank: int) -> Program:
        return (yield column, torch.tensor(rank))

    results = run_virtual([first(0), first(1), second(2), second(3)], mesh)
    assert [int(result) for result in results] == [2, 3, 4, 4]


def test_half_types_round_once() -> None:
    mesh = Mesh((("tp", 4),))
    given = [torch.tensor(value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    results = on_every_rank(mesh, Wire("all_reduce", ("tp",)), given)
    assert [float(result) for result in results] == [260.0] * 4


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("reduce", ["sum", "max", "min"])
def test_any_number_of_parts_is_combined_and_left_as_it_was(count: int, reduce: str) -> None:
    parts = [torch.randint(-9, 9, (5,)) for _ in range(count)]
    before = torch.stack(parts)
    expected = {"sum": before.sum(0), "max": before.amax(0), "min": before.amin(0)}[reduce]
    assert torch.equal(combine(parts, reduce), expected)
    assert torch.equal(torch.stack(parts), before)
    assert combine(parts, reduce, out=parts[-1]) is parts[-1]
    assert torch.equal(parts[-1], expected)


def test_an_operand_is_freed_once_it_is_given() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def program() -> Program:
        operand = torch.ones(3)
        seen.append(weakref.ref(operand))
        handle = yield Start(Wire("all_reduce", ("tp",)), operand)
        del operand
        result = yield Wait(handle)
        assert all(reference() is None for reference in seen)
        return result

    gc.disable()
    try:
        assert len(run_virtual([program(), program()], PAIR)) == 2
    finally:
        gc.enable()


def test_different_operations_in_one_group_are_an_error() -> None:
    gather, reduce = Wire("all_gather", ("tp",), index=0), Wire("all_reduce", ("tp",), index=0)
    with pytest.raises(MismatchError) as caught:
        run_virtual([one(gather, torch.ones(2)), one(reduce, torch.ones(2))], PAIR, ["h"])
    assert str(caught.value) == (
        "ranks 0 and 1 disagree on their collective over `tp`\n"
        "  rank 0: `h` (all_gather over `tp`) of float32[2]\n"
        "  rank 1: `h` (all_reduce over `tp`) of float32[2]\n"
        "  help: run the same program on every rank of a group"
    )


@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(2, dtype=torch.float64)])
def test_different_shapes_or_types_in_one_group_are_an_error(other: Tensor) -> None:
    wire = Wire("all_reduce", ("tp",), index=0)
    with pytest.raises(MismatchError, match="ranks 0 and 1 disagree"):
        run_virtual([one(wire, torch.ones(2)), one(wire, other)], PAIR)


def test_a_first_dim_that_is_not_the_size_of_the_group_is_an_error() -> None:
    wire = Wire("reduce_scatter", ("tp",), index=4)
    with pytest.raises(MismatchError, match=r"collective 4 .* needs a first dim of 2"):
        run_virtual([one(wire, torch.ones(3)), one(wire, torch.ones(3))], PAIR)


def test_a_deadlock_names_ranks_axes_and_nodes() -> None:
    mesh = Mesh((("dp", 2), ("tp", 2)))
    row, column = Wire("all_reduce", ("tp",), index=0), Wire("all_reduce", ("dp",), index=1)
    operand = torch.ones(1)
    programs = [
        several((row, operand), (column, operand)),
        several((column, operand), (row, operand)),
        several((column, operand), (row, operand)),
        several((row, operand), (column, operand)),
    ]
    with pytest.raises(DeadlockError) as caught:
        run_virtual(programs, mesh, ["row_sum", "column_sum"])
    assert str(caught.value) == (
        "no rank can go on: each waits for another\n"
        "  rank 0 waits for rank 1 in `row_sum` (all_reduce over `tp`)\n"
        "  rank 1 waits for rank 3 in `column_sum` (all_reduce over `dp`)\n"
        "  rank 2 waits for rank 0 in `column_sum` (all_reduce over `dp`)\n"
        "  rank 3 waits for rank 2 in `row_sum` (all_reduce over `tp`)\n"
        "  help: call the same methods on every rank, in one order: none under `if rank == 0`"
    )


def test_a_rank_that_ends_early_leaves_a_deadlock_that_says_so() -> None:
    wire = Wire("all_reduce", ("tp",), index=0)
    with pytest.raises(DeadlockError, match="rank 1 has finished"):
        run_virtual([one(wire, torch.ones(1)), several()], PAIR)


def test_an_exception_of_a_rank_goes_through_with_its_place() -> None:
    def fails() -> Program:
        yield Wire("all_reduce", ("tp",)), torch.ones(1)
        raise ZeroDivisionError("loss scale")

    good = several((Wire("all_reduce", ("tp",)), torch.ones(1)))
    with pytest.raises(ZeroDivisionError) as caught:
        run_virtual([good, fails()], PAIR)
    assert caught.value.__notes__ == ["on rank 1 of the virtual mesh (tp=1)"]


def test_sixty_four_ranks_run_two_hundred_collectives_in_a_fraction_of_a_second() -> None:
    mesh = Mesh((("dp", 8), ("tp", 8)))
    wires = [Wire("all_reduce", ("dp", "tp")[i % 2 :][:1], index=i) for i in range(200)]
    operand = torch.ones(4)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        run_virtual([several(*((wire, operand) for wire in wires)) for _ in range(64)], mesh)
        best = min(best, time.perf_counter() - begin)
    assert best < 1.0, f"{best:.3f} s"
