"""Check the arguments of `compile`: an error names the first of the wrong kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, get_args

import torch
from torch import nn

from meshwright.compiler.capture.outputs import Mode
from meshwright.compiler.errors import CaptureError
from meshwright.dsl.errors import spelled
from meshwright.dsl.plan import Plan


def check_arguments(model: Any, plan: Any, loss: Any, outputs: Any, static: Any, mode: Any) -> None:
    """Raise `CaptureError` for the first argument of the wrong kind, with what to pass instead."""
    if not isinstance(model, nn.Module):
        _refuse("the model", model, "pass an instance of an `nn.Module`")
    if (inner := _wrapped(model)) is not None:
        _refuse("the model", model, f"pass the model inside: `{inner}`")
    if not isinstance(plan, Plan):
        _refuse("the plan", plan, "read it: `Plan.parse(text)` or `Plan.load(path)`")
    if not (loss is None or isinstance(loss, str) or callable(loss)):
        _refuse("`loss`", loss, "pass a path into the model's output, or a function of it")
    if not _is_names(outputs):
        _refuse("`outputs`", outputs, 'pass a list of paths, such as `outputs=["logits"]`')
    if not _is_names(static):
        _refuse("`static`", static, 'pass a list of inputs, such as `static=["image_grid_thw"]`')
    if not isinstance(mode, str) or mode not in get_args(Mode):
        raise CaptureError(
            f"`mode` is {spelled(mode)}", help='write `mode="train"` or `mode="infer"`'
        )


def _is_names(value: Any) -> bool:
    sequence = isinstance(value, Sequence) and not isinstance(value, str)
    return sequence and all(isinstance(name, str) for name in value)


def _wrapped(model: nn.Module) -> str | None:
    """The path to the model inside a wrapper of torch's; None if `model` is not one."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "model.module"
    if hasattr(model, "_orig_mod"):  # what `torch.compile` gives
        return "model._orig_mod"
    return None


def target_device(device: Any, default: str) -> torch.device:
    """The device that is compiled for. Raises `CaptureError` for what torch does not know."""
    try:
        return torch.device(default if device is None else device)
    except (RuntimeError, TypeError):
        raise CaptureError(
            f"`device` is {spelled(device)}",
            help='write one that torch knows: `device="cpu"` or `"cuda"`',
        ) from None


def _refuse(what: str, given: Any, help: str) -> NoReturn:
    kind = "class" if isinstance(given, type) else type(given).__name__
    raise CaptureError(f"{what} is a `{kind}`", help=help)
