"""A compiled program: the graphs of every stage, what is stored where, and what moves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from meshwright.compiler.capture import Captured
from meshwright.compiler.codegen.printing import Code, generate
from meshwright.compiler.graph.ir import Graph, MeshOp, Node, TensorType
from meshwright.compiler.graph.text import size_text
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.emit import Movement
from meshwright.compiler.report.ledger import Comm, ledger
from meshwright.compiler.report.listing import exact_text, graph_html, graph_text
from meshwright.compiler.report.memory import Memory, memory
from meshwright.dsl.errors import plural

if TYPE_CHECKING:
    from torch import nn

    from meshwright.compiler.report.explain import Explanation
    from meshwright.dsl.plan import Plan


@dataclass(frozen=True, slots=True)
class Padding:
    """A parameter stored with more entries than the model has: `dim` is `size` of `padded`."""

    dim: int
    size: int
    padded: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter or buffer as ranks hold it.

    `name` and `type` are the model's, `layout` is that of the tensor with its padding
    (`padded_shape`), and `requires_grad` says whether it is trained.
    """

    name: str
    type: TensorType
    layout: Layout
    requires_grad: bool
    padding: Padding | None = None
    plan_line: str = ""
    """The places of the statements behind the layout."""

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The global shape with the rows that make it divide; the model's where none are needed."""
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
    """A model compiled under a plan. Made by `meshwright.compile`.

    Nothing here needs a device or a process group but `launch`. `plan` is the plan with what
    modules carry of their own, `mesh` its axes, `device` what is compiled for and `model` the
    module that was compiled, untouched. `parameters` and `buffers` say how ranks hold each
    tensor of the model, by name.
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

    def __repr__(self) -> str:
        comm, peak = self.comm(), size_text(self.memory().peak)
        return (
            f"<Program: {type(self.model).__name__} under {self.plan.source.name}, "
            f"mode {self.mode}, device {self.device.type}, mesh {self.mesh}; "
            f"{plural(len(comm), 'collective')}, {size_text(comm.total_bytes())} sent per rank per "
            f"step, peak memory {peak} per rank>"
        )

    def _repr_html_(self) -> str:
        from meshwright.compiler.report.show import show_html

        return show_html(self)

    def graphs(self) -> dict[str, Graph]:
        """Every graph by name: `stage0.forward` and, in training, `stage0.backward`."""
        return self.step.graphs

    def graph(self, name: str) -> GraphText:
        """The graph called `name`, which prints as text. Raises `KeyError` with the names."""
        graphs = self.graphs()
        if name not in graphs:
            raise KeyError(f"no graph `{name}`: there are {', '.join(graphs)}")
        return GraphText(graphs[name])

    def comm(self) -> Comm:
        """Every collective of one step, with its axes, bytes, module and line of the plan."""
        return self._comm

    @cached_property
    def _comm(self) -> Comm:
        return ledger(self.graphs().values())

    def memory(self) -> Memory:
        """The bytes that one rank needs to hold, known before anything runs."""
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
        parts += [exact_text(graph) for graph in self.graphs().values()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def mode(self) -> str:
        """The mode that was compiled for: `"train"`, `"eval"` or `"infer"`."""
        return self.captured.mode

    def show(self, *, local: bool = False) -> None:
        """Print the mesh, layouts, collectives, bytes and memory as tables.

        With `local`, shapes are those that one rank holds.
        """
        from meshwright.compiler.report.show import show

        show(self, local=local)

    def to_json(self) -> dict[str, object]:
        """All that `show` prints, and every collective, as plain dictionaries and lists."""
        from meshwright.compiler.report.summary import summarise

        return {**summarise(self).to_json(), "collectives": self.comm().to_json()}

    def explain(self, name: str) -> Explanation:
        """Why the module, parameter or input `name` is laid out as it is, and what it moves.

        It prints as text; `""` is the whole model. Of a module with modules inside, it sums up
        what each rank holds and sends, and names those that count most. Raises `PlanError` for a
        name that the model does not have.
        """
        from meshwright.compiler.report.explain import explain

        return explain(self, name)

    def launch(
        self,
        *,
        seed: int = 0,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        new_shapes: str = "error",
        check_inputs: bool | int = True,
    ) -> Any:
        """Start a run and return it, a `Run`.

        Under torchrun and `meshwright run` this process is one rank, and as many must run as the
        mesh has; otherwise every rank runs in this process. All start from rank 0's weights.

        - `seed`: keys dropout and every other random number, with the number of the step; below
          2**63, and rank 0's counts. Torch's own seeds play no part in a step.
        - `state_dict`: global tensors to start from in place of the model's, under its names.
        - `new_shapes`: `"compile"` lets `Run.step` compile for inputs of other shapes than the
          example's, once for each; `"error"` refuses them.
        - `check_inputs`: compare what the processes are given, in calls 1, 2, 4, 8 and so on and
          then in every 100th; a number compares every that many calls, `False` never.

        Raises `RunError` for a wrong argument, where there are no weights to start from, where the
        number of processes is not the mesh's, or where the device is not there.
        """
        return self.launcher(
            self,
            seed=seed,
            state_dict=state_dict,
            new_shapes=new_shapes,
            check_inputs=check_inputs,
        )

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
    """A graph that prints as text, equal layers once. `graph` is the `Graph` itself."""

    graph: Graph

    def text(self, *, local: bool = False, full: bool = False) -> str:
        """The text of the graph, with global shapes and equal layers once.

        With `local`, shapes are those that one rank holds; with `full`, every layer prints.
        """
        return graph_text(self.graph, local=local, full=full)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return repr(self.graph)

    def _repr_html_(self) -> str:
        return graph_html(self.graph)
