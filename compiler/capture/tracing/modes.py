"""Trace in another form what export would lose: modes and shortcuts that leave no operator.

`inference_mode` is traced as `no_grad`, which it equals for gradients; `x.data` as `x.detach()`;
an autocast that is off as a mark on what runs inside (export loses a `no_grad` there), one that is
on is refused.
A batch norm that averages over all batches counts them in a tensor, not in Python. Packed sequences
are refused where they are made. A `native_dropout` that is not told whether to drop out does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import _VF, Tensor, fx
from torch.fx.traceback import annotate
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from meshwright.compiler.capture.origin import current_line, is_user
from meshwright.compiler.capture.tracing import generators
from meshwright.compiler.capture.tracing.patches import replaced
from meshwright.compiler.errors import CaptureError


@contextmanager
def translated_modes() -> Iterator[None]:
    """Trace a model inside this."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(_SaidToTrain())
        for owner, name, replacement in (*_TRANSLATED, *generators.TRANSLATED):
            stack.enter_context(replaced(owner, name, replacement))
        yield


class _SaidToTrain(TorchFunctionMode):
    """Says `train=True` to `native_dropout` where None means it: a stand-in would take the result
    for the operand, and so would the trace."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _NATIVE_DROPOUT:
            args, kwargs = _said_to_train(*args, **(kwargs or {})), {}
        return function(*args, **(kwargs or {}))


def _said_to_train(input: Tensor, p: float, train: bool | None) -> tuple[Tensor, float, bool]:
    return input, p, train is None or train


def _enter_inference(self: Any) -> None:
    self.meshwright_previous = torch.is_grad_enabled()
    if self.mode:
        torch._C._set_grad_enabled(False)


def _exit_inference(self: Any, *error: object) -> None:
    torch._C._set_grad_enabled(self.meshwright_previous)


def _enter_autocast(self: Any) -> Any:
    if self._enabled:
        raise CaptureError(
            f'the forward opens `torch.autocast("{self.device}")`',
            code="autocast",
            culprit=current_line(),
            help="remove it; to compute in bfloat16, write `precision bf16` in the plan",
        )
    self.meshwright_mark = annotate({_OFF: True})
    self.meshwright_mark.__enter__()
    return self


def _exit_autocast(self: Any, *error: object) -> None:
    self.meshwright_mark.__exit__(None, None, None)


def is_off(node: fx.Node) -> bool:
    """Whether a node of the exported program ran where the model had turned autocast off."""
    return _OFF in node.meta.get("custom", {})


_OFF = "meshwright autocast off"
_CALLER = 2
"""How many frames up a property finds its caller: the frame between is the patch's."""


def _data(tensor: Tensor) -> Tensor:
    if is_user(sys._getframe(_CALLER).f_code.co_filename):
        # The alias says that autograd does not see what is written here.
        alias: Tensor = torch.ops.aten.alias.default(tensor)
        return alias.detach()
    return _ORIGINAL_DATA.__get__(tensor)  # type: ignore[no-any-return]  # a C descriptor


def _set_data(tensor: Tensor, value: Tensor) -> None:
    if is_user(sys._getframe(_CALLER).f_code.co_filename):
        raise CaptureError(
            "the forward assigns to `.data` of a tensor",
            code="hidden write",
            culprit=current_line(),
            help="compute a new tensor, or copy into a buffer under `torch.no_grad()`",
        )
    _ORIGINAL_DATA.__set__(tensor, value)


def _pack(*args: Any) -> Any:
    raise CaptureError(
        "`pack_padded_sequence` makes sizes that depend on the values of its lengths",
        code="data dependent",
        culprit=current_line(),
        help="run the network on the padded batch and mask what follows the end of each row; take "
        "last states, and rows in reverse for a second direction, with `gather`",
    )


def _batch_norm(norm: Any, x: Tensor) -> Tensor:
    """`_BatchNorm.forward`; `momentum=None` means one over the number of batches, a tensor here."""
    counted = norm.training and norm.running_mean is not None and norm.momentum is None
    if not counted:
        return _ORIGINAL_NORM(norm, x)  # type: ignore[no-any-return]  # as the original
    norm._check_input_dim(x)
    norm.num_batches_tracked.add_(1)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    with torch.no_grad():
        share = norm.num_batches_tracked.to(x.dtype).reciprocal()
        norm.running_mean.add_((x.mean(dims) - norm.running_mean) * share)
        norm.running_var.add_((x.var(dims) - norm.running_var) * share)
    weight, bias = norm.weight, norm.bias
    return functional.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)


_NATIVE_DROPOUT: frozenset[Any] = frozenset(
    (
        torch.native_dropout,
        torch.ops.aten.native_dropout,
        torch.ops.aten.native_dropout.default,
    )
)
_ORIGINAL_NORM: Any = _BatchNorm.forward
_ORIGINAL_DATA: Any = torch._C.TensorBase.__dict__["data"]
_TRANSLATED: tuple[tuple[Any, str, Any], ...] = (
    (torch.inference_mode, "__enter__", _enter_inference),
    (torch.inference_mode, "__exit__", _exit_inference),
    (torch.autocast, "__enter__", _enter_autocast),
    (torch.autocast, "__exit__", _exit_autocast),
    (_BatchNorm, "forward", _batch_norm),
    (_VF, "_pack_padded_sequence", _pack),
    (torch.Tensor, "data", property(_data, _set_data)),
)
