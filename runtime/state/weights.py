"""The values of parameters and buffers, from the model or from a dictionary by name."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from meshwright.compiler.program import Stored
from meshwright.compiler.public import Program
from meshwright.runtime.errors import RunError, check_kind
from meshwright.runtime.rank import Values


class MappedTensors(dict[str, Tensor]):
    """Tensors by name whose memory is that of files: only the parts that are used are read."""


def stored_tensors(program: Program) -> Iterator[tuple[str, Stored]]:
    """Every parameter and buffer with its kind, in one order on all ranks."""
    for stored in program.parameters.values():
        yield "parameter", stored
    for stored in program.buffers.values():
        yield "buffer", stored


def state_names(program: Program) -> list[str]:
    """The names in the model's `state_dict()`: all aliases, without buffers it does not keep."""
    aliases = program.captured.aliases
    return [name for name in program.model.state_dict(keep_vars=True) if name in aliases]


def transient_names(program: Program) -> tuple[str, ...]:
    """The buffers that the model's `state_dict()` does not keep."""
    kept = {program.captured.aliases[name] for name in state_names(program)}
    return tuple(name for name in program.buffers if name not in kept)


def name_in(program: Program, name: str, given: Mapping[str, object]) -> str | None:
    """The name under which `given` has a tensor: its own, or an alias."""
    if name in given:
        return name
    aliases = program.captured.aliases
    return next((alias for alias, own in aliases.items() if own == name and alias in given), None)


def values_of(program: Program, state_dict: Mapping[str, Tensor] | None) -> Values:
    """The global values: those of `state_dict` where it has them, else those the model has now.

    What the model was compiled without is a tensor on the meta device.
    """
    held = held_tensors(program.model)
    aliases: dict[str, list[str]] = {}
    for name, own in program.captured.model_aliases.items():
        aliases.setdefault(own, []).append(name)

    def value(stored: Stored) -> Tensor:
        name = None if state_dict is None else name_in(program, stored.name, state_dict)
        if state_dict is not None and name is not None:
            return state_dict[name].detach()
        found = held.get(stored.name)
        if found is None or found.shape != stored.type.shape:
            raise RunError(
                f"the model has no `{stored.name}` of shape {list(stored.type.shape)} any more",
                help="compile the model as it is now",
            )
        if found.is_meta and (program.initialise is None or not _compiled(program, stored).is_meta):
            raise RunError(
                f"`{stored.name}` is on the meta device: it has no values to start from",
                help="pass `launch(state_dict=...)` that has it, or build the model elsewhere",
            )
        for alias in aliases[stored.name]:
            if not _equal(held.get(alias), found):
                raise RunError(
                    f"`{stored.name}` and `{alias}` were one tensor when the model was compiled",
                    help="tie them again, or compile the model as it is now",
                )
        return found.detach()

    return value


def _compiled(program: Program, stored: Stored) -> Tensor:
    """The tensor of the model that was compiled."""
    captured = program.captured
    return (captured.parameters | captured.buffers)[stored.name]


def mapped_names(program: Program, state_dict: Mapping[str, Tensor] | None) -> frozenset[str]:
    """The parameters and buffers whose values a dictionary has in files."""
    if not isinstance(state_dict, MappedTensors):
        return frozenset()
    aliases = program.captured.aliases
    return frozenset(aliases[name] for name in state_dict if name in aliases)


