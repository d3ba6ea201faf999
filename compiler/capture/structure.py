"""The structure of a model, which a run keeps in place of the model and its weights.

A run compiles for other modes and shapes long after its launch. Capture reads no weight, so a copy
on the meta device will do, and a model that nobody else holds can be freed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor, nn

from meshwright.compiler.capture.aliases import named_tensors
from meshwright.compiler.capture.capture import Captured
from meshwright.compiler.capture.state import modules_in_training, tensor_attributes
from meshwright.compiler.errors import CaptureError

_NO_COPY = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What copying raises for an object that cannot be copied."""


class Structure:
    """A model, held weakly, and `copy`, which has its modules on the meta device.

    Of a model that cannot be copied (a lock, an open file among its attributes), `copy` is the
    model itself, which is then kept.
    """

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self._model = ref(model)
        self._training, self._frozen = captured.training, captured.frozen
        tensors = named_tensors(model)
        self._tensors = {
            name: ref(tensor) for name, tensor in (tensors.parameters | tensors.buffers).items()
        }
        self.copy = _on_meta(model)

    @contextmanager
    def as_compiled(self) -> Iterator[nn.Module]:
        """The model itself while anyone else holds it and has not changed it, else the copy.

        Inside, its modules are in the mode, and its parameters trained or not, as when it was
        compiled.
        """
        model = self._model()
        if model is None or not _alike(model, self.copy):
            model = self.copy
        training, frozen = modules_in_training(model), named_tensors(model).frozen
        _set_flags(model, self._training, self._frozen)
        try:
            yield model
        finally:
            _set_flags(model, training, frozen)

    def check(self, model: nn.Module, constants: Mapping[str, Tensor]) -> None:
        """Raise `CaptureError` if `constants`, captured from `model`, have values of the original.

        A function that closes over one of its modules still calls that module in a copy.
        """
        if model is not self.copy:
            return
        alive = {
            tensor.untyped_storage().data_ptr(): name
            for name, found in self._tensors.items()
            if (tensor := found()) is not None and not tensor.is_meta and tensor.numel()
        }
        for constant in constants.values():
            name = alive.get(constant.untyped_storage().data_ptr())
            if name is not None:
                raise CaptureError(
                    f"a function in the model keeps `{name}` as it was before training",
                    code="closure",
                    help="keep the model for as long as the run, and with it all that is compiled",
                )


def _set_flags(model: nn.Module, training: frozenset[str], frozen: frozenset[str]) -> None:
    for name, module in model.named_modules():
        module.training = name in training
    for name, parameter in named_tensors(model).parameters.items():
        if parameter.requires_grad == (name in frozen):
            parameter.requires_grad_(name not in frozen)


def _alike(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same modules, tensors of the same types, and equal settings."""
    ours, theirs = dict(model.named_modules()), dict(other.named_modules())
    return (
        ours.keys() == theirs.keys()
        and named_tensors(model).aliases == named_tensors(other).aliases
        and all(
            type(module) is type(theirs[name]) and _settings(module) == _settings(theirs[name])
            for name, module in ours.items()
        )
    )


def _settings(module: nn.Module) -> dict[str, object]:
    """The plain values that a module's forward may read, and the types of its own tensors."""
    plain = (bool, int, float, str, type(None))
    found: dict[str, object] = {
        name: value
        for name, value in vars(module).items()
        if type(value) in plain and name != "training"
    }
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        found[f"tensor {name}"] = None if tensor is None else (tensor.shape, tensor.dtype)
    return found


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values, whose other attributes are copies too; the model if it has no copy."""
    memo: dict[int, object] = {id(tensor): tensor for _, tensor in tensor_attributes(model)}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = _like(tensor)
    try:
        found = copy.deepcopy(model, memo)
    except _NO_COPY:
        return model
    same = named_tensors(found).aliases == named_tensors(model).aliases
    return found if same else model


def _like(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor, device="meta", requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(meta, requires_grad=tensor.requires_grad)
    return meta.requires_grad_(tensor.requires_grad)
