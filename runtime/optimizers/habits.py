"""Refuse what is done by habit to an optimizer of a run, and would give wrong numbers."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer

from meshwright.runtime.errors import RunError


def refuse_habits(optimizer: Optimizer, *, elementwise: bool) -> None:
    """From now on, raise `RunError` where the optimizer is copied or pickled, stepped by torch's
    `GradScaler`, or given the state of tensors of other shapes, if it is `elementwise`: others keep
    what they like, such as LBFGS one vector for all parameters."""
    # With this, a scaler leaves gradients to the optimizer, and tells it the scale before a step.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(_check_scaler)
    if elementwise:
        optimizer.register_load_state_dict_pre_hook(_check_shapes)
    optimizer.__reduce_ex__ = _refuse_copy  # type: ignore[method-assign]


def _refuse_copy(protocol: Any) -> NoReturn:
    raise RunError(
        "an optimizer of a run cannot be copied or pickled: it updates the shards of that run",
        help="write it with `run.save(folder, optimizer)`, or keep a copy of its `state_dict()`",
    )


def _check_scaler(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if hasattr(optimizer, "found_inf"):
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        raise RunError(
            "`GradScaler` would divide gradients by a scale that they do not have",
            help="call `optimizer.step()` without it: `precision fp16` scales by itself",
        )


def _check_shapes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Kernels would read a state of another plan as if it were of the shard, from its begin."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for place, kept in state_dict["state"].items():
        for key, value in kept.items() if place in range(len(parameters)) else ():
            shape = tuple(parameters[place].shape)
            # A factor of the second moment, as of Adafactor, has ones.
            if not isinstance(value, Tensor) or value.ndim != len(shape) or value.shape == shape:
                continue
            if 1 not in value.shape or value.numel() > parameters[place].numel():
                raise RunError(
                    f"`{key}` has shape {tuple(value.shape)}, and this rank's part of the "
                    f"parameter {shape}: it is of another plan",
                    help="write it with `run.save(folder, optimizer)`, and read it with `run.load`",
                )