def _equal(a: Tensor | None, b: Tensor) -> bool:
    if a is None or a is b:
        return a is b
    return (a.device, a.dtype) == (b.device, b.dtype) and not a.is_meta and torch.equal(a, b)


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a model has now, under all their names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def check_state(
    program: Program,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    *,
    needed: Iterable[str],
    help: str = "use one that `state_dict()` or `save` of the same model gave",
) -> None:
    """Raise a `RunError` that names the `needed` tensors that are missing, and those that are
    unknown or of another shape."""
    aliases = program.captured.aliases
    problems = [f"`{name}` is unknown" for name in shapes if name not in aliases]
    problems += [
        f"`{name}` is missing" for name in needed if name_in(program, aliases[name], shapes) is None
    ]
    for name, shape in shapes.items():
        if name in aliases:
            own = aliases[name]
            stored = program.parameters.get(own) or program.buffers[own]
            if shape != stored.type.shape:
                problems.append(f"`{name}` is {list(shape)}, not {list(stored.type.shape)}")
    if problems:
        prefix = _prefix(shapes, aliases)
        help = f"remove `{prefix}` from the beginning of the names" if prefix else help
        raise RunError(f"{where} does not fit the model: {listed(problems)}", help=help)


def _prefix(names: Iterable[str], known: Container[str]) -> str:
    """The prefix that a wrapper of the model adds to each name: `module.` of DDP, `_orig_mod.`."""
    names = list(map(str, names))
    for prefix in ("module.", "_orig_mod.", "model."):
        if names and all(
            name.startswith(prefix) and name.removeprefix(prefix) in known for name in names
        ):
            return prefix
    return ""


def listed(problems: Sequence[str]) -> str:
    """The first of these, and how many more there are."""
    more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
    return "; ".join(problems[:6]) + more


def check_values(program: Program, state_dict: Mapping[str, Tensor], where: str) -> None:
    """Raise a `RunError` that names tensors without values, and those whose kind of number is not
    the model's."""
    aliases = program.captured.aliases
    problems = []
    for name, tensor in state_dict.items():
        own = aliases.get(name, "")
        stored = program.parameters.get(own) or program.buffers.get(own)
        if tensor.layout is not torch.strided:
            problems.append(f"`{name}` is {tensor.layout}")
        elif tensor.is_meta:
            problems.append(f"`{name}` is on the meta device")
        elif stored is not None and kind_of(tensor.dtype) != kind_of(stored.type.dtype):
            problems.append(f"`{name}` is {tensor.dtype}, not {stored.type.dtype}")
    if problems:
        raise RunError(
            f"{where} does not fit the model: {listed(problems)}",
            help="pass dense tensors with values, of the kind of number that the model has",
        )


def check_lossless(tensors: Iterable[tuple[str, Tensor, torch.dtype]], where: str) -> None:
    """Raise a `RunError` that names tensors whose values overflow in another type; rounding is not
    a loss."""
    problems = [
        f"`{name}` has values that `{dtype}` cannot hold"
        for name, tensor, dtype in tensors
        if tensor.dtype != dtype and _loses(tensor.detach(), dtype)
    ]
    if problems:
        raise RunError(f"{where}: {listed(problems)}", help="use a type that holds them")


def _loses(tensor: Tensor, dtype: torch.dtype) -> bool:
    cast = tensor.to(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return bool((cast.isfinite() != tensor.isfinite()).any())
    return not torch.equal(cast.to(tensor.dtype), tensor)


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is just its values; a `DTensor` is one part of many."""
    if is_traceable_wrapper_subclass(tensor):
        return False
    return type(tensor) is Tensor or isinstance(tensor, nn.Parameter)


def kind_of(dtype: torch.dtype) -> tuple[bool, bool]:
    """The kind of number of a type: one is converted to others of its kind alone."""
    return dtype.is_floating_point, dtype.is_complex


def shapes_of(state_dict: Mapping[str, Tensor], where: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a dictionary. Raises `RunError` for anything but tensors."""
    help = "pass a dictionary from names to tensors"
    check_kind(state_dict, Mapping, where, help)
    for name, tensor in state_dict.items():
        check_kind(tensor, Tensor, f"`{name}` in {where}", help)
        if not _plain(tensor):
            kind = type(tensor).__name__
            raise RunError(f"`{name}` in {where} is a `{kind}`, not a plain tensor", help=help)
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
