"""The compiled program that users hold: the data of a compilation, its reports and its launch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, overload

import torch
from torch import nn

from meshwright.compiler.capture.aliases import named_tensors
from meshwright.compiler.capture.initialisation import Initialisation
from meshwright.compiler.costs.cluster import Cluster
from meshwright.compiler.costs.volume import check_convention
from meshwright.compiler.errors import CompilerError
from meshwright.compiler.graph.text import size_text
from meshwright.compiler.program import Compiled, Update
from meshwright.compiler.report.assumed import (
    Assumed,
    CostsGiven,
    counted_costs,
    equal_costs,
    given_costs,
    measured_costs,
    spread,
)
from meshwright.compiler.report.cost.cost import Cost, cost
from meshwright.compiler.report.cost.step import StepTime, modelled_costs, step_time
from meshwright.compiler.report.explain import Explanation, explain
from meshwright.compiler.report.ledger import Comm, ledger
from meshwright.compiler.report.listing import GraphText
from meshwright.compiler.report.memory.holding import Memory
from meshwright.compiler.report.memory.prediction import memories
from meshwright.compiler.report.summary import summarise
from meshwright.compiler.report.timeline import timeline
from meshwright.compiler.schedules.asked import other_table
from meshwright.compiler.schedules.simulate import Costs
from meshwright.dsl.errors import plural
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Stages

if TYPE_CHECKING:
    from meshwright.compiler.report.pipeline import PipelineSchedule


@dataclass(frozen=True, slots=True)
class Runtime:
    """What runs programs: `launch` starts a run, `measure` says what the graphs of each stage cost
    on this machine, in seconds per microbatch (None where it has no device like theirs), and
    `updated` what an optimizer takes, as `Compiled.updated`."""

    launch: Callable[..., Any]
    measure: Callable[[Program], Costs | None]
    updated: Callable[..., Update]


@dataclass(frozen=True, repr=False)
class Program(Compiled):
    """A model compiled under a plan. Made by `meshwright.compile`.

    Only `launch` needs a device or a process group. `plan` is the plan with the statements that
    modules carry themselves, `mesh` its axes, `device` the device of the code and `model` the
    module that was compiled, unchanged: `launch` takes the weights from it. `parameters` and
    `buffers` say how ranks hold each tensor of the model, by name, and `shared` which layers share
    parameters. Where the plan says how many
    stages there are, and not which, `balance` has what they were chosen `by`, the `costs` of the
    ranks along the pipeline and their `imbalance`, the greatest over the mean. Under `checkpoint
    budget=`, `budgeted` has the `statements` that were chosen, the `peak` of a rank with them and
    `without`, the `operations` that they cost in a microbatch, and the `gap` to the bound. `notes`
    has what was decided for statements that leave something open, by statement, in words.
    """

    recompile: Callable[..., Program] = field(repr=False)
    """Compile the model, or a copy of it, under the same plan for another input signature or mode:
    `recompile(model, example=..., mode=...)`."""
    compile_delinked: Callable[[Program, Plan | None], Program] | None = field(repr=False)
    """Compile the model of this program with layers that no longer share parameters; None where
    none do."""
    runtime: Runtime = field(repr=False)
    initialise: Callable[[nn.Module], Initialisation] | None = field(repr=False)
    """Record how the model initialises what was compiled without values; None where its values
    were dropped later, and are not to be drawn again."""

    def delinked(self, plan: Plan | None = None) -> Program:
        """The program of the same model with a copy of what is shared for every layer: what
        `Run.delink` continues with, to see what it needs before it is there.

        It is compiled under the same plan without `share`, or under another `plan`. Launched by
        itself it starts from the model's weights. Raises `CompilerError` where no layers share
        parameters, and `PlanError` as `meshwright.compile`.
        """
        if self.compile_delinked is None:
            raise CompilerError(
                "no layers of this program share parameters",
                help="write `share` in its plan, such as `share blocks.*`",
            )
        return self.compile_delinked(self, plan)

    def with_model(self, model: nn.Module) -> Program:
        """The same program for a copy of its model, with the tensors of the copy."""
        named, found = named_tensors(model), copy.copy(self)
        vars(found).update(model=model, captured=self.captured.with_tensors(named))
        return found

    def with_structure(self, model: nn.Module) -> Program:
        """The same program for a copy of its model without values, which are not drawn again."""
        found = self.with_model(model)
        vars(found).update(initialise=None)
        return found

    def __copy__(self) -> Program:
        found = object.__new__(type(self))
        vars(found).update(vars(self))
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self.with_model(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> NoReturn:
        raise CompilerError(
            "a program cannot be pickled: its graphs hold operators of this process",
            help="save the text of the plan and compile again; `run.save(folder)` keeps weights",
        )

    def __repr__(self) -> str:
        comm, peak = self.comm(), size_text(self.memory().peak)
        return (
            f"<Program: {type(self.model).__name__} under {self.plan.source.name}, "
            f"mode {self.mode}, device {self.device.type}, mesh {self.mesh}; "
            f"{plural(len(comm), 'collective')}, {size_text(comm.total_bytes())} sent per rank per "
            f"step, peak memory {peak} per rank>"
        )

    def _repr_html_(self) -> str:
        from meshwright.compiler.report.show import show_html  # takes rich, which few runs need

        return show_html(self)

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
        return ledger(self)

    def memory(
        self,
        kind: Callable[..., torch.optim.Optimizer] | None = None,
        *,
        groups: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> Memory:
        """The bytes that one rank needs to hold, of all the one that needs most, known before
        anything runs. It prints as tables and as a timeline of a step.

        `kind` (AdamW by default), `groups` and `options` are what `Run.optimizer` takes: it is made
        and steps as in a run, on tensors without memory, so that its state and what it needs to
        update are its own. Raises what `Run.optimizer` raises.
        """
        found = self.memories(kind, groups=groups, **options)
        return max(found.values(), key=lambda each: each.peak)

    def memories(
        self,
        kind: Callable[..., torch.optim.Optimizer] | None = None,
        *,
        groups: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> dict[str, Memory]:
        """The same for ranks that run different stages, by their coordinates: `{"pp=0": ...}`; one
        without a name where all ranks do the same. `kind`, `groups` and `options` are as for
        `memory`."""
        if kind is None and not groups and not options:
            return dict(self._memories)
        return memories(self, self.updates_of(kind or torch.optim.AdamW, groups, options))

    @cached_property
    def _memories(self) -> dict[str, Memory]:
        return memories(self)

    @overload
    def cost(
        self,
        cluster: None = None,
        *,
        names: Mapping[str, str | int] | None = None,
        convention: str = "pipelined",
    ) -> Cost: ...

    @overload
    def cost(self, cluster: str | Path | Cluster, *, convention: str = "pipelined") -> StepTime: ...

    def cost(
        self,
        cluster: str | Path | Cluster | None = None,
        *,
        names: Mapping[str, str | int] | None = None,
        convention: str = "pipelined",
    ) -> Cost | StepTime:
        """Say what a step costs: without a cluster, as formulas of what a rank sends, computes and
        holds; with one, as the time of a step by a model. Both print as tables.

        - `names`: layouts that name the dims of inputs and parameters, in addition to those of the
          plan: `{"wte": "[v, h]", "blocks.*.up": "[(4 h), h]", "blocks.*.proj": "[h, h]"}`; and
          numbers of names, as `let` gives them: `{"heads": 4}`. The batch is `b` and the sequence
          `s` unless they are named, and the number of equal blocks is `layers`. Sizes that are
          equal by chance stay apart, and those without a name stay numbers.
        - `convention`: how much collectives send: `pipelined`, as `comm` counts; `ring`, in which
          broadcasts and reductions to one rank pass whole messages from rank to rank; or `tree`, in
          which these and all-reduces go down a binomial tree, in `log2` rounds.
        - `cluster`: the path of a TOML file, the name of a description that comes with Meshwright
          (`8xh100`, `4xv100`, `laptop`) or a `Cluster`. An operator takes as long as its
          operations or the bytes that it reads and writes, whichever is more; a collective takes
          the latency of the slowest link that it spans, and what a rank sends over that link's
          bandwidth. What overlaps is as in `timeline`, and a pipeline is simulated.

        Raises `CompilerError` for a wrong name, convention or description, or one that lacks what
        the program needs, and `PlanError` for a layout that does not fit.
        """
        if cluster is None:
            return cost(self, names, convention)
        check_convention(convention)
        return step_time(self, _cluster(cluster), convention)

    def timeline(self) -> str:
        """The text of what each rank does in a step, in order, with a bar beside what runs while a
        collective is under way. In a pipeline: by graph, with what it receives and sends."""
        return timeline(self)

    def schedule(
        self,
        *,
        simulate: bool = False,
        cluster: str | Path | Cluster | None = None,
        costs: CostsGiven | None = None,
        schedule: str | None = None,
        ranks: int | None = None,
        virtual: int | None = None,
        microbatches: int | None = None,
    ) -> PipelineSchedule:
        """List what each rank of the pipeline runs, sends and receives in a step, and when.

        It prints as text: a table, a timeline, and the step time, the bubble and the activations at
        once that they come to. The timeline is of actions that all take as long, unless costs are
        known:

        - `simulate`: measure what the graphs of each stage cost on this machine, in a few steps of
          one rank per stage on inputs of the example's types, without what ranks send. Where there
          is no device like the program's, count their floating-point operations instead.
        - `cluster`: what they take on this cluster, with what ranks send; see `cost`.
        - `costs`: those of `"forward"`, `"backward"` (for inputs) and `"weight"`, each one number
          for every stage or a list of one per stage, in any unit; and, 0 by default, of `"hop"`,
          the time from a send to its arrival, and of what runs around the loop over microbatches,
          `"count"`, `"before"`, `"sum"`, `"after"` and `"results"`. With `simulate` or `cluster`,
          in place of those found.

        Ask what another schedule would come to with `schedule` (a name, or the path of a file),
        `ranks` of the pipeline, `virtual` stages on each, or `microbatches` of the same size. What
        is left out is as in the plan; stages then send values to their neighbours alone, and the
        costs of another number of stages are the plan's, spread evenly.

        Raises `CompilerError` for costs that cannot be, and `PlanError` for a schedule that cannot.
        """
        from meshwright.compiler.report import pipeline  # takes rich, which few runs need

        table, links, assumed = self.table, tuple(self.transfers.values), None
        asked = (schedule, ranks, virtual, microbatches)
        if any(each is not None for each in asked):
            table, links = other_table(table, next(iter(self.plan.of(Stages)), None), *asked)
        num_stages = len(table.holders)
        if simulate or cluster is not None:
            assumed = spread(self._assumed(cluster), num_stages)
        if costs is not None:
            assumed = given_costs(costs, num_stages, assumed)
        return pipeline.PipelineSchedule(table, links, assumed or equal_costs(num_stages))

    def _assumed(self, cluster: str | Path | Cluster | None) -> Assumed:
        """What actions cost on a cluster, or on this machine."""
        if cluster is not None:
            return modelled_costs(self, _cluster(cluster))
        times = self.runtime.measure(self)
        return measured_costs(times) if times else counted_costs(self.stages)

    def show(self, *, local: bool = False) -> None:
        """Print the mesh, layouts, collectives, bytes and memory as tables.

        With `local`, shapes are those that one rank holds.
        """
        from meshwright.compiler.report.show import show

        show(self, local=local)

    def to_json(self) -> dict[str, object]:
        """All that `show` prints, and every collective, as plain dictionaries and lists."""
        return {**summarise(self).to_json(), "collectives": self.comm().to_json()}

    def explain(self, name: str) -> Explanation:
        """Why the module, parameter or input `name` is laid out as it is, and what it moves.

        It prints as text; `""` is the whole model. For a module that contains others, it sums up
        what each rank holds and sends, and names the largest of them. Raises `PlanError` for a
        name that the model does not have.
        """
        return explain(self, name)

    def launch(
        self,
        *,
        seed: int = 0,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        new_shapes: str = "error",
        check_inputs: bool | int = True,
        check_finite: bool | int = True,
        backend: str | None = None,
    ) -> Any:
        """Start a run, and return its `Run`.

        Under torchrun and `meshwright run` this process is one rank of as many as the mesh has;
        otherwise every rank runs in this process. All start from rank 0's weights. A model on the
        meta device is initialised by its own `reset_parameters`, `init_weights` or `_init_weights`,
        of which each rank computes its part; what these leave out is an error where it is first
        needed, unless it is loaded before.

        - `seed`: keys dropout and every other random number, with the number of the step, and the
          initial weights of a model without values. It is below 2**63, and all ranks take that of
          rank 0. Torch's own seeds have no effect on a step.
        - `state_dict`: global tensors to start from in place of the model's, under its names. Of
          those that `meshwright.read_state_dict` maps from files, a rank reads only what it holds.
        - `new_shapes`: `"compile"` lets `Run.step` compile for inputs of other shapes than the
          example's, once for each; `"error"` refuses them.
        - `check_inputs`: compare what the processes are given, in calls 1, 2, 4, 8 and so on and
          then in every 100th; a number `n` compares every `n` calls, `False` never.
        - `check_finite`: stop before an update by a NaN or an infinity, and say what made it; a
          number `n` looks before every `n`th update, `False` never.
        - `backend`: `"inductor"` compiles what lies between two collectives by torch's Inductor,
          where it is first run; `"eager"` runs operator by operator, and is the default.

        Raises `RunError` for a wrong argument, if there are no weights to start from, if the
        number of processes is not the mesh's, or if the device is not there.
        """
        return self.runtime.launch(
            self,
            seed=seed,
            state_dict=state_dict,
            new_shapes=new_shapes,
            check_inputs=check_inputs,
            check_finite=check_finite,
            backend=backend,
        )


def _cluster(given: str | Path | Cluster) -> Cluster:
    return given if isinstance(given, Cluster) else Cluster.load(given)
