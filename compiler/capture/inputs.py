"""Name a model's inputs, and flatten the arguments of a call to the tensors that a graph takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.ir import TensorType
from meshwright.dsl.errors import spelled

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_MOST_DIFFERENCES = 6
_MOST_VALUES = 10_000


@dataclass(frozen=True)
class InputSpec:
    """The inputs of one captured call, by name, in the order of the graph's arguments.

    Positional and keyword arguments are treated alike: both are bound to the parameters of the
    model's `forward` first. What is not a tensor is part of the program, and must not change.
    """

    signature: inspect.Signature
    tree: pytree.TreeSpec
    leaves: tuple[str, ...]
    """The names of all leaves, tensors and others."""
    types: dict[str, TensorType]
    """The tensors, in the order of the graph's arguments."""
    constants: dict[str, Any]
    """What is not a tensor, and the static tensors, whose values are part of the program."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.types)

    def flatten(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        types: Mapping[str, TensorType] | None = None,
    ) -> tuple[Tensor, ...]:
        """The tensors of a call in graph order.

        `types` replaces the expected types, for a caller that holds only some rows of the batch.
        Raises `CaptureError` that names every input that is missing, extra or different.
        """
        types = types or self.types
        self._check_no_lists(bind(self.signature, args, kwargs), types)
        given = dict(named_leaves(self.signature, args, kwargs)[0])
        differences = self._differences(given, types)
        if differences:
            more = len(differences) - _MOST_DIFFERENCES
            other = _of_other_dtype(given, types)
            raise CaptureError(
                "the inputs differ from those that were compiled: "
                + "; ".join(differences[:_MOST_DIFFERENCES])
                + (f"; and {more} more" if more > 0 else ""),
                code="another-dtype" if other else "",
                help=f"convert it: `.to({types[other].dtype})`"
                if other
                else "pass inputs like the example's, or compile for these too",
            )
        return tuple(given[name] for name in self.types)

    def _was(self, name: str, value: Any) -> str:
        """How the example's value differs, for an input that is not a tensor."""
        if name not in self.constants:
            return "which the example did not give"
        before = spelled(self.constants[name])
        return f"not {before}" if before != spelled(value) else "not the example's"

    def _check_no_lists(self, given: Mapping[str, Any], names: Iterable[str]) -> None:
        """Refuse lists and arrays in the place of tensors, without a look at what they hold."""
        for name in names:
            value = _at(given, name)
            if isinstance(value, Tensor) and value.is_nested:
                raise CaptureError(
                    f"`{name}` is a nested tensor",
                    code="not-a-tensor",
                    help="pad it: `torch.nested.to_padded_tensor`",
                )
            if value is not None and not isinstance(value, Tensor):
                raise CaptureError(
                    f"the inputs differ from those that were compiled: `{name}` is "
                    f"{spelled(value)}, not a tensor",
                    code="not-a-tensor",
                    help=f"pass tensors: `torch.as_tensor({name})`",
                )

    def static_values(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[str, Any], ...]:
        """What a call gives for the static tensors, to look up a program by."""
        names = [name for name, value in self.constants.items() if isinstance(value, Tensor)]
        given = dict(named_leaves(self.signature, args, kwargs)[0]) if names else {}
        return tuple(
            (name, str(value.tolist()))
            for name, value in given.items()
            if name in names and isinstance(value, Tensor)
        )

    def fixed_values(self) -> list[str]:
        """The values that are part of the program, spelled the same in every process."""
        found = []
        for name, value in self.constants.items():
            if isinstance(value, Tensor):
                found.append(f"{name}={value.dtype}{value.tolist()}")
            else:
                plain = isinstance(value, (bool, int, float, complex, str, bytes, NoneType))
                found.append(f"{name}={value!r}" if plain else f"{name}: {type(value).__name__}")
        return found

    def unflatten(self, tensors: Sequence[Tensor]) -> Arguments:
        """The arguments of `forward` with these tensors in their places."""
        found = dict(zip(self.types, tensors, strict=True))
        leaves = [found[n] if n in found else self.constants[n] for n in self.leaves]
        bound = inspect.BoundArguments(self.signature, pytree.tree_unflatten(leaves, self.tree))
        return bound.args, bound.kwargs

    def _differences(self, given: dict[str, Any], types: Mapping[str, TensorType]) -> list[str]:
        found = [f"`{name}` is missing" for name in types if given.get(name) is None]
        for name, value in given.items():
            if isinstance(value, Tensor) and isinstance(self.constants.get(name), Tensor):
                if not _same(value, self.constants[name]):
                    found.append(f"`{name}` is static and differs from the example's")
            elif isinstance(value, Tensor):
                found += _tensor_difference(name, value, types.get(name))
            elif name in types:
                found += [f"`{name}` is {spelled(value)}, not a tensor"] * (value is not None)
            elif not _same(value, self.constants.get(name)):
                found.append(f"`{name}` is {spelled(value)}, {self._was(name, value)}")
        found += [
            f"`{name}` is missing"
            + ("" if isinstance(value, Tensor) else f": it was {spelled(value)}")
            for name, value in self.constants.items()
            if name not in given and value is not None
        ]
        return found


