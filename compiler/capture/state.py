"""What a forward changes in its model: buffers it assigns are outputs, the rest is put back."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compiler.capture.snapshot import Snapshot
from meshwright.compiler.capture.tracing.patches import replaced
from meshwright.compiler.errors import CaptureError


class StateBefore:
    """The tensors that a model holds before its forward runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.attributes = dict(tensor_attributes(model))
        self.numbers = list(_numbers(model))

    def changed_numbers(self) -> Iterator[tuple[nn.Module, str]]:
        """The numbers that modules hold in Python and that have changed, by module and name."""
        for module, name, value in self.numbers:
            now = vars(module).get(name, value)
            if now is not value and now != value:
                yield module, name

    def assigned(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers that were assigned since, by name; export itself would lose them.

        Raises `CaptureError` where another tensor was: the next step would not see it.
        """
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if self.parameters.get(name) is not parameter:
                _refuse(f"parameter `{name}`")
        now = dict(tensor_attributes(self.model))
        for name, tensor in self.attributes.items():
            if now.get(name) is not tensor:
                _refuse(f"tensor `{name}`")
        for name, tensor in self.model.named_buffers(remove_duplicate=False):
            before = self.buffers.get(name)
            if before is None or before is tensor:
                continue
            if (before.shape, before.dtype) != (tensor.shape, tensor.dtype):
                _refuse(f"buffer `{name}` with another shape or type")
            yield name, tensor


@contextmanager
def put_back(model: nn.Module, *, evaluating: bool) -> Iterator[None]:
    """Run a forward inside this: afterwards, all that it can change in Python is as it was before.

    With `evaluating` the model is in its eval mode meanwhile.
    """
    before, drawn = Snapshot(model), _generators()
    noted: set[str] = set()
    try:
        with ExitStack() as stack:
            for module in filter(None, map(sys.modules.get, ("random", "numpy.random"))):
                for name, draw in _draws(module):
                    noting = _noting(draw, module.__name__, noted)
                    stack.enter_context(replaced(module, name, noting))
            if evaluating:
                model.eval()
            yield
    finally:
        before.put_back()
        for stream, restore, state in drawn:
            # What another thread has drawn meanwhile is not to be drawn again.
            if stream in noted or threading.active_count() == 1:
                restore(state)


def _draws(module: Any) -> list[tuple[str, Callable[..., Any]]]:
    """The functions of a module that draw from its default stream."""
    kinds = ("Random", "RandomState")
    found = ((name, value) for name, value in vars(module).items() if "state" not in name)
    return [pair for pair in found if type(getattr(pair[1], "__self__", None)).__name__ in kinds]


def _noting(draw: Callable[..., Any], stream: str, noted: set[str]) -> Callable[..., Any]:
    def drawn(*args: Any, **kwargs: Any) -> Any:
        noted.add(stream)
        return draw(*args, **kwargs)

    return drawn


def _generators() -> list[tuple[str, Callable[[Any], Any], Any]]:
    """The streams that a forward may draw from: name, function that restores a state, and state."""
    found: list[tuple[str, Callable[[Any], Any], Any]] = [
        ("random", random.setstate, random.getstate()),
        ("torch", torch.set_rng_state, torch.get_rng_state()),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found.append(("numpy.random", numpy.random.set_state, numpy.random.get_state()))
    return found


def _numbers(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) in (int, float):
                yield module, name, value


def modules_in_training(model: nn.Module) -> frozenset[str]:
    """The names of the modules in their training mode."""
    return frozenset(name for name, module in model.named_modules() if module.training)


def tensor_attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{path}.{key}".lstrip("."), value


def _refuse(what: str) -> None:
    raise CaptureError(
        f"the forward assigns {what}, which the next step would not see",
        code="assignment",
        help="register it as a buffer of fixed shape and type",
    )
