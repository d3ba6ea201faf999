"""What a checkpoint must have to be whole, and to fit a model."""

from __future__ import annotations

from pathlib import Path

from meshwright.compiler.public import Program
from meshwright.runtime.checkpoint.files import COPY_AGAIN
from meshwright.runtime.checkpoint.manifest import Manifest
from meshwright.runtime.checkpoint.optimizer_state import OPTIMIZER
from meshwright.runtime.errors import RunError
from meshwright.runtime.weights import check_state, check_ties, stored_tensors


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
    check_ties(program, named, where)
