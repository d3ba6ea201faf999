"""Capture how a model initialises itself, as a graph from nothing to its parameters and buffers.

A model that is built on the meta device has no values; those that its constructor drew are lost.
Its modules still know how they are initialised, each by a function of its own:

    reset_parameters()     torch's modules, and many written like them; also `_reset_parameters`
    init_weights()         a model with all that is in it; `initialize_weights` of Hugging Face
    _init_weights(module)  one module of many: applied to all in a model, as `Module.apply` does

They run here as a constructor would run them, a module after those inside it, so that what a model
says of a layer counts, and not the layer's own default. They run on stand-ins, and nothing is drawn
or allocated: the writes that they make are recorded.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compiler.capture.aliases import named_tensors
from meshwright.compiler.capture.capture import traced
from meshwright.compiler.capture.convert import Converter
from meshwright.compiler.capture.fakes import Fakes
from meshwright.compiler.capture.foreign import only_capture_errors
from meshwright.compiler.capture.inputs import input_spec
from meshwright.compiler.capture.outputs import OutputKey
from meshwright.compiler.capture.state import put_back
from meshwright.compiler.capture.tracing.generators import draws_noticed
from meshwright.compiler.capture.tracing.patches import ALONE
from meshwright.compiler.capture.tracing.values import OnlyOnce
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.ir import Graph, OutputKind
from meshwright.compiler.graph.text import exact_text


@dataclass(frozen=True)
class Initialisation:
    """What a model gives its parameters and buffers: the outputs of `graph`, each by its first
    name. What nothing writes to is not among them."""

    graph: Graph
    constants: dict[str, Tensor]

    @property
    def digest(self) -> str:
        """A hash of the graph, which ranks must agree on."""
        return hashlib.sha256(exact_text(self.graph).encode()).hexdigest()


def capture_initialisation(model: nn.Module, device: str | torch.device) -> Initialisation:
    """Record how `model` initialises itself; afterwards it is as it was.

    `device` is what factories in the graph will allocate on. Raises `CaptureError` for an
    initialisation that reads values, or fails.
    """
    named = named_tensors(model)
    assigned: list[OutputKey] = []
    wrapper = _Initialisation(model, assigned)
    with ALONE, only_capture_errors():
        spec = input_spec(wrapper, (), {}, ())
        with ExitStack() as stack:
            stack.enter_context(put_back(model, evaluating=False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(Fakes().standing_in(model))
            wrapper.ties += _registered_once(model)
            program = traced(wrapper, (), OnlyOnce())
    converter = Converter(
        program, named, spec, torch.device(device), "infer", writes_parameters=True
    )
    return Initialisation(converter.convert(assigned), converter.constants)


_OF_THE_MODULE = ("reset_parameters", "_reset_parameters")
_OF_ALL_IN_IT = ("initialize_weights", "init_weights", "_init_weights")
"""The methods that initialise a module, or also all that is in it; the first that requires no
arguments is called. In Hugging Face's `init_weights`, the first ties weights too."""

_Tie = tuple[nn.Module, str, nn.Module, str]
"""A module and the name under which it has a tensor, then those of the first that has it."""


class _Initialisation(nn.Module):
    """A module whose forward initialises `model`, and returns the tensors that were assigned anew,
    whose keys it adds to `assigned`; `ties` are what `_registered_once` gave."""

    def __init__(self, model: nn.Module, assigned: list[OutputKey]) -> None:
        super().__init__()
        self.model, self.record = model, assigned.extend
        self.ties: list[_Tie] = []

    def forward(self) -> tuple[Tensor, ...]:
        for module, name, owner, own in self.ties:
            vars(module)[name] = getattr(owner, own)
        before = _tensors(self.model)
        # Of Hugging Face: the mark of what needs no initialisation any more.
        for module in self.model.modules():
            vars(module).pop("_is_hf_initialized", None)
        with draws_noticed("the model's initialisation"):
            for module in _children_first(self.model):
                for initialise in _own(module):
                    initialise()
        found = {name: t for name, t in _tensors(self.model).items() if t is not before.get(name)}
        for name, tensor in found.items():
            old = before.get(name)
            if old is None or (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
                raise CaptureError(
                    f"the model's initialisation assigns `{name}`, which had another shape or type",
                    code="assignment",
                    help="make it with its shape and type in `__init__`",
                )
        self.record([(OutputKind.BUFFER, name) for name in found])
        return tuple(found.values())


def _registered_once(model: nn.Module) -> list[_Tie]:
    """Take tied tensors from all modules but the first that has each, and say where they were:
    torch does not functionalise writes to what it is given twice."""
    owners: dict[int, tuple[nn.Module, str]] = {}
    ties: list[_Tie] = []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                owner, own = owners.setdefault(id(tensor), (module, name))
                if (owner, own) != (module, name):
                    del table[name]
                    ties.append((module, name, owner, own))
    return ties


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _children_first(module: nn.Module, seen: set[nn.Module] | None = None) -> Iterator[nn.Module]:
    """The module and all in it, each once, in the order in which constructors end."""
    seen = set() if seen is None else seen
    if module not in seen:
        seen.add(module)
        for child in module.children():
            yield from _children_first(child, seen)
        yield module


def _own(module: nn.Module) -> Iterator[Callable[[], Any]]:
    """The functions that initialise a module, in the order in which they run."""
    own = [name for name in _OF_THE_MODULE if _num_required(module, name) == 0]
    whole = [name for name in _OF_ALL_IN_IT if _num_required(module, name) == 0]
    for name in own[:1] + whole[:1]:
        yield getattr(module, name)
    if not whole and _num_required(module, "_init_weights") == 1:
        yield partial(module.apply, module._init_weights)  # type: ignore[arg-type]


def _num_required(module: nn.Module, name: str) -> int | None:
    """The number of arguments that a method requires; None if the module does not have it, or its
    signature cannot be read."""
    method = getattr(module, name, None)
    if not callable(method) or isinstance(method, nn.Module):
        return None
    try:
        taken = inspect.signature(method).parameters.values()
    except ValueError:
        return None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(each.default is each.empty and each.kind not in variadic for each in taken)
