"""Notice an optimizer over the parameters of a model that was launched: it would change nothing.

A run trains shards of its own, so the model's parameters get no gradients, and torch's optimizers
pass over those without a word. Parameters and optimizers are held weakly, and optimizers of other
models are looked at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from meshwright.runtime.errors import RunError

_launched: Any = WeakIdKeyDictionary()
"""The parameters of models that were launched, and their names."""
_strangers: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
"""Optimizers that hold none of them, and how many models were launched when that was found."""
_num_launches = 0


def notice_optimizers_of(parameters: Mapping[str, Tensor]) -> None:
    """From now on, an optimizer over these parameters raises `RunError` at a step that finds none
    of them with a gradient."""
    global _num_launches
    if not _num_launches:
        register_optimizer_step_pre_hook(_check)
    _num_launches += 1
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            _launched[parameter] = name


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _strangers.get(optimizer) == _num_launches:
        return
    ours = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in _launched
    ]
    if not ours:
        _strangers[optimizer] = _num_launches
    elif all(parameter.grad is None for parameter in ours):
        kind = type(optimizer).__name__
        more = f" and {len(ours) - 1} more" if len(ours) > 1 else ""
        raise RunError(
            f"this `{kind}` changes nothing: it holds parameters of the model that was compiled, "
            "and a run trains shards of its own",
            where=(f"without a gradient: `{_launched[ours[0]]}`{more}",),
            help=f"make it with `run.optimizer({kind}, ...)`",
        )
