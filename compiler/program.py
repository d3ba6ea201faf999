"""A compiled program: the graphs of every stage, what is stored where, and what moves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from meshwright.compiler.capture import Captured
from meshwright.compiler.codegen import Code, generate
from meshwright.compiler.draft import Padding
from meshwright.compiler.emit import Movement
from meshwright.compiler.ir import Graph, MeshOp, Node, TensorType
from meshwright.compiler.layout import Layout
from meshwright.compiler.ledger import Comm, ledger
from meshwright.compiler.memory import Memory, memory
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.text import graph_text

if TYPE_CHECKING:
    from torch import nn

    from meshwright.compiler.explain import Explanation
    from meshwright.dsl.plan import Plan


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter or buffer as ranks hold it: `layout` is that of the padded tensor."""

    name: str
    type: TensorType
    layout: Layout
    requires_grad: bool
    padding: Padding | None = None
    plan_line: str = ""
    """The places of the statements behind the layout."""

    @property
    def padded_shape(self) -> tuple[int, ...]:
        return self.layout.shape


@dataclass(frozen=True, slots=True)
class Step:
    """What runs in one step: the forward and, in training, the backward."""

    forward: Graph
    backward: Graph | None = None

    @property
    def graphs(self) -> dict[str, Graph]:
        found = {self.forward.name: self.forward}
        if self.backward is not None:
            found[self.backward.name] = self.backward
        return found


@dataclass(frozen=True)
class Program:
    """A model compiled under a plan. Nothing here needs a device or a process group.

    `print(program.graph("stage0.forward"))` is the rewritten graph; `comm()` every collective;
    `show()` a summary; `launch()` a run.
    """

    plan: Plan
    mesh: Mesh
    captured: Captured
    step: Step
    parameters: Mapping[str, Stored]
    buffers: Mapping[str, Stored]
    movements: tuple[Movement, ...]
    device: torch.device
    model: nn.Module = field(repr=False)
    recompile: Callable[..., Program] = field(repr=False)
    """Compile the same model and plan for another input signature or mode."""
    launcher: Callable[..., Any] = field(repr=False)

    def graphs(self) -> dict[str, Graph]:
        """Every graph, by name."""
        return self.step.graphs

    def graph(self, name: str) -> GraphText:
        """One graph; it prints as text. Raises `KeyError` naming the graphs there are."""
        graphs = self.graphs()
        if name not in graphs:
            raise KeyError(f"no graph `{name}`: there are {', '.join(graphs)}")
        return GraphText(graphs[name])

    def comm(self) -> Comm:
        """Every collective of a step, with axes, bytes, module and plan line."""
        return self._comm

    @cached_property
    def _comm(self) -> Comm:
        return ledger(self.graphs().values())

    def memory(self) -> Memory:
        """Bytes a rank: parameters, gradients, optimizer state, saved activations, peak."""
        return memory(self)

    @cached_property
    def code(self) -> tuple[Code, ...]:
        """The generated code of the forward and, in training, the backward."""
        forward = generate(self.step.forward)
        if self.step.backward is None:
            return (forward,)
        return forward, generate(self.step.backward, first_wire=len(forward.wires))

    @cached_property
    def digest(self) -> str:
        """A hash of all that ranks must agree on: code, layouts, mesh and inputs."""
        parts = [str(self.mesh), *(code.source for code in self.code)]
        parts += [repr(code.wires) for code in self.code]
        parts += [graph_text(graph) for graph in self.graphs().values()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def mode(self) -> str:
        return self.captured.mode

    def show(self, *, local: bool = False) -> None:
        """Print the mesh, layouts, collectives, bytes and memory as tables."""
        from meshwright.compiler.show import show

        show(self, local=local)

    def to_json(self) -> dict[str, object]:
        """What `show` prints, and every collective, as plain dictionaries and lists."""
        from meshwright.compiler.summary import summarise

        return {**summarise(self).to_json(), "collectives": self.comm().to_json()}

    def explain(self, name: str) -> Explanation:
        """Why a module, parameter or input is laid out as it is, and what moves because of it.

        It prints as text. Raises `PlanError` for a name that the model does not have.
        """
        from meshwright.compiler.explain import explain

        return explain(self, name)

    def launch(self, **options: Any) -> Any:
        """Start a run: under torchrun this process is one rank; otherwise every rank runs here.

        See `meshwright.runtime.run.Run`.
        """
        return self.launcher(self, **options)

    def inputs(self) -> tuple[Node, ...]:
        """The arguments of the model, in graph order."""
        return tuple(n for n in self.step.forward.inputs if n.args[0] == "argument")

    def buckets(self) -> dict[str, Node]:
        """The flat gradient buffers of the backward, by node."""
        graph = self.step.backward
        nodes = () if graph is None else graph.nodes
        return {node.name: node for node in nodes if node.op == MeshOp("bucket")}


@dataclass(frozen=True, slots=True)
class GraphText:
    """A graph that prints as text; `text(local=True)` shows what one rank holds."""

    graph: Graph

    def text(self, *, local: bool = False) -> str:
        return graph_text(self.graph, local=local)

    def __str__(self) -> str:
        return self.text()
