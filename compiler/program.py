"""The data of a compiled program: its graphs, their code, and how ranks hold each tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from meshwright.compiler.capture.capture import Captured
from meshwright.compiler.codegen.instructions import Instructions
from meshwright.compiler.codegen.lowering import lowered
from meshwright.compiler.codegen.overlap import overlap
from meshwright.compiler.codegen.printing import Code, printed
from meshwright.compiler.graph.ir import Graph, InputKind, Node, TensorType
from meshwright.compiler.graph.text import exact_text
from meshwright.compiler.layout.extents import Padding
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh, within
from meshwright.compiler.placing.movement import Movement
from meshwright.compiler.schedules.actions import Entries
from meshwright.compiler.schedules.balanced import Balance
from meshwright.compiler.schedules.beside import beside
from meshwright.compiler.schedules.check import check_schedule
from meshwright.compiler.schedules.links import links_of
from meshwright.compiler.schedules.tables import Table
from meshwright.compiler.schedules.transfers import Transfers
from meshwright.compiler.stages import Stage
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Precision, Stages, Statement


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank keeps something: on its device, in host memory, or on a disk, in files of the
    folder `path`."""

    to: str = "device"
    path: str | None = None

    @property
    def away(self) -> bool:
        """Whether it is not the device."""
        return self.to != "device"


STAGING_BYTES = 32 << 20
"""The most host memory through which a rank's values pass on their way to the files of a folder and
back."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Where ranks keep a parameter: its `value`, and with `update` its gradient and what an
    optimizer keeps of it. Away from the device the CPU updates it."""

    value: Place = Place()
    update: Place = Place()


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter or buffer as ranks hold it.

    `name` and `type` are the model's. `layout` is the layout in which ranks store the tensor,
    padding included (`padded_shape`), `used` the one in which operators take it, and
    `requires_grad` says whether it is trained. In a pipeline `held_at` says whose ranks hold it,
    and `kept` where: on the device or, under `offload`, in host memory or files.
    """

    name: str
    type: TensorType
    layout: Layout
    used: Layout
    requires_grad: bool
    paddings: tuple[Padding, ...] = ()
    """What is added to the model's tensor, in order: for operators, and by storage."""
    plan_line: str = ""
    """The places of the statements behind the layout."""
    held_at: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """By axis, the coordinates whose ranks hold it, in order; empty if every rank holds a part."""
    kept: Kept = Kept()
    """Where these ranks keep it."""

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The global shape, padding included: the model's where nothing is padded."""
        return self.layout.shape

    def padded(self, value: Tensor) -> Tensor:
        """A global tensor with the zeros that storage adds."""
        for padding in self.paddings:
            value = padding.added(value)
        return value

    def unpadded(self, value: Tensor) -> Tensor:
        """A global tensor as it is stored, without the entries that storage adds."""
        for padding in reversed(self.paddings):
            value = padding.cut(value)
        return value

    def held_by(self, coords: Mapping[str, int]) -> bool:
        """True if the rank at `coords` holds a part of it."""
        return within(coords, self.held_at)

    @property
    def held_text(self) -> str:
        """Where it is held: `pp=0` or `pp=0 and 3`; empty if every rank holds a part."""
        places = self.held_at.items()
        return ", ".join(f"{axis}={' and '.join(map(str, each))}" for axis, each in places)

    def num_holders(self, mesh: Mesh) -> int:
        """The number of ranks of `mesh` that hold a part of it."""
        held = math.prod(len(places) for places in self.held_at.values())
        return mesh.num_ranks // mesh.size(self.held_at) * held

    def local_bytes(self, mesh: Mesh) -> int:
        """The bytes of it that one rank of `mesh` holds, if it holds a part."""
        return math.prod(self.layout.local_shape(mesh)) * self.type.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Update:
    """What an optimizer of class `kind` keeps on one rank and needs for an update, in bytes.

    `state` is by parameter; `""` is what it keeps of none. Besides that, parameters and gradients,
    `temporaries` are what is alive at the peak of an update, by the operator that made it, and
    `beside_steps` is the most of it while a closure runs a step. `elsewhere` is the most that the
    CPU makes besides while it updates what is kept away from the device, in the first update too.
    """

    kind: str
    state: Mapping[str, int] = field(repr=False)
    temporaries: Mapping[str, int] = field(repr=False)
    beside_steps: int = 0
    elsewhere: int = 0


