"""What a call of a function makes on one rank: its results, and what it holds while it runs.

Each call is run on fake tensors of its shapes, strides and types, so that views, copies and what
the operator needs inside itself are what they will be; equal calls are run once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from meshwright.compiler.codegen.instructions import Call, Constant
from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.graph.ir import Node
from meshwright.compiler.graph.transfers import is_collective
from meshwright.compiler.graph.types import Fakes
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.report.memory.counter import address
from meshwright.compiler.report.memory.scratch import KernelCounter
from meshwright.compiler.report.memory.tensors import Local, Storage, Use, contiguous, leaves


@dataclass(frozen=True, slots=True)
class Calling:
    """A call of what `recipe` makes for one rank, for `node`; those with one `function` and equal
    operands do the same."""

    function: Any
    recipe: Callable[[RankContext], Callable[..., Any]]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    node: Node


@dataclass(frozen=True, slots=True)
class Result:
    """A tensor that a call returns: its own memory of `num_bytes`, or that of an operand."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    memory: int
    """A number for each storage of its own; those of operands count down from -1."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call returns, the most that its own storages hold while it runs, and what it keeps for
    later calls."""

    results: Any
    peak: int
    kept: int
    first: int = 0
    """Where it makes what it keeps: the most that it holds then, with what others keep already."""

    def made(self, call: Calling, use: Use) -> Any:
        """The results with storages, of which those of their own are for `use`."""
        own: dict[int, Storage] = {}
        operands = list(leaves((*call.args, *call.kwargs.values())))

        def made(result: Any) -> Any:
            if isinstance(result, tuple):
                return tuple(map(made, result))
            if result is None:
                return None
            if result.memory < 0:
                storage = operands[-1 - result.memory].storage
            else:
                storage = own.setdefault(result.memory, Storage(result.num_bytes, call.node, use))
            return Local(result.shape, result.stride, result.dtype, storage)

        return made(self.results)


class Calls:
    """The calls of one rank, by what they do. What they make in the first step and keep for later
    ones is `kept`, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._fakes = device, Fakes()
        self._costs: dict[Any, Cost] = {}
        self.kept = 0

    def cost(self, call: Calling, context: RankContext, turn: int) -> Cost:
        """What a call costs in the turn of a loop."""
        key = (call.function, _key(call.args), _key(tuple(call.kwargs.items())))
        cost = self._costs.get((key, None)) or self._costs.get((key, turn))
        if cost is None:
            first = self._measured(call, context)
            # What the first call of a turn keeps, such as tables of random numbers, is there in all
            # later steps.
            cost = self._measured(call, context) if first.kept else first
            self._costs[key, turn if first.kept else None] = cost
            if first.kept:
                cost = replace(cost, first=self.kept + first.peak)
                self.kept += first.kept
        return cost

    def _measured(self, call: Calling, context: RankContext) -> Cost:
        """What a call does on fake tensors."""
        function, fakes, counter = call.recipe(context), [], KernelCounter()

        def given(operand: Any) -> Any:
            if isinstance(operand, tuple):
                return tuple(map(given, operand))
            if isinstance(operand, Constant):
                return operand.recipe(context)
            if isinstance(operand, Local):
                fakes.append(self._fake(operand))
                return fakes[-1]
            return operand

        positional, named = (
            given(call.args),
            {key: given(each) for key, each in call.kwargs.items()},
        )
        try:
            with torch.no_grad(), self._fakes, counter:
                found = function(*positional, **named)
        except RuntimeError:
            # Torch cannot run it without data, or without the device.
            return _from_types(call.node, context)
        memory = {address(fake): -1 - i for i, fake in reversed(list(enumerate(fakes)))}

        def described(result: Any) -> Any:
            if isinstance(result, (tuple, list)):
                return tuple(map(described, result))
            if result is None:
                return None
            place = memory.setdefault(address(result), len(memory))
            size = result.untyped_storage().nbytes()
            return Result(tuple(result.shape), result.stride(), result.dtype, place, size)

        results = described(found)
        returned = {address(result) for result in tree_leaves(found) if result is not None}
        size = sum(size for key, (_, size) in counter.made.items() if key in returned)
        peak = counter.peak if self._device.type != "cpu" else counter.peak_with_scratch()
        return Cost(results, peak, counter.alive - size)

    def _fake(self, local: Local) -> Tensor:
        with self._fakes:
            return torch.empty_strided(
                local.shape, local.stride, dtype=local.dtype, device=self._device
            )


def _from_types(node: Node, context: RankContext) -> Cost:
    """The results of a node alone, each in memory of its own."""
    results: list[Result | None] = []
    for i, (type, layout) in enumerate(node.results):
        if type is None or layout is None:
            results.append(None)
            continue
        shape = layout.local_shape(context.mesh)
        size = math.prod(shape) * type.dtype.itemsize
        results.append(Result(shape, contiguous(shape), type.dtype, i, size))
    total = sum(result.num_bytes for result in results if result is not None)
    return Cost(tuple(results) if isinstance(node.type, tuple) else results[0], total, 0)


def _key(operand: Any) -> Any:
    if isinstance(operand, tuple):
        return tuple(map(_key, operand))
    return operand.key if isinstance(operand, Local) else operand


def function_key(call: Call) -> Any:
    """What equal calls have in common: a kernel's arguments and layouts, but not its number, which
    those of other graphs may have."""
    node = call.node
    known = composite_of(node.op)
    if known is None and not is_collective(node):
        return call.function.name
    number = None if known is None else known.number
    args = tuple(
        None if isinstance(arg, Node) or i == number else arg for i, arg in enumerate(node.args)
    )
    stem = call.function.name.rstrip("_0123456789")
    return (stem, node.op, repr(args), node.layout, tuple(n.layout for n in node.operands()))
