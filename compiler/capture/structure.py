"""The structure of a model, which a run keeps in place of the model and its weights.

A run compiles for other modes and shapes long after its launch. Capture reads no weight, so a copy
on the meta device will do, and a model that nobody else holds can go.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from weakref import ref

import torch
from torch import Tensor, nn

from meshwright.compiler.capture.aliases import named_tensors
from meshwright.compiler.capture.state import tensor_attributes
from meshwright.compiler.errors import CaptureError

_NO_COPY = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What copying an object raises that has no copy."""


class Structure:
    """A model, held weakly, and `copy`, which has its modules on the meta device.

    Of a model that cannot be copied (a lock, an open file among its attributes), `copy` is the
    model itself, which is then kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        tensors = named_tensors(model)
        self._tensors = {
            name: ref(tensor) for name, tensor in (tensors.parameters | tensors.buffers).items()
        }
        self.copy = _on_meta(model)

    def model(self) -> nn.Module:
        """The model itself while anyone else holds it, then the copy."""
        model = self._model()
        return self.copy if model is None else model

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


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values, whose other attributes are copies too; the model if it has none."""
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