@dataclass(frozen=True, slots=True)
class Shared:
    """Layers that use the `parameters` of the first of them, by their names inside of a layer."""

    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    plan_line: str = ""


@dataclass(frozen=True, slots=True)
class Budgeted:
    """What the backward computes again, and what else is chosen, so that a rank stays within a
    budget of bytes.

    `statements` say it as a plan does. With them `peak` is the most bytes that a rank needs, and
    `without` what it would need if nothing were computed again or offloaded. `operations` are those
    that this costs in one microbatch: what is computed again (of what is no product, one for each
    element), and what could be computed while the device waits for activations that are elsewhere.
    `bound` is how many there must be at least, as far as that is known on paper, and `tries` how
    many choices were measured.
    """

    budget: int
    statements: tuple[str, ...]
    peak: int
    without: int
    operations: int
    bound: int
    tries: int

    @property
    def gap(self) -> float:
        """How much more is computed again than the bound, as a share of the operations."""
        return (self.operations - self.bound) / self.operations if self.operations else 0.0


@dataclass(frozen=True)
class Compiled:
    """The result of compiling a model under a plan: graphs, layouts, and their code.

    `plan` is the plan with the statements that modules carry themselves, `mesh` its axes, `device`
    the device of the code and `model` the module that was compiled, unchanged. `stages` have the
    graphs, and `table` says in which order ranks run them, and what they send one another.
    `parameters` and `buffers` say how ranks hold each tensor of the model, by name.
    """

    plan: Plan
    mesh: Mesh
    captured: Captured
    stages: tuple[Stage, ...]
    table: Table
    parameters: Mapping[str, Stored]
    buffers: Mapping[str, Stored]
    movements: tuple[Movement, ...]
    shared: tuple[Shared, ...]
    """The layers that share parameters until `Run.delink`."""
    balance: Balance | None
    """What the stages were chosen by, where the plan only says how many there are."""
    budgeted: Budgeted | None
    """What was chosen to be computed again, where the plan only has a budget."""
    notes: Mapping[Statement, str]
    """What was decided for a statement of the plan that leaves it open, and why."""
    device: torch.device
    model: nn.Module = field(repr=False)
    updated: Callable[..., Update] = field(repr=False)
    """What an update takes on this machine, given the program, a rank, and what `Run.optimizer`
    takes: a class, its groups and its options."""

    def __post_init__(self) -> None:
        check_schedule(self.stages, self.table)

    def graphs(self) -> dict[str, Graph]:
        """Every graph by name: `stage0.forward` and, in training, `stage0.backward`."""
        return {graph.name: graph for stage in self.stages for graph in stage.graphs.values()}

    @cached_property
    def instructions(self) -> tuple[Instructions, ...]:
        """The instructions of each graph, in the order of `graphs`."""
        found: list[Instructions] = []
        num_wires = 0
        paused = beside(self.table.rows, links_of(self.stages))
        for stage in self.stages:
            for phase, graph in stage.graphs.items():
                added = frozenset(stage.added(phase))
                each = lowered(graph, first_wire=num_wires, added=added)
                found.append(overlap(each, beside=(stage.number, phase) in paused))
                num_wires += len(found[-1].exchanges)
        return tuple(found)

    @cached_property
    def code(self) -> tuple[Code, ...]:
        """The generated code of each graph, in the order of `graphs`."""
        return tuple(printed(each) for each in self.instructions)

    @property
    def pipeline(self) -> tuple[str, ...]:
        """The axes over which the plan puts stages; ranks run the row of the table at their place
        along them."""
        return tuple(axis for statement in self.plan.of(Stages) for axis in statement.over)

    @cached_property
    def entries(self) -> Entries:
        """What each rank runs, sends and receives in a step, in order."""
        mesh, rows = self.mesh, self.table.rows
        places = [mesh.position(mesh.coords(rank), self.pipeline) for rank in range(mesh.num_ranks)]
        return {rank: rows[place] for rank, place in enumerate(places)}

    @cached_property
    def transfers(self) -> Transfers:
        """What stages send one another."""
        first_wire = sum(len(code.wires) for code in self.code)
        return Transfers(self.stages, self.entries, self.mesh, self.pipeline, first_wire)

    @property
    def wire_names(self) -> tuple[str, ...]:
        """The name of the value behind each wire, by number: of collectives, then of transfers."""
        names = [name for code in self.code for name in code.wire_names]
        return (*names, *self.transfers.names)

    @cached_property
    def digest(self) -> str:
        """A hash of what ranks must agree on: mesh, code, graphs, schedule, stored tensors, and
        fixed inputs.

        Values of tensors are not in it: every rank takes those of rank 0.
        """
        parts = [str(self.mesh), *(code.source for code in self.code)]
        parts += [repr(code.wires) for code in self.code]
        parts += [exact_text(graph) for graph in self.graphs().values()]
        parts += [", ".join(map(str, actions)) for _, actions in sorted(self.entries.items())]
        stored = (*self.parameters.values(), *self.buffers.values())
        parts += [repr(replace(each, plan_line="")) for each in stored]
        parts += self.captured.input_spec.fixed_values()
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @cached_property
    def apart(self) -> tuple[str, ...]:
        """The axes along which ranks hold parts of different tensors."""
        stored = (*self.parameters.values(), *self.buffers.values())
        found = {axis for each in stored for axis in each.held_at}
        return tuple(axis for axis in self.mesh.names if axis in found)

    def place(self, rank: int) -> str:
        """The coordinates of `rank` along the axes where ranks hold or run what others do not, as
        `pp=1`; empty where all ranks do the same."""
        coords = self.mesh.coords(rank)
        axes = {*self.apart, *self.pipeline}
        return ", ".join(f"{axis}={coords[axis]}" for axis in self.mesh.names if axis in axes)

    @cached_property
    def different_ranks(self) -> tuple[int, ...]:
        """The first rank of each set of those that run the same actions and hold parts of the same
        tensors."""
        found: dict[tuple[object, str], int] = {}
        for rank, entries in self.entries.items():
            found.setdefault((entries, self.place(rank)), rank)
        return tuple(found.values())

    @property
    def imagined_on(self) -> torch.device:
        """The device of the fake tensors on which calls and updates are tried out: torch makes them
        for any GPU of CUDA without one, and has the CPU in place of other devices."""
        return self.device if self.device.type in ("cpu", "cuda") else torch.device("cpu")

    @cached_property
    def updates(self) -> dict[int, Update]:
        """What AdamW takes on each of `different_ranks`; nothing where none is trained."""
        return self.updates_of(torch.optim.AdamW, (), {}) if self.trains else {}

    def updates_of(
        self, kind: object, groups: Sequence[object], options: Mapping[str, object]
    ) -> dict[int, Update]:
        """What an optimizer takes on each of `different_ranks`."""
        updated = self.updated
        return {rank: updated(self, rank, kind, groups, options) for rank in self.different_ranks}

    @property
    def mode(self) -> str:
        """The mode of the compilation: `"train"`, `"eval"` or `"infer"`."""
        return self.captured.mode

    def inputs(self) -> tuple[Node, ...]:
        """The arguments of the model, in the order in which it takes them, each once."""
        taken = (node for stage in self.stages for node in stage.forward.inputs)
        found = {node.args: node for node in taken if node.args[0] == InputKind.ARGUMENT}
        return tuple(found[n.args] for n in self.captured.graph.inputs if n.args in found)

    @property
    def scaled(self) -> bool:
        """Whether gradients are computed times a loss scale."""
        return any(statement.dtype == "fp16" for statement in self.plan.of(Precision))

    @property
    def trains(self) -> bool:
        """Whether a step computes gradients."""
        return any(stage.trains for stage in self.stages)
