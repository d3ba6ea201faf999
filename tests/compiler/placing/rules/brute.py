"""Run a sample call on every rank under a placement, and compare with the call on whole tensors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.codegen.local import local_args
from meshwright.compiler.graph.ir import Op, TensorType
from meshwright.compiler.graph.slots import Slot, freeze
from meshwright.compiler.layout.factors import Dim, Factor, cut, dim_axes
from meshwright.compiler.layout.layout import Layout, replicated, shard
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.allowed import allowed
from meshwright.compiler.placing.rules.notation import Call, Operand, Placement
from tests.compiler.layouts import combine, product

LINE = Mesh((("a", 2),))
SQUARE = Mesh((("a", 2), ("b", 2)))


@dataclass(frozen=True, eq=False)
class Sample:
    """A call on tensors. `special` are (place, dim) whose splits its function cannot run, of the
    operands and, counted behind them, of the results."""

    op: Op
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    function: Callable[..., Any]
    gradients: bool = True
    special: tuple[tuple[int, int], ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in leaves((self.args, tuple(self.kwargs.values()))) if is_tensor(t)]

    def run(self, args: Any, kwargs: Any) -> tuple[Tensor | None, ...]:
        found = self.function(*args, **kwargs)
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    def __str__(self) -> str:
        shapes = ", ".join(str(list(t.shape)) for t in self.tensors)
        rest = [a for a in leaves((self.args, tuple(self.kwargs.values()))) if not is_tensor(a)]
        name = str(self.op).removeprefix("aten.").removesuffix(".default")
        return f"{name}({shapes}; {', '.join(map(str, rest))})" if rest else f"{name}({shapes})"


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def replace_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(replace_tensors(item, function) for item in value)
    return value


def call_of(
    sample: Sample,
    results: Sequence[Tensor | None],
    layouts: Sequence[Layout],
    mesh: Mesh,
    *,
    differentiable: bool,
    wanted: tuple[Layout, ...] = (),
) -> Call:
    """The call as the engine sees it."""
    numbers = itertools.count()
    operands = tuple(
        Operand(
            TensorType(tuple(t.shape), t.dtype),
            layout,
            differentiable=differentiable and t.is_floating_point(),
            zero=t.is_floating_point() and t.numel() > 0 and not t.any(),
        )
        for t, layout in zip(sample.tensors, layouts, strict=True)
    )
    return Call(
        sample.op,
        freeze(replace_tensors(sample.args, lambda _: Slot(next(numbers)))),
        tuple(
            (key, freeze(replace_tensors(value, lambda _: Slot(next(numbers)))))
            for key, value in sample.kwargs.items()
        ),
        operands,
        tuple(None if t is None else TensorType(tuple(t.shape), t.dtype) for t in results),
        mesh,
        wanted,
    )


def dim_splits(size: int, axes: tuple[str, ...], mesh: Mesh) -> Iterator[Dim]:
    """Ways to split a dim over axes: in blocks, below a leading factor, in segments."""
    ranks = mesh.size(axes)
    if size and size % ranks == 0:
        yield cut(size, *axes)
    if size % (3 * ranks) == 0:
        yield product(Factor(3), Factor(size // 3, axes))
    if size % (2 * ranks) == 0 and size > 2 * ranks:
        yield product(Factor(2), Factor(size // 2, axes))
        yield ((Factor(size - ranks, axes),), (Factor(ranks, axes),))


def layouts_of(tensor: Tensor, mesh: Mesh) -> list[Layout]:
    """Layouts to try an operand in."""
    shape = tuple(tensor.shape)
    base = replicated(shape)
    found = [base]
    names = mesh.names
    sets = [(name,) for name in names] + ([names] if len(names) > 1 else [])
    for axes in sets:
        for i, size in enumerate(shape):
            found += [
                base.with_dims((*base.dims[:i], dim, *base.dims[i + 1 :]))
                for dim in dim_splits(size, axes, mesh)
            ]
        if tensor.is_floating_point():
            found += [base.add_partial(axes), base.add_varying(axes)]
    if len(names) > 1:
        found += [both for x in found for y in found if (both := _both(x, y)) is not None]
    return [layout.canonical(mesh) for layout in found]


def _both(x: Layout, y: Layout) -> Layout | None:
    """One axis as in x, the other as in y."""
    if x.axes_used != ("a",) or y.axes_used != ("b",):
        return None
    split_twice = [i for i, d in enumerate(x.dims) if dim_axes(d) and dim_axes(y.dims[i])]
    if split_twice:
        return None
    dims = tuple(d if dim_axes(d) else y.dims[i] for i, d in enumerate(x.dims))
    return Layout(dims, x.partial or y.partial, x.varying or y.varying)


def combinations(
    sample: Sample, mesh: Mesh, limit: int, rng: random.Random
) -> Iterator[tuple[Layout, ...]]:
    """Layouts of all operands; a random choice of `limit` where there are more."""
    options = [layouts_of(t, mesh) for t in sample.tensors]
    total = 1
    for found in options:
        total *= len(found)
    if total <= limit:
        yield from itertools.product(*options)
    else:
        for _ in range(limit):
            yield tuple(rng.choice(found) for found in options)


def placements(
    sample: Sample,
    results: Sequence[Tensor | None],
    mesh: Mesh,
    limit: int,
    *,
    differentiable: bool,
) -> list[Placement]:
    """Every placement that the rule allows, from whichever operand layouts."""
    rng = random.Random(0)
    asked: list[tuple[Layout, ...]] = [()]
    if len(results) == 1 and results[0] is not None:
        asked += [(layout,) for layout in layouts_of(results[0], mesh) if layout.split_axes]
    found: dict[Placement, None] = {}
    for layouts in combinations(sample, mesh, limit, rng):
        wanted = rng.choice(asked)
        call = call_of(sample, results, layouts, mesh, differentiable=differentiable, wanted=wanted)
        for placement in allowed(call):
            found[canonical(placement, mesh)] = None
    return [p for p in found if not is_special(sample, p)]


def canonical(placement: Placement, mesh: Mesh) -> Placement:
    return Placement(
        tuple(layout.canonical(mesh) for layout in placement.operands),
        tuple(None if x is None else x.canonical(mesh) for x in placement.results),
    )


def is_special(sample: Sample, placement: Placement) -> bool:
    layouts = (*placement.operands, *placement.results)
    return any((layout := layouts[i]) and dim_axes(layout.dims[dim]) for i, dim in sample.special)


def distribute(tensor: Tensor, layout: Layout, mesh: Mesh) -> list[Tensor]:
    """What each rank holds; of a pending sum, random summands."""
    coords = [mesh.coords(rank) for rank in range(mesh.num_ranks)]
    held = [shard(tensor, layout.drop_states(), mesh, place).contiguous() for place in coords]
    if layout.partial:
        assert layout.reduction == "sum"
        # Where it is neither split nor pending, a value is the same on every rank: summands too.
        wholes = [torch.randn_like(tensor) for _ in range(mesh.size(layout.partial_axes) - 1)]
        wholes = [tensor - sum(wholes, torch.zeros_like(tensor)), *wholes]
        summands = [wholes[mesh.position(place, layout.partial_axes)] for place in coords]
        held = [
            shard(summand, layout.drop_states(), mesh, place).contiguous()
            for summand, place in zip(summands, coords, strict=True)
        ]
    return held


def check_held(
    held: Sequence[Tensor], expected: Tensor, layout: Layout, mesh: Mesh, what: str
) -> None:
    """Every rank holds its part of `expected`, once what is pending is combined."""
    local_shape = layout.local_shape(mesh)
    same_on = tuple(axis for axis in mesh.names if layout.state(axis) in ("replicated", "varying"))
    for members in mesh.groups(same_on):
        assert all(same(held[rank], held[members[0]]) for rank in members), f"{what}: differs"
    for members in mesh.groups(layout.partial_axes):
        parts = [held[rank] for rank in members]
        for part in parts:
            assert tuple(part.shape) == local_shape, f"{what}: {list(part.shape)} under {layout}"
        total = combine(parts, layout.reduction)
        own = shard(expected, layout.drop_states(), mesh, mesh.coords(members[0]))
        assert same(total, own), f"{what}: not `{layout}`"


def same(x: Tensor, y: Tensor) -> bool:
    if x.is_floating_point() or x.is_complex():
        return torch.allclose(x, y.to(x.dtype), rtol=1e-9, atol=1e-9, equal_nan=True)
    return torch.equal(x, y)


def run_locally(
    sample: Sample, placement: Placement, locals_of: Sequence[Sequence[Tensor]], mesh: Mesh
) -> list[tuple[Tensor | None, ...]]:
    """The results on each rank; `locals_of[i][rank]` is operand i there."""
    found = []
    for rank in range(mesh.num_ranks):
        given = iter([held[rank] for held in locals_of])
        args = replace_tensors(sample.args, lambda _: next(given))  # noqa: B023  # used at once
        kwargs = {
            key: replace_tensors(value, lambda _: next(given))  # noqa: B023
            for key, value in sample.kwargs.items()
        }
        found.append(
            sample.run(
                *local_args(sample.op, args, kwargs, placement.operands, placement.results, mesh)
            )
        )
    return found


def check_values(
    sample: Sample, results: Sequence[Tensor | None], placement: Placement, mesh: Mesh
) -> None:
    """The placement's results are what it says they are."""
    locals_of = [
        distribute(t, layout, mesh)
        for t, layout in zip(sample.tensors, placement.operands, strict=True)
    ]
    outputs = run_locally(sample, placement, locals_of, mesh)
    for i, (expected, layout) in enumerate(zip(results, placement.results, strict=True)):
        if expected is not None:
            assert layout is not None
            held = [output[i] for output in outputs]
            assert all(h is not None for h in held)
            check_held(held, expected, layout, mesh, shown(sample, placement, f"result {i}"))  # type: ignore[arg-type]


