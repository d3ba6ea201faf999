"""What a forward does with the values of tensors in Python, which no graph records.

A check that only raises is skipped; a value that is known is read; a mask that is known becomes the
indices that it picks. There is a warning for what happens once, while the model is captured, and
never in a step (`print`, a value that goes into a list).
"""

from __future__ import annotations

import builtins
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from meshwright.compiler.capture.inputs import spell
from meshwright.compiler.capture.origin import current_line, is_user
from meshwright.compiler.capture.tracing.checks import check_at
from meshwright.compiler.capture.tracing.literals import Literals
from meshwright.compiler.capture.tracing.patches import replaced
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.ir import TensorType

_SAID: set[tuple[str, int, str]] = set()
"""What has been warned of, by file and line."""


class OnlyOnce:
    """The lines that do something while a model is captured, and nothing in a step."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int, str], None] = {}

    def note(self, what: str, frame: FrameType | None) -> None:
        """Remember the user's line that `frame` is at or was called from."""
        while frame is not None and not is_user(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None:
            text = (
                f"{what} in a forward runs once, while the model is captured, and not in a step: "
                "to see a value in every step, name it in `outputs`"
            )
            self._found[frame.f_code.co_filename, frame.f_lineno, text] = None

    def note_changed(self, module: nn.Module, name: str) -> None:
        """Remember that a module's forward changed a number that it holds."""
        code = getattr(type(module).forward, "__code__", None)
        if code is not None:
            text = (
                f"the forward of `{type(module).__name__}` changes `{name}`, a number, which a "
                "step does not: make it a buffer"
            )
            self._found[code.co_filename, code.co_firstlineno, text] = None

    def warn(self) -> None:
        """Warn of each line, at that line, once in all captures."""
        for file, line, text in [each for each in self._found if each not in _SAID]:
            _SAID.add((file, line, text))
            warnings.warn_explicit(text, UserWarning, file, line)


@contextmanager
def values_in_python(once: OnlyOnce, known: Sequence[Tensor] = ()) -> Iterator[None]:
    """Trace a model inside this; the values of `known`, and what follows from them, are read."""
    with ExitStack() as stack:
        literals = stack.enter_context(Literals())
        if known:
            stack.enter_context(_Known(known))
        stack.enter_context(_KnownIndices(literals))
        for owner, name in _TRUTHS:
            stack.enter_context(replaced(owner, name, _truth(getattr(owner, name), literals)))
        for name in ("item", "tolist", "__float__", "__int__", "__index__"):
            stack.enter_context(replaced(Tensor, name, _number(name, once, literals)))
        stack.enter_context(replaced(Tensor, "__format__", _format(once)))
        stack.enter_context(replaced(Tensor, "data_ptr", _data_ptr))
        for owner in (Tensor, torch):
            stack.enter_context(replaced(owner, "masked_select", _masked_select(literals)))
        stack.enter_context(replaced(builtins, "print", _print(once)))
        yield


_TRUTHS: tuple[tuple[Any, str], ...] = (
    (Tensor, "__bool__"),
    (torch.SymBool, "__bool__"),
    (Tensor, "equal"),
    (Tensor, "allclose"),
    (torch, "equal"),
    (torch, "allclose"),
    (torch, "is_nonzero"),
)


def _truth(original: Callable[..., Any], literals: Literals) -> Callable[..., Any]:
    """`original`, but where a check asks for an unknown value, the answer that raises nothing."""

    def ask(*args: Any, **kwargs: Any) -> Any:
        values = [literals.value(a) if isinstance(a, Tensor | torch.SymBool) else a for a in args]
        if all(value is not None for value in values):
            with _disable_current_modes():
                return original(*values, **kwargs)
        check = check_at(sys._getframe(1)) if not all(_is_constant(arg) for arg in args) else None
        if check is not None and check.passing is not None:
            return check.passing
        return original(*args, **kwargs)

    return ask


def _number(name: str, once: OnlyOnce, literals: Literals) -> Callable[..., Any]:
    original = getattr(Tensor, name)

    def read(self: Tensor) -> Any:
        value = literals.value(self)
        if value is not None:
            with _disable_current_modes():
                return original(value)
        frame = sys._getframe(1)
        if is_user(frame.f_code.co_filename) and check_at(frame) is None:
            once.note(f"`{name.strip('_')}`", frame)
        return original(self)

    return read


class _Known(TorchFunctionMode):
    """Computes what only known tensors go into, instead of tracing it."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {id(tensor): tensor for tensor in known}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if not given or not all(id(tensor) in self.known for tensor in given):
            return function(*args, **kwargs)
        with _disable_current_modes():
            result = function(*args, **kwargs)
        made = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]
        self.known |= {id(tensor): tensor for tensor in made}
        return result


class _KnownIndices(TorchFunctionMode):
    """Replaces known tensors in an index by numbers and by the indices that a mask picks.

    This is a mode and not a patch: a class that once had a `__getitem__` of its own counts as a
    sequence from then on, and `torch.tensor([torch.tensor(3)])` would fail.
    """

    def __init__(self, literals: Literals) -> None:
        super().__init__()
        self.literals = literals

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in ("__getitem__", "__setitem__"):
            tensor, index, *value = args
            args = (tensor, _known_index(index, self.literals), *value)
        return function(*args, **(kwargs or {}))


def _known_index(index: Any, literals: Literals) -> Any:
    places = index if isinstance(index, tuple) else (index,)
    found = tuple(part for place in places for part in _places(place, literals))
    same = len(found) == len(places) and all(a is b for a, b in zip(found, places, strict=True))
    return index if same else found


def picked_by_a_mask(line: str) -> CaptureError:
    """The error for a lookup under a mask whose values only a step has."""
    return CaptureError(
        "`x[mask]` is as long as the mask has true elements",
        code="data dependent",
        culprit=line,
        help="use `torch.where(mask, x, 0)`; make a mask that never changes in `__init__`, as a "
        "plain attribute, not a buffer",
    )


def _places(place: Any, literals: Literals) -> tuple[Any, ...]:
    """The indices that a known mask picks, or a known number; any other index as it is."""
    if isinstance(place, slice):
        ends = (place.start, place.stop, place.step)
        found = tuple(_places(end, literals)[0] for end in ends)
        return (place if found == ends else slice(*found),)
    value = literals.value(place)
    if value is None or (value.dim() > 0 and value.dtype is not torch.bool):
        return (place,)
    with _disable_current_modes():
        return tuple(value.nonzero(as_tuple=True)) if value.dim() else (value.item(),)


def _masked_select(literals: Literals) -> Callable[..., Any]:
    original = torch.masked_select

    def select(input: Tensor, mask: Tensor, **out: Any) -> Tensor:
        value = literals.value(mask)
        if out or value is None:
            return original(input, mask, **out)
        shape = torch.broadcast_shapes(input.shape, mask.shape)  # type: ignore[no-untyped-call]
        with _disable_current_modes():
            places = value.expand(shape or (1,)).nonzero(as_tuple=True)
        return input.expand(shape or (1,))[places]

    return select


def _print(once: OnlyOnce) -> Callable[..., None]:
    original = builtins.print

    def say(*args: Any, **kwargs: Any) -> None:
        once.note("`print`", sys._getframe(1))
        original(*args, **kwargs)

    return say


def _format(once: OnlyOnce) -> Callable[[Tensor, str], str]:
    original: Any = Tensor.__format__

    def written(self: Tensor, format: str) -> str:
        if not isinstance(self, FakeTensor):
            return str(original(self, format))
        once.note("formatting a tensor", sys._getframe(1))
        return f"<{spell(TensorType.of(self))}>"

    return written


def _data_ptr(self: Tensor) -> int:
    if isinstance(self, FakeTensor) and is_user(sys._getframe(1).f_code.co_filename):
        raise CaptureError(
            "the forward asks where a tensor lies in memory",
            code="memory",
            culprit=current_line(),
            help="compare tensors with `is`, or their values",
        )
    found: int = _DATA_PTR(self)
    return found


def _is_constant(value: Any) -> bool:
    """Whether the truth of an argument is known without a value that only a step has."""
    if isinstance(value, FakeTensor):
        return value.constant is not None
    if isinstance(value, torch.SymBool):
        return value.node.is_constant() or bool(value.node.has_hint())
    return True


_DATA_PTR: Any = Tensor.data_ptr
