"""One rank of `test_process.py`: every collective, beside the same on the virtual mesh.

Prints a line for each case that differs, and at the end how many there were.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.rows import Rows
from meshwright.compiler.layout.wires import WIRES, Start, Wait, Wire, everyone
from meshwright.runtime.transports import nccl
from meshwright.runtime.transports.gloo import GlooGroup
from meshwright.runtime.transports.process import ProcessMesh
from meshwright.runtime.transports.shared import slot_bytes
from meshwright.runtime.transports.virtual import run_virtual
from tests.runtime.transports import mirror

MESHES = {
    2: Mesh((("dp", 1), ("tp", 2))),
    4: Mesh((("dp", 2), ("tp", 2))),
}
AXES = (("tp",), ("dp",), ("dp", "tp"), ("tp", "dp"))
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.bool,
)
SHAPES: tuple[tuple[int, ...], ...] = ((), (3,), (0,), (5, 7), (300, 301), (700, 1001))


def wires() -> Iterator[Wire]:
    for axes in AXES:
        for reduce in ("sum", "max", "min"):
            yield Wire("all_reduce", axes, reduce=reduce)
            yield Wire("reduce_scatter", axes, reduce=reduce)
        yield Wire("all_gather", axes)
        yield Wire("all_to_all", axes)
        yield Wire("permute", axes, shift=1)
        yield Wire("permute", axes, shift=-1)
        yield Wire("broadcast", axes)
        yield Wire("reduce", axes)
        yield Wire("mirror", axes)
    yield Wire("broadcast", ("tp",), root=1)
    yield Wire("reduce", ("tp",), root=1, reduce="max")


def operand(
    wire: Wire, mesh: Mesh, shape: tuple[int, ...], dtype: torch.dtype, rank: int
) -> Tensor:
    """Random, another on each rank; transposed, so that it is not contiguous."""
    if WIRES[wire.kind].divided:
        shape = (mesh.size(wire.axes), *shape)
    seed = torch.Generator().manual_seed(rank)
    values = torch.randn(shape[::-1], generator=seed, dtype=torch.float64) * 10
    tensor = values > 0 if dtype is torch.bool else values.to(dtype)
    return tensor.permute(tuple(range(tensor.dim()))[::-1])


def program(wire: Wire, tensor: Tensor, started: bool) -> Generator[Any, Any, Tensor]:
    if not started:
        result: Tensor = yield wire, tensor
        return result
    first = yield Start(wire, tensor)
    second = yield Start(wire, tensor)
    result = yield Wait(second)
    yield Wait(first)
    return result


def cases() -> Iterator[tuple[Wire, torch.dtype, tuple[int, ...], bool]]:
    for wire in wires():
        whole = wire.axes == ("dp", "tp")
        for shape in SHAPES if whole else SHAPES[1:4:2]:
            yield wire, torch.float32, shape, False
        if wire.axes == ("tp",):
            for shape in SHAPES:
                yield wire, torch.float32, shape, True
        for dtype in DTYPES[1:] if whole else ():
            yield wire, dtype, (5, 7), False


def differs(got: Tensor, expected: Tensor, same_order: bool) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return True
    if got.dtype.is_floating_point and not same_order:
        # Gloo's own all_reduce adds in another order.
        return not torch.allclose(got, expected, rtol=3 * torch.finfo(got.dtype).eps, atol=1e-5)
    return not torch.equal(got, expected)


def check_nccl(transport: ProcessMesh) -> None:
    """What NCCL runs where it has nothing of its own, on Gloo's all_to_all."""
    group = transport.lanes["tp",].group
    assert isinstance(group, GlooGroup)
    for wire in wires():
        if wire.axes == ("tp",):
            given = [operand(wire, transport.mesh, (5, 7), torch.int64, rank) for rank in (0, 1)]
            own = given[group.position].contiguous()
            works, finish = nccl._direct(group, wire, own, False)  # type: ignore[arg-type]
            for work in works:
                work.wait()
            if not finish().equal(everyone(wire, given)[group.position]):
                print("differs:", wire, "as NCCL runs it")
    check_nccl_rows(group, transport.mesh)


def rows(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...], seed: int) -> list[Rows]:
    """What each rank gives to an exchange of counted rows: some go nowhere, and some find no
    room."""
    torch.manual_seed(seed)
    size = mesh.size(axes)
    found: list[Rows] = []
    for _ in mesh.groups(axes):
        counts = torch.randint(4, (size, size)) * torch.randint(2, (size, 1))
        most = int(counts.sum(1).max())
        for sent, received in zip(counts.tolist(), counts.T.tolist(), strict=True):
            found.append(Rows(torch.randn(max(most - (seed == 1), 0), *shape), sent, received, 5))
    places = [rank for members in mesh.groups(axes) for rank in members]
    return [each for _, each in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]


def check_rows(transport: ProcessMesh, mesh: Mesh) -> int:
    """Exchange rows by count on every rank; returns how many cases there were."""
    cases = 0
    for axes, shape, seed in itertools.product(AXES, ((3,), (2, 5), (40000,)), range(3)):
        for started in (False, True):
            given: list[Any] = rows(mesh, axes, shape, seed)
            wire = Wire("exchange_rows", axes)
            expected = run_virtual([program(wire, each, started) for each in given], mesh)
            (got,) = transport.run([program(wire, given[transport.rank], started)])
            if not got.equal(expected[transport.rank]):
                print("differs:", wire, shape, seed, "started" if started else "")
            cases += 1
    return cases


def check_nccl_rows(group: GlooGroup, mesh: Mesh) -> None:
    """How NCCL runs it, on Gloo's all_to_all."""
    given = rows(mesh, ("tp",), (3,), 0)
    works, finish = nccl._rows(group, Wire("exchange_rows", ("tp",)), given[group.position], False)  # type: ignore[arg-type]
    for work in works:
        work.wait()
    if not finish().equal(everyone(Wire("exchange_rows", ("tp",)), given)[group.position]):
        print("differs: exchange_rows as NCCL runs it")


def main() -> None:
    mirror.register()
    torch.set_num_threads(1)
    mesh = MESHES[int(os.environ["WORLD_SIZE"])]
    transport = ProcessMesh(mesh)
    transport.check_same_program("5e" * 32)
    count = 0
    for wire, dtype, shape, started in cases():
        given = [operand(wire, mesh, shape, dtype, rank) for rank in range(mesh.num_ranks)]
        before = given[transport.rank].clone()
        expected = run_virtual([program(wire, tensor, started) for tensor in given], mesh)
        (got,) = transport.run([program(wire, given[transport.rank], started)])
        shared = transport.shared_memory and before.nbytes <= slot_bytes(mesh.size(wire.axes))
        if differs(got, expected[transport.rank], shared) or not given[transport.rank].equal(
            before
        ):
            print("differs:", wire, dtype, shape, "started" if started else "")
        count += 1
    addend = torch.randn(999, generator=torch.Generator().manual_seed(transport.rank))
    (bits,) = transport.run([program(Wire("all_reduce", mesh.names), addend, False)])
    (same,) = transport.run([program(Wire("all_gather", mesh.names), bits, False)])
    print("the same bits" if (same == bits).all() else "differs: bits of a sum")
    print(f"{count + check_rows(transport, mesh)} cases")
    if isinstance(transport.lanes["tp",].group, GlooGroup) and len(given) == 2:
        check_nccl(transport)
    transport.close()
    if len(given) == 2:
        with mirror.compiled().launch() as run:
            mirror.check_run(run)
