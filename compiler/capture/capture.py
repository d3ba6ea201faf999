"""Capture a model: its forward, and what autograd would do with it, as one graph of global types.

`torch.export` records the operators that ran. What it would lose (regions without gradients, custom
functions, hooks) is put back or refused; what it adds (checks, copies, caches) is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental import proxy_tensor

from meshwright.compiler.capture.aliases import NamedTensors, named_tensors
from meshwright.compiler.capture.convert import Converter
from meshwright.compiler.capture.exported.exact import mark_exact
from meshwright.compiler.capture.exported.mutation import detach_out_of_place, functionalised
from meshwright.compiler.capture.exported.regions import inline_regions
from meshwright.compiler.capture.exported.stops import stop_gradients
from meshwright.compiler.capture.fakes import Fakes
from meshwright.compiler.capture.foreign import only_capture_errors, quiet, sources_forgotten
from meshwright.compiler.capture.inputs import InputSpec, input_spec, split_example
from meshwright.compiler.capture.outputs import Loss, Mode, OutputKey, Wrapper
from meshwright.compiler.capture.state import modules_in_training, put_back
from meshwright.compiler.capture.tracing.functions import check_backwards
from meshwright.compiler.capture.tracing.generators import refuse_generators
from meshwright.compiler.capture.tracing.modes import translated_modes
from meshwright.compiler.capture.tracing.patches import ALONE
from meshwright.compiler.capture.tracing.shortcuts import without_texts
from meshwright.compiler.capture.tracing.values import OnlyOnce, values_in_python
from meshwright.compiler.capture.tracing.watch import watching
from meshwright.compiler.garbage import uncollected
from meshwright.compiler.graph.annotate import capturing
from meshwright.compiler.graph.ir import Graph
from meshwright.dsl.errors import plural


@dataclass(frozen=True)
class Captured:
    """A model as a graph. Tensors are the model's own; nothing was copied."""

    graph: Graph
    parameters: dict[str, Tensor]
    """Each parameter once, under the first name it has in `model.named_parameters()`."""
    buffers: dict[str, Tensor]
    constants: dict[str, Tensor]
    """Tensors that the forward makes from Python numbers, or that are held outside buffers."""
    aliases: dict[str, str]
    """The name above of each parameter and buffer, by every name that it has."""
    frozen: frozenset[str]
    """The parameters that do not require a gradient."""
    training: frozenset[str]
    """The modules that were in their training mode."""
    input_spec: InputSpec
    mode: Mode
    apart: Captured | None = None
    """What was captured, where layers share parameters by the plan that are apart in the model."""

    @property
    def model_aliases(self) -> dict[str, str]:
        """The aliases that are the model's own, and not a plan's."""
        return (self.apart or self).aliases

    def with_tensors(self, named: NamedTensors) -> Captured:
        """The same with the tensors of a copy of the model."""
        return replace(
            self,
            parameters={name: named.parameters[name] for name in self.parameters},
            buffers=named.buffers,
            apart=self.apart and self.apart.with_tensors(named),
        )

    def __repr__(self) -> str:
        return (
            f"<Captured: {plural(len(self.graph.nodes), 'node')}, "
            f"{plural(len(self.parameters), 'parameter')}, {plural(len(self.buffers), 'buffer')}, "
            f"mode {self.mode}>"
        )

    @property
    def input_names(self) -> tuple[str, ...]:
        return self.input_spec.names


def capture(
    model: nn.Module,
    example: Any,
    *,
    loss: Loss = None,
    outputs: tuple[str, ...] = (),
    static: tuple[str, ...] = (),
    mode: Mode = "train",
    device: str | torch.device = "cpu",
) -> Captured:
    """Capture `model` called on `example`: a tuple, a dict of keywords, or `(tuple, dict)`.

    `train` records the loss under the model's own training flags, `eval` the loss and `infer` every
    output in its eval mode, both without gradients. `loss` is a path into the output or a function
    of it; `outputs` are paths; `static` are inputs whose values are known. `device` is what
    factories in the graph will allocate on. Afterwards the model is as it was. Raises
    `CaptureError`, and nothing else for what a model can do wrong.
    """
    args, kwargs = split_example(example)
    named, training = named_tensors(model), modules_in_training(model)
    once = OnlyOnce()
    with ALONE, uncollected(), only_capture_errors():
        spec = input_spec(model, args, kwargs, static)
        program, returned = _export(model, spec, (args, kwargs), loss, tuple(outputs), mode, once)
    converter = Converter(program, named, spec, torch.device(device), mode)
    graph = converter.convert(returned)
    check_backwards(graph)
    once.warn()
    return Captured(
        graph,
        named.parameters,
        named.buffers,
        converter.constants,
        named.aliases,
        named.frozen,
        training,
        spec,
        mode,
    )


def _export(
    model: nn.Module,
    spec: InputSpec,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    loss: Loss,
    outputs: tuple[str, ...],
    mode: Mode,
    once: OnlyOnce,
) -> tuple[ExportedProgram, tuple[OutputKey, ...]]:
    """The functional exported program and what it returns."""
    returned: list[tuple[OutputKey, ...]] = []
    record, changed = returned.append, once.note_changed
    wrapper = Wrapper(model, spec.unflatten, loss, outputs, mode, record, changed)
    known = [value for value in spec.constants.values() if isinstance(value, Tensor)]
    fakes = Fakes()
    tensors = tuple(fakes.like(t) for t in spec.flatten(*example))
    with ExitStack() as stack:
        stack.enter_context(put_back(model, evaluating=mode != "train"))
        if mode == "train":
            stack.enter_context(watching(model))
        stack.enter_context(torch.set_grad_enabled(mode == "train"))
        stack.enter_context(fakes.standing_in(model))
        program = traced(wrapper, tensors, once, known)
    return program, returned[-1]


def traced(
    wrapper: nn.Module, tensors: tuple[Tensor, ...], once: OnlyOnce, known: Sequence[Tensor] = ()
) -> ExportedProgram:
    """The functional exported program of a module, whose tensors and arguments are stand-ins;
    `known` are real tensors, whose values may be read."""
    with ExitStack() as stack:
        stack.enter_context(translated_modes())
        stack.enter_context(values_in_python(once, known))
        stack.enter_context(capturing())
        stack.enter_context(quiet())
        stack.enter_context(sources_forgotten())
        stack.enter_context(without_texts())
        program = copy_context().run(torch.export.export, wrapper, tensors, strict=False)
    # Torch keeps the nodes of the last export, and so all of its graph, to warn of leaks in it.
    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
    refuse_generators(program)
    stopped = inline_regions(program.graph_module)
    mark_exact(program.graph)
    detach_out_of_place(program.graph)
    if torch.is_grad_enabled():
        stop_gradients(program.graph, stopped)
    with without_texts():
        return functionalised(program)
