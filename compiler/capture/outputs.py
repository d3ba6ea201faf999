"""Pick the loss and the outputs asked for out of whatever a model returns."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from meshwright.compiler.capture.inputs import spell
from meshwright.compiler.capture.state import StateBefore
from meshwright.compiler.capture.tracing.generators import draws_noticed
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.experts import reports
from meshwright.compiler.graph.ir import OutputKind, TensorType
from meshwright.dsl.errors import one_line

Mode: TypeAlias = Literal["train", "eval", "infer"]
Loss: TypeAlias = "str | Callable[[Any], Tensor] | None"
OutputKey: TypeAlias = tuple[OutputKind, str]
"""What an output is, and its name: see `Output`."""


class Wrapper(nn.Module):
    """Calls the model on flat tensors and returns flat tensors, so that caches stop nothing.

    `record` is given the keys of what comes out, in order, and `changed` each number that a module
    keeps in Python and that the forward changed; export puts attributes back.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[Sequence[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]],
        loss: Loss,
        outputs: tuple[str, ...],
        mode: Mode,
        record: Callable[[tuple[OutputKey, ...]], None],
        changed: Callable[[nn.Module, str], None],
    ) -> None:
        super().__init__()
        self.model = model
        self.call, self.loss, self.outputs, self.mode = call, loss, outputs, mode
        self.record, self.changed = record, changed

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.call(tensors)
        before = StateBefore(self.model)
        with draws_noticed(), reports() as reported:
            output = self.model(*args, **kwargs)
        found = dict(self.select(output))
        if loss := (OutputKind.LOSS, "") if reported.losses else None:
            found[loss] = sum(reported.losses, found[loss])
        found |= {(OutputKind.METRIC, name): each for name, each in reported.metrics.items()}
        for module, name in before.changed_numbers():
            self.changed(module, name)
        found |= {(OutputKind.BUFFER, name): tensor for name, tensor in before.assigned()}
        self.record(tuple(found))
        return tuple(found.values())

    def select(self, output: Any) -> Iterator[tuple[OutputKey, Tensor]]:
        """What the graph returns."""
        if self.mode != "infer":
            yield (OutputKind.LOSS, ""), pick_loss(output, self.loss)
        held = dict(tensors_of(output))
        wanted = self.outputs or (tuple(held) if self.mode == "infer" else ())
        if self.mode == "infer" and not held:
            raise CaptureError(
                f"the model returns no tensor but {describe(output)}",
                help="return a tensor, or a tuple, dict or dataclass of tensors",
            )
        for path in wanted:
            yield (OutputKind.OUTPUT, path if path != "output" else ""), _at(held, path, output)


def tensors_of(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in tuples, mappings and dataclasses, by its path: empty for a lone tensor."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Mapping):
        parts = output.items()
    elif isinstance(output, (tuple, list)):
        parts = zip(getattr(output, "_fields", range(len(output))), output, strict=True)
    elif dataclasses.is_dataclass(output):
        parts = ((key.name, getattr(output, key.name)) for key in dataclasses.fields(output))
    for key, value in parts:
        yield from tensors_of(value, f"{path}.{key}" if path else str(key))


def pick_loss(output: Any, loss: Loss) -> Tensor:
    """The scalar to differentiate; `CaptureError` where there is none, or more than one."""
    held = dict(tensors_of(output))
    if callable(loss):
        value = _called(loss, output)
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"the `loss` function returned {describe(value)}, not a tensor",
                help="return one scalar tensor from it",
            )
    elif isinstance(loss, str):
        value = _at(held, loss, output)
    else:
        value = _default_loss(held, output)
    if value.dim() or not value.is_floating_point():
        raise CaptureError(
            f"the loss is {describe(value)}, not one floating-point number",
            help="reduce it: pass `loss=lambda output: ...` that returns a 0-d tensor",
        )
    return value


def _called(loss: Callable[[Any], Any], output: Any) -> Any:
    try:
        called = loss.forward if isinstance(loss, nn.Module) else loss
        inspect.signature(called).bind(output)
    except TypeError as error:
        raise CaptureError(
            f"the `loss` function does not take the model's output alone: {one_line(str(error))}",
            help="pass a function of the output: `loss=lambda output: ...`",
        ) from None
    except ValueError:
        pass  # no signature to ask: a builtin
    return loss(output)


def describe(output: Any) -> str:
    """What an output holds, in a line: "`dict` of `logits: float32[4, 10]`"."""
    if isinstance(output, Tensor):
        return f"`{spell(TensorType.of(output))}`"
    held = [f"`{path}: {spell(TensorType.of(value))}`" for path, value in tensors_of(output)]
    if not held:
        return f"`{type(output).__name__}`"
    more = f", and {len(held) - 8} more" if len(held) > 8 else ""
    return f"`{type(output).__name__}` of {', '.join(held[:8])}{more}"


def _default_loss(held: dict[str, Tensor], output: Any) -> Tensor:
    if "loss" in held:
        return held["loss"]
    scalars = [path for path, value in held.items() if _is_scalar(value)]
    if len(scalars) == 1:
        return held[scalars[0]]
    if scalars:
        raise CaptureError(
            f"the model returns {len(scalars)} scalars and none is called `loss`: "
            + ", ".join(f"`{path}`" for path in scalars),
            help=f'choose one: pass `loss="{scalars[0]}"`, or a function of the output',
        )
    raise CaptureError(
        f"the model returns no scalar to use as the loss: {describe(output)}",
        help="give it its labels, or pass `loss=` a function of the output",
    )


def _at(held: dict[str, Tensor], path: str, output: Any) -> Tensor:
    key = "" if path == "output" and "" in held else path
    if key not in held:
        raise CaptureError(
            f"the model's output has no tensor `{path}`: it is {describe(output)}",
            help="name one of those",
        )
    return held[key]


def _is_scalar(value: Tensor) -> bool:
    return value.dim() == 0 and value.is_floating_point()