def input_spec(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], static: Sequence[str] = ()
) -> InputSpec:
    """Read the names and types of an example off `model`'s signature.

    Raises `CaptureError` for a name in `static` that is not a tensor of the example.
    """
    signature = inspect.signature(model.forward)
    leaves, tree = named_leaves(signature, args, kwargs)
    tensors = {name: value for name, value in leaves if isinstance(value, Tensor)}
    for name in static:
        if name not in tensors:
            raise CaptureError(
                f"`static` names `{name}`, and the example has no such tensor",
                help="name one of " + ", ".join(f"`{known}`" for known in tensors),
            )
    types = {name: TensorType.of(value) for name, value in tensors.items() if name not in static}
    constants = {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in leaves
        if name not in types
    }
    _check_no_arrays(constants)
    return InputSpec(signature, tree, tuple(name for name, _ in leaves), types, constants)


def _at(given: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name of the arguments; None where there is none."""
    value: Any = given
    for part in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, (list, tuple)) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _budget_left(value: Any, budget: int) -> int:
    """The rest of `budget` after one per leaf of lists and dicts; negative if there are more."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return budget - 1
    if len(value) > budget:
        return -1
    for item in value:
        budget = _budget_left(item, budget)
        if budget < 0:
            break
    return budget


def _check_no_arrays(constants: Mapping[str, Any]) -> None:
    """Refuse arrays: other values become constants, but an array is meant as an input."""
    for name, value in constants.items():
        if hasattr(value, "__array__") and not isinstance(value, Tensor):
            raise CaptureError(
                f"the input `{name}` is a `{type(value).__name__}`, not a tensor",
                help=f"pass tensors: `torch.as_tensor({name})`",
            )


def split_example(example: Any) -> Arguments:
    """An example as `(args, kwargs)`: it is a tuple, a dict of keywords, or a pair of both."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Tensor):
        return (example,), {}
    if not isinstance(example, (tuple, list)):
        raise CaptureError(
            f"the example is a `{type(example).__name__}`",
            help="pass a tuple of positional inputs, a dict of keywords, or `(tuple, dict)`",
        )
    if len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], Mapping):
        return tuple(example[0]), dict(example[1])
    return tuple(example), {}


def bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call, by the names of the parameters of `forward`."""
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CaptureError(
            f"these inputs do not fit `forward{_short(signature)}`: {error}",
            help="pass the inputs that `forward` takes",
        ) from error


def named_leaves(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Every leaf with its dotted name: `tokens`, `batch.x`, `args.0`; `**kwargs` adds no prefix."""
    bound = bind(signature, args, kwargs)
    for name, value in bound.items():
        if _budget_left(value, _MOST_VALUES) < 0:
            raise CaptureError(
                f"the input `{name}` is {spelled(value)}, with more than {_MOST_VALUES} values",
                code="not-a-tensor",
                help=f"pass tensors: `torch.as_tensor({name})`",
            )
    leaves, tree = pytree.tree_flatten_with_path(bound)
    free = [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]
    prefix = f"{free[0]}." if free else "\0"
    return [(_name(path).removeprefix(prefix), leaf) for path, leaf in leaves], tree


def spell(type: TensorType) -> str:
    """`float32[8, 16]`, the type as an error says it."""
    return f"{str(type.dtype).removeprefix('torch.')}{list(type.shape)}"


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(_key(entry) for entry in path)


def _key(entry: Any) -> str:
    if isinstance(entry, pytree.SequenceKey):
        return str(entry.idx)
    if isinstance(entry, pytree.MappingKey):
        return str(entry.key)
    if isinstance(entry, pytree.GetAttrKey):
        return entry.name
    return str(entry)


def _tensor_difference(name: str, value: Tensor, expected: TensorType | None) -> list[str]:
    if expected is None:
        return [f"`{name}` is extra"]
    if (found := TensorType.of(value)) != expected:
        return [f"`{name}` is {spell(found)}, not {spell(expected)}"]
    return []


def _of_other_dtype(given: Mapping[str, Any], types: Mapping[str, TensorType]) -> str | None:
    """The first tensor whose dtype is not the example's, and has to be converted."""
    for name, expected in types.items():
        value = given.get(name)
        if isinstance(value, Tensor) and value.dtype != expected.dtype:
            return name
    return None


def _same(value: Any, constant: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(constant, Tensor):
        like = value.dtype == constant.dtype and value.shape == constant.shape
        return like and torch.equal(value.to(constant.device), constant)
    return value is constant or (type(value) is type(constant) and bool(value == constant))


def _short(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"
