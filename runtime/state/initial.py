"""Initial values for a model without any: each rank computes its own part of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

from meshwright.compiler.capture.initialisation import Initialisation
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.public import Program
from meshwright.runtime.errors import RunError
from meshwright.runtime.rank import RankProgram, RankState, Values
from meshwright.runtime.state.regions import InitialValues
from meshwright.runtime.state.start import same_constants, same_start, without_values
from meshwright.runtime.world.agreement import agree, told

_HELP = {
    "raised": "make it run on the model built on the meta device",
    "export": "write it with operators of torch and `nn.init` alone",
    "seed": "remove it: the `seed` of `launch` keys initial values, the same under every plan",
}
"""What to do instead of what to do in a forward, by code."""


def begin(
    program: Program,
    states: Sequence[RankState],
    run: Callable[[Sequence[RankProgram]], list[Any]],
    values: Values,
    seed: int,
    mapped: Container[str] = (),
    *,
    apart: bool,
) -> None:
    """Let every rank begin with the same seed and weights: those of rank 0 and, of what that has no
    values, those of the model's initialisation. `run` runs a program of each rank of this process,
    and `apart` says that there are others elsewhere."""
    for state in states:
        state.random.seed = seed
    without = without_values(program, values)
    if apart:
        (without,) = run([same_start(state, program, values, mapped) for state in states])
    if without:
        own = recorded(program)
        run([initialise(state, without, own) for state in states])


def initialise(
    state: RankState,
    names: Collection[str],
    recorded: Initialisation | RunError,
) -> RankProgram:
    """Give a rank its part of each tensor in `names`, as the model's `recorded` initialisation
    says; what that does not say, or all where recording failed on any rank, stays unset."""
    failed = recorded if isinstance(recorded, RunError) else None
    try:
        yield from agree(state, failed)
    except RunError as error:
        state.unset = dict.fromkeys(names, error)
        return
    assert isinstance(recorded, Initialisation)
    if (yield from told(state, recorded.digest)) != recorded.digest:
        failed = RunError(
            "the model's initialisation is not that of rank 0",
            help="build the same model on every rank",
        )
    yield from agree(state, failed)
    constants = yield from same_constants(state, recorded.constants)
    own = replace(recorded, constants=constants)
    initial = InitialValues(own, state.random.seed, state.device)
    state.unset = dict.fromkeys(initial.missing(names))
    for (kind, name), held in state.tensors.items():
        if name in names and name not in state.unset:
            initial.fill(state.stored[kind, name], held, state.mesh, state.coords)
            state.assigned((kind, name))


def recorded(program: Program) -> Initialisation | RunError:
    """How the model of `program` initialises itself, or why that is not known."""
    assert program.initialise is not None
    try:
        return program.initialise(program.model)
    except CaptureError as error:
        where = (f"at: {error.culprit}",) if error.culprit else ()
        # Most capture forwards, and say so.
        problem, help = (text.replace("the forward", "it") for text in (error.problem, error.help))
        return RunError(
            f"the model's initialisation cannot be recorded: {problem}",
            where=where,
            help=f"{_HELP.get(error.code, help)}, or pass `launch(state_dict=...)`",
        )


def check_set(program: Program, unset: Mapping[str, RunError | None]) -> None:
    """Raise `RunError` that names the parameters and buffers without values."""
    if not unset:
        return
    name, error = next(iter(unset.items()))
    more = f" (and {len(unset) - 1} more)" if len(unset) > 1 else ""
    if error is not None:
        raise error
    path = name.rpartition(".")[0]
    module = type(program.model.get_submodule(path)).__name__
    raise RunError(
        f"`{name}`{more} has no values: the model was built on the meta device, and nothing in it "
        "initialises this",
        help=f"define `reset_parameters` in `{module}`, or pass `launch(state_dict=...)` that has "
        "it, or load a checkpoint first",
    )