def shown(sample: Sample, placement: Placement, what: str) -> str:
    sides = [", ".join(map(str, side)) for side in (placement.operands, placement.results)]
    return f"{sample}: {' -> '.join(sides)}: {what}"


def check_gradients(
    sample: Sample, results: Sequence[Tensor | None], placement: Placement, mesh: Mesh
) -> None:
    """Cotangents in the duals of the results' layouts give gradients in those of the operands'."""
    wanted = [i for i, t in enumerate(sample.tensors) if t.is_floating_point()]
    weights = [
        torch.randn_like(t) if t is not None and t.is_floating_point() else None for t in results
    ]
    expected = _gradients(sample, wanted, sample.tensors, weights, placement, mesh, whole=True)
    locals_of = [
        distribute(t, layout, mesh)
        for t, layout in zip(sample.tensors, placement.operands, strict=True)
    ]
    cotangents = [
        None if w is None or layout is None else distribute(w, layout.dual(), mesh)
        for w, layout in zip(weights, placement.results, strict=True)
    ]
    found = []
    for rank in range(mesh.num_ranks):
        local = [held[rank] for held in locals_of]
        given = [None if c is None else c[rank] for c in cotangents]
        found.append(_gradients(sample, wanted, local, given, placement, mesh))
    for k, i in enumerate(wanted):
        layout = placement.operands[i].dual()
        if expected[k] is not None:
            held = [f[k] if f[k] is not None else torch.zeros(()) for f in found]
            what = shown(sample, placement, f"gradient of operand {i}")
            check_held(held, expected[k], layout, mesh, what)  # type: ignore[arg-type]


def _gradients(
    sample: Sample,
    wanted: Sequence[int],
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    placement: Placement,
    mesh: Mesh,
    whole: bool = False,
) -> list[Tensor | None]:
    own = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    given = iter(own)
    args = replace_tensors(sample.args, lambda _: next(given))
    kwargs = {k: replace_tensors(v, lambda _: next(given)) for k, v in sample.kwargs.items()}
    if not whole:
        args, kwargs = local_args(
            sample.op, args, kwargs, placement.operands, placement.results, mesh
        )
    with torch.enable_grad():
        outputs = sample.run(args, kwargs)
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    if not pairs:
        return [None for _ in wanted]
    return list(
        torch.autograd.grad(
            [output for output, _ in pairs],
            [own[i] for i in wanted],
            [cotangent for _, cotangent in pairs],
            allow_unused=True,
        )
    )
