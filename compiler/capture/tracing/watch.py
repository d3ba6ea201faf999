"""Refuse, by name, what export would lose silently.

Export records the operators that ran. What only autograd would have seen leaves no trace in them:
the backward of a custom `autograd.Function`, a tensor's or a module's backward hook. Each was seen
giving a wrong gradient without a word, so they are watched for while the model is traced. A custom
function that is made of torch operators is traced with its backward: see `functions.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributions.dirichlet import _Dirichlet
from torch.utils.checkpoint import CheckpointFunction

from meshwright.compiler.capture.origin import current_line
from meshwright.compiler.capture.tracing.functions import traced
from meshwright.compiler.capture.tracing.patches import replaced
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph import custom


@contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """Trace `model` inside this where its gradients are wanted."""
    refuse_hooks(model)
    with ExitStack() as stack:
        for owner, name, replacement in _WATCHED:
            stack.enter_context(replaced(owner, name, replacement))
        yield


def refuse_hooks(model: nn.Module) -> None:
    """Raise if a backward hook is already on a parameter or a module."""
    for name, parameter in model.named_parameters():
        post = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if parameter._backward_hooks or post:
            _refuse_hook(f"parameter `{name}` has a gradient hook")
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            kind = type(module).__name__
            _refuse_hook(f"module `{name}` ({kind}) has a backward hook")
    if torch.nn.modules.module._global_backward_hooks:
        _refuse_hook("every module has a global backward hook")


def _apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    if function is CheckpointFunction:
        # Recomputation changes no value, and the plan says which values to keep.
        run, _, *inputs = args
        return run(*inputs)
    if function is _Dirichlet:
        return torch._sample_dirichlet(*args)
    if function.__module__.startswith("torch."):
        return _ORIGINAL_APPLY.__func__(function, *args, **kwargs)
    registered = custom.registered(function)
    if registered is not None:
        return registered(*args, **kwargs)
    return traced(function, *args, **kwargs)


def _hook(name: str) -> Callable[..., NoReturn]:
    def refuse(tensor: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_hook(f"`{name}` is called in the forward", current_line())

    return refuse


def _refuse_hook(what: str, line: str = "") -> NoReturn:
    raise CaptureError(
        f"{what}, which would be lost",
        code="hook",
        culprit=line,
        help="remove the hook, or act on the gradients after the step",
    )


def _refuse_grad(*args: Any, **kwargs: Any) -> NoReturn:
    raise CaptureError(
        "the forward asks autograd for a gradient",
        code="gradient",
        culprit=current_line(),
        help="write that gradient out as part of the forward",
    )


_ORIGINAL_APPLY: Any = torch.autograd.Function.__dict__["apply"]
_WATCHED: tuple[tuple[Any, str, Any], ...] = (
    (torch.autograd.Function, "apply", classmethod(_apply)),
    (torch.Tensor, "register_hook", _hook("register_hook")),
    (
        torch.Tensor,
        "register_post_accumulate_grad_hook",
        _hook("register_post_accumulate_grad_hook"),
    ),
    (torch.autograd.graph, "register_multi_grad_hook", _hook("register_multi_grad_hook")),
    (torch.autograd, "grad", _refuse_grad),
    (torch.autograd, "backward", _refuse_grad),
)
