"""A run: a program's ranks with their tensors, trained step by step."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compiler.collectives import Wire
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.ir import TensorType
from meshwright.compiler.layout import shard
from meshwright.compiler.program import Program, Stored
from meshwright.runtime.errors import RunError
from meshwright.runtime.rank import RankProgram, RankState, RankStep, gathered_all
from meshwright.runtime.start import same_weights
from meshwright.runtime.transport import ProcessMesh, Transport, VirtualMesh, under_torchrun

_NOT_ELEMENTWISE = ("Muon", "Adafactor", "LBFGS", "Shampoo", "LAMB", "LARS")
"""Optimizers whose update of an element looks at its whole tensor: wrong on a part of one."""


class Run:
    """A launched program. Made by `Program.launch`.

    `step` takes the global batch, the same on every rank, adds to the gradients of `parameters()`
    and returns the loss, a 0-d tensor, without waiting for the device. The model that was compiled
    is not touched; `copy_to` writes trained values back.
    """

    def __init__(
        self,
        program: Program,
        *,
        seed: int = 0,
        state_dict: Mapping[str, Tensor] | None = None,
        new_shapes: str = "error",
    ) -> None:
        """Hold the shards of the model's weights, or of `state_dict`, and link the code.

        `seed` keys dropout. `new_shapes="compile"` lets `step` compile for input signatures other
        than the example's. Raises `RunError` where there are no weights to hold, where the number
        of processes is not the mesh's, or where ranks compiled different programs.
        """
        if new_shapes not in ("error", "compile"):
            raise ValueError(f"`new_shapes` is {new_shapes!r}: use 'error' or 'compile'")
        self.program, self.mesh, self.new_shapes = program, program.mesh, new_shapes
        self.transport: Transport = (
            ProcessMesh(program.mesh, program.device)
            if under_torchrun()
            else VirtualMesh(program.mesh)
        )
        if isinstance(self.transport, ProcessMesh):
            self.transport.process.check_same_program(program.digest)
        values = _values(program, state_dict)
        self.states = [RankState(program, r, values, seed) for r in self.transport.ranks]
        self._programs: dict[Any, tuple[Program, list[RankStep]]] = {}
        self._signatures: dict[Any, Program] = {_signature(program): program}
        self._link(program)
        if isinstance(self.transport, ProcessMesh):
            self._run([same_weights(state, program) for state in self.states])

    # -- training -----------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of one global batch; gradients are added to `.grad`.

        Returns the loss, or `(loss, *outputs)` where the program was compiled with `outputs`.
        Raises `CaptureError` for inputs unlike the example's.
        """
        program = self._program_for(args, kwargs, "train")
        return self._results(self._train(program, program.captured.input_spec.flatten(args, kwargs)))

    def step_local(self, *args: Any, **kwargs: Any) -> Any:
        """As `step`, given only the rows `data_slice(n)` of the inputs under `data`."""
        spec, types = self.program.captured.input_spec, self._local_types()
        return self._results(self._train(self.program, spec.flatten(args, kwargs, types), types))

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The loss in the model's eval mode, with the same weights and no gradients."""
        program = self._program_for(args, kwargs, "eval")
        tensors = program.captured.input_spec.flatten(args, kwargs)
        return self._results(self._execute(program, tensors))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs in its eval mode: a tensor, or a dictionary by path."""
        program = self._program_for(args, kwargs, "infer")
        found = self._execute(program, program.captured.input_spec.flatten(args, kwargs))
        named = {label.partition(":")[2]: value for label, value in found.items()}
        return next(iter(named.values())) if list(named) in ([""], ["output"]) else named

    def _train(
        self,
        program: Program,
        tensors: Sequence[Tensor],
        local_types: Mapping[str, TensorType] | None = None,
    ) -> dict[str, Tensor]:
        for state in self.states:
            state.random.step += 1
        return self._execute(program, tensors, sharded=local_types is not None)

    def _execute(
        self, program: Program, tensors: Sequence[Tensor], *, sharded: bool = False
    ) -> dict[str, Tensor]:
        ranks = self._link(program)
        nodes = program.inputs()
        programs: list[RankProgram] = []
        for rank in ranks:
            state = rank.state
            arguments = {
                node.args[1]: (
                    tensor
                    if sharded and not isinstance(self.transport, VirtualMesh)
                    else shard(tensor, node.placed, self.mesh, state.coords)
                ).to(state.device)
                for node, tensor in zip(nodes, tensors, strict=True)
            }
            programs.append(rank.run(arguments))
        names = [name for code in program.code for name in code.wire_names]
        found: dict[str, Tensor] = self._run(programs, names)[0]
        return found

    def _run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        with torch.no_grad():
            return self.transport.run(programs, names)

    def _results(self, found: Mapping[str, Tensor]) -> Any:
        loss, *outputs = found.values()
        return (loss, *outputs) if outputs else loss

    # -- programs by input signature ----------------------------------------------------------

    def _program_for(self, args: Any, kwargs: Any, mode: str) -> Program:
        spec = self.program.captured.input_spec
        if mode == self.program.mode:
            try:
                spec.flatten(args, kwargs)
                return self.program
            except CaptureError:
                if mode == "train" and self.new_shapes == "error":
                    raise
        types = tuple(
            (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in torch.utils._pytree.tree_leaves((args, dict(sorted(kwargs.items()))))
        )
        key = (mode, tuple(sorted(kwargs)), types)
        if key not in self._signatures:
            self._signatures[key] = self.program.recompile(example=(args, kwargs), mode=mode)
        return self._signatures[key]

    def _link(self, program: Program) -> list[RankStep]:
        key = id(program)
        if key not in self._programs:
            self._programs[key] = (program, [RankStep(program, state) for state in self.states])
        return self._programs[key][1]

    # -- data ---------------------------------------------------------------------------------

    @property
    def _data_axes(self) -> tuple[str, ...]:
        for node in self.program.inputs():
            if node.placed.split_axes:
                return node.placed.split_axes
        return ()

    @property
    def data_ranks(self) -> int:
        """How many parts the batch is read in: 1 where every rank is in this process."""
        if isinstance(self.transport, VirtualMesh):
            return 1
        return self.mesh.size(self._data_axes)

    @property
    def data_rank(self) -> int:
        """Which of those parts this process reads."""
        if isinstance(self.transport, VirtualMesh):
            return 0
        return self.mesh.position(self.states[0].coords, self._data_axes)

    def data_slice(self, num_rows: int) -> slice:
        """The rows of a global batch of `num_rows` that `step_local` takes here."""
        rows, rest = divmod(num_rows, self.data_ranks)
        if rest:
            raise RunError(
                f"a batch of {num_rows} rows does not divide over {self.data_ranks} ranks",
                help=f"use a batch of {num_rows - rest} or {num_rows - rest + self.data_ranks}",
            )
        return slice(self.data_rank * rows, (self.data_rank + 1) * rows)

    def _local_types(self) -> dict[str, TensorType]:
        whole = isinstance(self.transport, VirtualMesh)
        return {
            node.args[1]: node.tensor
            if whole
            else TensorType(node.placed.local_shape(self.mesh), node.tensor.dtype)
            for node in self.program.inputs()
        }

    # -- parameters ---------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """The local shards; on the virtual mesh those of every rank, one rank after the other."""
        for state in self.states:
            yield from state.parameters.values()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The local shards with the model's names; on the virtual mesh names repeat by rank."""
        for state in self.states:
            yield from state.parameters.items()

    def optimizer(
        self,
        kind: Callable[..., torch.optim.Optimizer],
        *,
        groups: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> torch.optim.Optimizer:
        """A `torch.optim` optimizer over the local shards: `run.optimizer(AdamW, lr=3e-4)`.

        `groups` are its parameter groups, whose `"params"` are globs over names; the first that
        matches counts. Raises `RunError` for classes that look at whole tensors (Muon, Adafactor,
        LBFGS) where a parameter is split.
        """
        self._check_elementwise(kind)
        trained = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        chosen: list[list[nn.Parameter]] = [[] for _ in range(len(groups) + 1)]
        for name, parameter in trained:
            chosen[_group(name, groups)].append(parameter)
        listed = [
            {**group, "params": parameters}
            for group, parameters in zip((*groups, {}), chosen, strict=True)
            if parameters
        ]
        return kind(listed, **options)

    def _check_elementwise(self, kind: Any) -> None:
        name = getattr(kind, "__name__", str(kind))
        split = [s.name for s in self.program.parameters.values() if s.layout.split_axes]
        if split and name in _NOT_ELEMENTWISE:
            raise RunError(
                f"`{name}` looks at whole tensors, and `{split[0]}` is split",
                where=(f"layout: {self.program.parameters[split[0]].layout}",),
                help="use an elementwise optimizer such as AdamW or SGD",
            )

    def gradients(self) -> dict[str, Tensor]:
        """Global gradients under every name of each parameter; those without one are left out."""
        return self._gather(
            [s for s in self.program.parameters.values() if s.requires_grad],
            lambda state, stored: state.parameters[stored.name].grad,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Global parameters and buffers under the model's own names."""
        keys = set(self.program.model.state_dict(keep_vars=True))
        stored = [*self.program.parameters.values(), *self.program.buffers.values()]
        kinds = dict.fromkeys(self.program.parameters, "parameter")
        found = self._gather(
            stored, lambda state, s: state.tensors[kinds.get(s.name, "buffer"), s.name]
        )
        return {name: value for name, value in found.items() if name in keys}

    def _gather(
        self, stored: Sequence[Stored], value: Callable[[RankState, Stored], Tensor | None]
    ) -> dict[str, Tensor]:
        present = [s for s in stored if value(self.states[0], s) is not None]
        programs = [
            gathered_all([(_given(value(state, s)), s) for s in present], state)
            for state in self.states
        ]
        tensors = self._run(programs)[0]
        found = {s.name: tensor.clone() for s, tensor in zip(present, tensors, strict=True)}
        aliases = self.program.captured.aliases
        return {alias: found[name] for alias, name in aliases.items() if name in found}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over global tensors, as `state_dict` gives them.

        Raises `RunError` naming what is missing, unknown or of another shape.
        """
        _check_names(self.program, state_dict)
        values = _values(self.program, state_dict)
        for state in self.states:
            for kind, every in (
                ("parameter", self.program.parameters),
                ("buffer", self.program.buffers),
            ):
                for stored in every.values():
                    if _name_in(self.program, stored.name, state_dict) is not None:
                        local = state.local(values(stored), stored)
                        with torch.no_grad():
                            state.tensors[kind, stored.name].copy_(local)

    def copy_to(self, model: nn.Module) -> None:
        """Write the trained values into `model`, an ordinary copy of the one compiled."""
        model.load_state_dict(self.state_dict())

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that their global norm is at most `max_norm`; the norm before."""
        totals = self._run([self._norm(state, float(norm_type)) for state in self.states])
        for state, total in zip(self.states, totals, strict=True):
            scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(_grads(state), scale)
        found: Tensor = totals[0]
        return found

    def _norm(self, state: RankState, p: float) -> RankProgram:
        """The norm of all gradients, each element counted once however many ranks hold it."""
        parts: list[Tensor] = []
        for name, stored in self.program.parameters.items():
            grad = state.parameters[name].grad
            if grad is not None:
                norm = torch.linalg.vector_norm(grad, p).double()
                copies = self.mesh.num_ranks // self.mesh.size(stored.layout.split_axes)
                parts.append(norm if math.isinf(p) else norm**p / copies)
        if not parts:
            return torch.zeros(())
        stacked = torch.stack(parts)
        local = stacked.amax() if math.isinf(p) else stacked.sum()
        reduce = "max" if math.isinf(p) else "sum"
        total: Tensor = yield Wire("all_reduce", self.mesh.names, reduce), local
        return total if math.isinf(p) else total ** (1 / p)


def launch(program: Program, **options: Any) -> Run:
    """Start a run of `program`; see `Run`."""
    return Run(program, **options)


def _signature(program: Program) -> Any:
    return (program.mode, id(program))


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _grads(state: RankState) -> list[Tensor]:
    return [p.grad for p in state.parameters.values() if p.grad is not None]


def _group(name: str, groups: Sequence[Mapping[str, Any]]) -> int:
    for i, group in enumerate(groups):
        if any(fnmatch.fnmatchcase(name, glob) for glob in group["params"]):
            return i
    return len(groups)


def _name_in(program: Program, name: str, state_dict: Mapping[str, Tensor]) -> str | None:
    """The name under which `state_dict` has a tensor: its own, or an alias."""
    aliases = [alias for alias, own in program.captured.aliases.items() if own == name]
    return next((alias for alias in (name, *aliases) if alias in state_dict), None)


def _values(
    program: Program, state_dict: Mapping[str, Tensor] | None
) -> Callable[[Stored], Tensor]:
    captured = program.captured

    def value(stored: Stored) -> Tensor:
        if state_dict is not None:
            name = _name_in(program, stored.name, state_dict)
            if name is not None:
                return state_dict[name]
        found = captured.parameters.get(stored.name)
        found = captured.buffers[stored.name] if found is None else found
        if found.device.type == "meta":
            raise RunError(
                f"`{stored.name}` is on the meta device: it has no values to start from",
                help="pass `launch(state_dict=...)`, or build the model on a real device",
            )
        return found

    return value


def _check_names(program: Program, state_dict: Mapping[str, Tensor]) -> None:
    aliases = program.captured.aliases
    wanted = set(program.model.state_dict(keep_vars=True))
    problems = [f"`{name}` is unknown" for name in state_dict if name not in aliases]
    problems += [
        f"`{name}` is missing"
        for name in sorted(wanted)
        if name in aliases and _name_in(program, aliases[name], state_dict) is None
    ]
    for name, tensor in state_dict.items():
        if name in aliases:
            own = aliases[name]
            stored = program.parameters.get(own) or program.buffers[own]
            if tuple(tensor.shape) != stored.type.shape:
                problems.append(f"`{name}` is {list(tensor.shape)}, not {list(stored.type.shape)}")
    if problems:
        raise RunError(
            "the state does not fit the model: " + "; ".join(problems[:8]),
            help="pass what `state_dict()` of the same model gives",
        )
