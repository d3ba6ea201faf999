"""The inputs of a program: check those of a call, and take each rank's shard of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.ir import TensorType
from meshwright.compiler.layout.factors import Dim, dim_axes, whole
from meshwright.compiler.layout.layout import Layout, block_map, shard
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.public import Program
from meshwright.dsl.statements import Data
from meshwright.runtime.errors import RunError, check_kind

Sharder = Callable[[Tensor], Tensor]


class Inputs:
    """The inputs that a program takes, in the order of its graph's arguments.

    With `rows` a caller passes only its own rows: what `data` splits is local already.
    """

    def __init__(self, program: Program, *, rows: bool = False) -> None:
        self.mesh, self.spec = program.mesh, program.captured.input_spec
        self.layouts = [node.placed for node in program.inputs()]
        self.types = dict(self.spec.types)
        if rows:
            for i, node in enumerate(program.inputs()):
                taken, left = _rows(node.args[1], node.placed, program)
                self.types[node.args[1]] = TensorType(taken, node.tensor.dtype)
                self.layouts[i] = left
        self.expected = [(type.shape, type.dtype) for type in self.types.values()]
        self._positional, self._keyword = _plain(program)

    def match(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Tensor] | None:
        """The tensors of a call, if it passes plain tensors of the expected types by position or
        all by name: the usual case, at a tenth of the cost of binding the call."""
        if not kwargs and self._positional:
            given = args
        elif not args and self._keyword:
            given = tuple(kwargs[name] for name in self.types if name in kwargs)
            if len(kwargs) != len(given):
                return None
        else:
            return None
        if len(given) != len(self.expected):
            return None
        for tensor, (shape, dtype) in zip(given, self.expected, strict=True):
            if not isinstance(tensor, Tensor) or tensor.is_nested:
                return None
            if tensor.shape != shape or tensor.dtype != dtype:
                return None
        return given

    def flatten(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], help: str
    ) -> Sequence[Tensor]:
        """The tensors of a call. Raises `RunError` that names every input that differs."""
        found = self.match(args, kwargs)
        if found is not None:
            return found
        try:
            return self.spec.flatten(args, kwargs, self.types)
        except CaptureError as error:
            if error.code in ("not-a-tensor", "another-dtype"):
                help = error.help
            elif "missing" in error.problem or "do not fit" in error.problem:
                help = "pass what `forward` takes, as the example did"
            raise RunError(error.problem, help=help) from None

    def sharders(self, coords: Mapping[str, int], device: torch.device) -> list[Sharder]:
        """For each input, the function that takes a rank's shard of it, on its device."""
        return [_on(device, _sharder(layout, self.mesh, coords)) for layout in self.layouts]


def data_axes(program: Program) -> tuple[str, ...]:
    """The axes over which `data` splits the batch. Raises `RunError` where inputs disagree."""
    found = list(dict.fromkeys(statement.over for statement in program.plan.of(Data)))
    if len(found) > 1:
        texts = [f"({', '.join(axes)})" for axes in found]
        raise RunError(
            f"inputs are split over different axes: {' and '.join(texts)}",
            help="pass the global batch to `step` instead",
        )
    return tuple(a for a in found[0] if program.mesh.size(a) > 1) if found else ()


def rows_of(num_rows: int, num_parts: int, part: int) -> slice:
    """The rows of a batch that belong to one of so many parts. Raises `RunError` unless the batch
    divides."""
    check_kind(num_rows, int, "the number of rows", "pass a whole number")
    rows, rest = divmod(num_rows, num_parts)
    if rest or num_rows < 1:
        lower = max(num_rows - rest, num_parts)
        raise RunError(
            f"a batch of {num_rows} rows does not divide over {num_parts} ranks",
            help=f"use a batch of {lower} or {lower + num_parts}",
        )
    return slice(part * rows, (part + 1) * rows)


def _rows(name: str, layout: Layout, program: Program) -> tuple[tuple[int, ...], Layout]:
    """The shape of a caller's own rows, and the layout in which its ranks split those further."""
    data, mesh = set(data_axes(program)), program.mesh
    dims: list[Dim] = []
    taken: list[int] = []
    for dim, size in zip(layout.dims, layout.shape, strict=True):
        own = data & set(dim_axes(dim))
        if own and set(dim_axes(dim)) - data:
            raise RunError(
                f"one dim of `{name}` is split by `data` and by other axes: `{layout}`",
                help="pass the global batch to `step` instead",
            )
        taken.append(size // mesh.size(own))
        dims.append(whole(taken[-1]) if own else dim)
    return tuple(taken), Layout(tuple(dims))


def _plain(program: Program) -> tuple[bool, bool]:
    """Whether all inputs are tensors that can be passed by position, and by name."""
    spec = program.captured.input_spec
    parameters = spec.signature.parameters
    if spec.constants or any(name not in parameters for name in spec.types):
        return False, False
    kinds = [parameters[name].kind for name in spec.types]
    both = inspect.Parameter.POSITIONAL_OR_KEYWORD
    positional = tuple(spec.types) == tuple(parameters)[: len(kinds)] and all(
        kind in (both, inspect.Parameter.POSITIONAL_ONLY) for kind in kinds
    )
    return positional, all(kind in (both, inspect.Parameter.KEYWORD_ONLY) for kind in kinds)


def _sharder(layout: Layout, mesh: Mesh, coords: Mapping[str, int]) -> Sharder:
    """The function that takes a rank's shard: a slice of one dim where that is enough."""
    split = [i for i, dim in enumerate(layout.dims) if dim_axes(dim)]
    if not split and not layout.partial:
        return _same
    if len(split) == 1 and not layout.partial:
        index = block_map(Layout((layout.dims[split[0]],)), mesh, coords)
        first, length = int(index[0]), len(index)
        if torch.equal(index, torch.arange(first, first + length)):
            return lambda tensor: tensor.narrow(split[0], first, length)
    return lambda tensor: shard(tensor, layout, mesh, coords)


def check_dense(tensor: Tensor) -> None:
    """Raise `RunError` for an input without values in memory of its own."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise RunError(
            f"an input is {'on the meta device' if tensor.is_meta else tensor.layout}",
            help="pass dense tensors with values",
        )


def check_leaves(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raise `RunError` for an input that requires a gradient: it would get none."""
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.requires_grad:
            raise RunError(
                f"the input `{name}` requires a gradient, which a step does not give",
                help=f"pass `{name}.detach()`, or make what computes it part of the model",
            )


def _on(device: torch.device, sharder: Sharder) -> Sharder:
    def take(tensor: Tensor) -> Tensor:
        own = sharder(tensor)
        # From pinned memory a copy is in the order of the device's work, and nobody waits for it.
        return own if own.device == device else own.to(device, non_blocking=True)

    return take


def _same(tensor: Tensor) -> Tensor:
    return tensor
