"""The programs of a run: the one launched, and those compiled for other modes and inputs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils import _pytree as pytree

from meshwright.compiler.capture.structure import Structure
from meshwright.compiler.public import Program
from meshwright.dsl.errors import spelled
from meshwright.runtime.ambient import apart_from_caller
from meshwright.runtime.errors import RunError
from meshwright.runtime.executor import Executor
from meshwright.runtime.inductor import fused_codes
from meshwright.runtime.inputs import Inputs
from meshwright.runtime.rank import RankState
from meshwright.runtime.state.start import executable_digest, same_constants
from meshwright.runtime.stepping import Ranks
from meshwright.runtime.transports.meshes import Transport


def check_new_shapes(new_shapes: object) -> None:
    """Raise `RunError` for what `launch(new_shapes=...)` does not take."""
    if not (isinstance(new_shapes, str) and new_shapes in ("error", "compile")):
        raise RunError(
            f"`new_shapes` is {spelled(new_shapes)}",
            help='write `new_shapes="compile"` or leave it out',
        )


@dataclass(frozen=True, slots=True)
class Linked:
    """A program with its code linked for the ranks in this process."""

    program: Program
    inputs: Inputs
    ranks: Ranks
    wire_names: tuple[str, ...]
    input_names: tuple[str, ...]


Found: TypeAlias = tuple[Linked, Sequence[Tensor]]
"""A program, and its inputs in order."""
_LIKE_EXAMPLE = 'pass inputs like the example\'s, or launch with `new_shapes="compile"`'


class Programs:
    """The programs of a run, by mode and input signature; none of them holds the model's weights.

    `launched` is the first, and `latest` by mode the last one used. `run` runs one program of each
    rank in this process.
    """

    def __init__(
        self,
        program: Program,
        states: Sequence[RankState],
        transport: Transport,
        run: Callable[[Sequence[Any]], list[Any]],
        backend: str,
    ) -> None:
        self._backend = backend
        self._states, self._transport, self._run = states, transport, run
        self._structure = Structure(program.model, program.captured)
        self.launched = self._linked(program)
        self.latest = {program.mode: self.launched}
        self.by_signature: dict[Any, Linked] = {}

    def matched(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found | None:
        """The program that was last used in this mode, and its inputs, if it is for these."""
        latest = self.latest.get(mode)
        tensors = None if latest is None else latest.inputs.match(args, kwargs)
        return None if latest is None or tensors is None else (latest, tensors)

    def launched_for(
        self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any], new_shapes: str
    ) -> Found | None:
        """The program that was launched, and its inputs, if it is for these. Raises `RunError`
        where it is of this mode and no other may be compiled."""
        if mode != self.launched.program.mode:
            return None
        try:
            return self.launched, self.launched.inputs.flatten(args, kwargs, _LIKE_EXAMPLE)
        except RunError:
            if mode == "train" and new_shapes == "error":
                raise
        return None

    def compiled(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
        """The program for inputs like these, from the cache or compiled now, on every rank, and
        these inputs."""
        own = self.launched.program
        static = own.captured.input_spec.static_values(args, kwargs)
        key = (mode, *_signature(args, kwargs), *static)
        if key not in self.by_signature:
            with self._structure.as_compiled() as model:
                program = own.recompile(model, example=(args, kwargs), mode=mode)
                self._structure.check(model, program.captured.constants)
            self._transport.check_same_program(executable_digest(program, self._backend))
            with apart_from_caller(program.device.type):
                self.by_signature[key] = self._linked(program)
        linked = self.latest[mode] = self.by_signature[key]
        return linked, linked.inputs.flatten(args, kwargs, _LIKE_EXAMPLE)

    def _linked(self, program: Program) -> Linked:
        inputs = Inputs(program)
        constants = self._run(
            [same_constants(state, program.captured.constants) for state in self._states]
        )
        codes = fused_codes(program) if self._backend == "inductor" else ()
        ranks = [
            (Executor(program, state, own, codes), inputs.sharders(state.coords, state.device))
            for state, own in zip(self._states, constants, strict=True)
        ]
        names = program.wire_names
        self._transport.connect(program.transfers.every_wire)
        program = program.with_structure(self._structure.copy)
        if not self._transport.has_every_rank:
            # Torch's tracers are cycles that hold the model, and nothing else collects them soon.
            gc.collect()
        return Linked(program, inputs, ranks, names, tuple(inputs.types))


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What decides which program runs: the structure, and each leaf's type or value."""
    leaves, tree = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
    types = tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves
    )
    return str(tree), types
