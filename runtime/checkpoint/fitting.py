"""What a checkpoint must have to be whole, and to fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from meshwright.compiler.public import Program
from meshwright.runtime.checkpoint.files import COPY_AGAIN
from meshwright.runtime.checkpoint.header import dtype_of
from meshwright.runtime.checkpoint.manifest import Manifest
from meshwright.runtime.checkpoint.optimizer_state import OPTIMIZER
from meshwright.runtime.errors import RunError
from meshwright.runtime.state.weights import check_state, listed, stored_tensors


def model_tensors(manifest: Manifest) -> list[str]:
    """The names of the parameters and buffers, each under the one name that it is stored by."""
    return [name for name in manifest.tensors if not name.startswith(OPTIMIZER)]


def check_names(manifest: Manifest, path: str | Path) -> None:
    """Raise `RunError` for a name without a tensor, and for a tensor without a name."""
    where = f"the checkpoint `{path}`"
    there, named = set(model_tensors(manifest)), manifest.aliases
    if lost := sorted(set(named.values()) - there):
        raise RunError(f"{where} is not whole: `{lost[0]}` is missing", help=COPY_AGAIN)
    if nameless := sorted(there - named.keys()):
        raise RunError(f"{where} is not whole: no name leads to `{nameless[0]}`", help=COPY_AGAIN)


def check_model(program: Program, manifest: Manifest, path: str | Path) -> None:
    """Raise `RunError` unless a checkpoint has the model's tensors, in their shapes."""
    check_names(manifest, path)
    where, named = f"the checkpoint `{path}`", manifest.aliases
    check_state(
        program,
        {alias: manifest.tensors[name].shape for alias, name in named.items()},
        where,
        needed=[stored.name for _, stored in stored_tensors(program)],
    )
    _check_ties(program, named, where)


def _check_ties(program: Program, given: Mapping[str, str], where: str) -> None:
    """Raise `RunError` where `given` has more than one tensor, by name, for one of the model's."""
    found: dict[str, tuple[str, str]] = {}
    for alias, name in given.items():
        own = program.captured.aliases[alias]
        other, tensor = found.setdefault(own, (alias, name))
        if tensor != name:
            shared = program.captured.model_aliases[other] != program.captured.model_aliases[alias]
            raise RunError(
                f"{where} does not fit the {'plan' if shared else 'model'}: `{other}` and "
                f"`{alias}` are one tensor {'under `share`' if shared else 'in the model'}, and "
                "two there",
                help="load it under a plan that does not let these layers share parameters"
                if shared
                else "build the model with those weights apart, as it was saved",
            )


def check_dtypes(program: Program, manifest: Manifest, path: str | Path) -> None:
    """Raise a `RunError` that names tensors of a checkpoint that are another kind of number in the
    model; from one floating-point type to another they are converted."""
    problems = []
    for alias, name in manifest.aliases.items():
        own, dtype = program.captured.aliases[alias], dtype_of(manifest.tensors[name].dtype)
        stored = program.parameters.get(own) or program.buffers[own]
        wanted = stored.type.dtype
        if dtype != wanted and not (dtype.is_floating_point and wanted.is_floating_point):
            problems.append(f"`{alias}` is {dtype}, not {wanted}".replace("torch.", ""))
    if problems:
        raise RunError(
            f"the checkpoint `{path}` has other types than the model: {listed(problems)}",
            help="build the model with the types that it was saved with",
        )
