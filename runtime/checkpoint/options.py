"""An optimizer's options and numbers: written as JSON, and checked before an optimizer gets them.

Text for a learning rate would fail steps later, or not at all. So a value of a checkpoint is taken
over only if it is of the kind that the optimizer has there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from meshwright.runtime.errors import RunError

OWN_CHOICE = ("foreach", "fused", "capturable", "differentiable")
"""Options that say how this process computes, not what: they stay as they are here."""
_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
"""Options that torch's schedulers add to those of an optimizer."""
_SAME_OPTIONS = "make the optimizer with the options that it was saved with, or load without it"
DAMAGED = "load another checkpoint, or load without `optimizer`"


def written(value: Any, what: str) -> Any:
    """An option or a number as JSON can hold it. Raises `RunError` that names `what` it is."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [written(item, what) for item in value]
    if isinstance(value, float) and math.isnan(value):
        raise RunError(
            f"{what} is nan, which no checkpoint can be resumed with",
            help="set it to a number, or save without the optimizer",
        )
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    raise RunError(
        f"{what} is a `{type(value).__name__}`, which a checkpoint cannot hold",
        help="save without the optimizer",
    )


def checked_options(own: Mapping[str, Any], saved: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The options of `saved` that the group `own` takes over, each of the kind that it has there.

    Raises a `RunError` that names an option that is unknown, missing or of another kind; `place`
    says for it which group that is.
    """
    names = own.keys() - {"params", *_OF_SCHEDULERS}
    for name in sorted(saved.keys() - own.keys() - {"names", *_OF_SCHEDULERS}):
        raise RunError(
            f"the checkpoint has an option `{name}`{place}, which this optimizer does not have",
            help=_SAME_OPTIONS,
        )
    for name in sorted(names - saved.keys()):
        raise RunError(
            f"the checkpoint lacks the option `{name}`{place} of this optimizer",
            help=_SAME_OPTIONS,
        )
    taken: dict[str, Any] = {}
    for name, value in saved.items():
        what = f"the checkpoint's option `{name}`{place}"
        if name in OWN_CHOICE:
            check_kind_of(value, False if value is not None else None, what)
        elif name != "names":
            check_kind_of(value, own.get(name, 0.0), what)
            taken[name] = value
    return taken


def check_kind_of(value: Any, own: Any, what: str) -> None:
    """Raise `RunError` unless a saved `value` is of the kind of number or text that `own` is."""
    found, wanted = _kind(value), _kind(own)
    if found != wanted:
        raise RunError(f"{what} is {_spell(value, found)}, not {wanted}", help=_SAME_OPTIONS)
    if isinstance(value, list):
        for item, own_item in zip(value, own, strict=True):
            check_kind_of(item, own_item, what)
    elif isinstance(value, float) and not math.isfinite(value) and value != own:
        raise RunError(f"{what} is {value}", help=DAMAGED)
    elif isinstance(own, Tensor) and not own.is_floating_point() and isinstance(value, float):
        raise RunError(f"{what} is {value}, not a whole number", help=_SAME_OPTIONS)


def put(own: Any, value: Any) -> Any:
    """A checked value in the form of the one it replaces; a tensor is written to."""
    if isinstance(own, Tensor):
        return own.fill_(value)
    if isinstance(own, (list, tuple)):
        items = [put(each, item) for each, item in zip(own, value, strict=True)]
        return tuple(items) if isinstance(own, tuple) else items
    return value


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor" if value.dim() else _kind(value.item())
    if isinstance(value, bool):
        return "`True` or `False`"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return "a text"
    return "`None`" if value is None else f"a `{type(value).__name__}`"


def _spell(value: Any, kind: str) -> str:
    text = repr(value)
    if isinstance(value, (bool, str)):
        return f"`{text}`" if len(text) <= 40 else f"a text of {len(text) - 2} characters"
    return text if isinstance(value, (int, float)) and len(text) <= 40 else kind
