"""A run: a program's ranks with their tensors, trained step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from meshwright.compiler.capture.aliases import named_tensors
from meshwright.compiler.program import Stored
from meshwright.compiler.public import Program
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Data
from meshwright.runtime import checkpoint
from meshwright.runtime.ambient import apart_from_caller
from meshwright.runtime.checkpoint.optimizer_state import check_owner
from meshwright.runtime.checks.copies import check_found, comparing
from meshwright.runtime.checks.finite import FiniteCheck, read_check
from meshwright.runtime.checks.same_inputs import InputCheck, read_interval
from meshwright.runtime.delinking import Made, Options, delinked
from meshwright.runtime.errors import DeadlockError, PeerError, RunError, check_kind
from meshwright.runtime.inductor import check_backend
from meshwright.runtime.inputs import Inputs, Sharder, check_leaves, data_axes, rows_of
from meshwright.runtime.optimizers.chunks import attach_updates
from meshwright.runtime.optimizers.habits import refuse_habits
from meshwright.runtime.optimizers.model_optimizers import notice_optimizers_of
from meshwright.runtime.optimizers.norms import check_norms, clipped
from meshwright.runtime.optimizers.optimizer import Groups, is_elementwise, make_optimizer
from meshwright.runtime.optimizers.rounding import Widened
from meshwright.runtime.programs import Linked, Programs, check_new_shapes
from meshwright.runtime.rank import RankProgram, RankState, Results, Values, close_stores
from meshwright.runtime.reports import Reporting, returned
from meshwright.runtime.state.gather import gathered_all
from meshwright.runtime.state.initial import begin, check_set
from meshwright.runtime.state.start import check_seed, executable_digest
from meshwright.runtime.state.state_dicts import fill, take_over, targets_in
from meshwright.runtime.state.weights import (
    check_state,
    check_values,
    mapped_names,
    shapes_of,
    state_names,
    stored_tensors,
    values_of,
)
from meshwright.runtime.stepping import Ranks, whole_step
from meshwright.runtime.transports.meshes import check_device, transport_of
from meshwright.runtime.world.agreement import agreed


class Run(Reporting):
    """A launched program: the weights of its ranks, trained step by step.

    Made by `Program.launch`. `program` is what was launched, without the model's weights, `mesh`
    its axes and `new_shapes` what was asked for. The model that was compiled is not touched: its
    `state_dict()` stays as it was, that of the run is current, and `copy_to` writes trained values
    back. Every rank calls the same methods in the same order. A run ends with `close`, at the end
    of a `with`, or with the interpreter.
    """

    def __init__(
        self,
        program: Program,
        *,
        seed: int = 0,
        state_dict: Mapping[str, Tensor] | None = None,
        new_shapes: str = "error",
        check_inputs: bool | int = True,
        check_finite: bool | int = True,
        backend: str | None = None,
    ) -> None:
        """Hold the shards of the model's weights, or of `state_dict`, and link the code.

        See `Program.launch` for the options.
        """
        check_new_shapes(new_shapes)
        check_seed(seed)
        backend = check_backend(backend, program.device)
        interval, finite = read_interval(check_inputs), read_check(check_finite)
        if state_dict is not None:
            shapes = shapes_of(state_dict, "`state_dict`")
            check_state(program, shapes, "`state_dict`", needed=())
            check_values(program, state_dict, "`state_dict`")
        values = values_of(program, state_dict)
        for _, stored in stored_tensors(program):
            values(stored)
        mapped = mapped_names(program, state_dict)

        def start() -> None:
            apart = not self.transport.has_every_rank
            begin(program, self.states, self._run, values, seed, mapped, apart=apart)

        self._begin(program, values, start, Options(new_shapes, interval, finite, backend))

    def _begin(
        self, program: Program, values: Values, start: Callable[[], None], options: Options
    ) -> None:
        """Hold the shards of these values, let every rank `start` with the same ones and the same
        seed, link the code, and watch for what goes wrong."""
        self.program, self.mesh, self.new_shapes = program, program.mesh, options.new_shapes
        self._options = options
        self.transport = transport_of(program.mesh, program.device)
        self.transport.check_same_program(executable_digest(program, options.backend))
        self.states = [RankState(program, rank, values) for rank in self.transport.ranks]
        self._input_check: InputCheck | None = None
        self._finite_check = FiniteCheck(self.states, self._run, options.finite, program.scaled)
        self._closed = False
        start()
        if options.inputs and not self.transport.has_every_rank:
            splits_data = bool(program.plan.of(Data))
            self._input_check = InputCheck(
                self.transport, self.states[0], options.inputs, splits_data=splits_data
            )
        if program.mode == "train":
            notice_optimizers_of(named_tensors(program.model).parameters)
        self._programs = Programs(program, self.states, self.transport, self._run, options.backend)
        # Without the model's weights, which go with the model.
        self.program = self._programs.launched.program
        self._saves = checkpoint.Saves(self.program, self.states, self._run)
        self._made: WeakKeyDictionary[torch.optim.Optimizer, Made] = WeakKeyDictionary()
        self._rows: tuple[Inputs, list[Sharder]] | None = None
        self._results: list[Results] = []
        """Of the last call, by rank, where every rank is here."""

    def __repr__(self) -> str:
        program, step = self.program, self.states[0].random.step
        when = "closed" if self._closed else f"after step {step}"
        here = self.transport
        where = "every rank in this process" if here.has_every_rank else f"rank {here.ranks[0]}"
        model, plan = type(program.model).__name__, program.plan.source.name
        return f"<Run: {model} under {plan}, mesh {self.mesh}, {where}, {when}>"

    def __reduce__(self) -> NoReturn:
        raise RunError(
            "a run cannot be pickled or copied: its tensors are parts, and it holds the mesh",
            help="keep it with `run.save(folder, optimizer)`, or its weights: `run.state_dict()`",
        )

    # -- training -----------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward and the backward of one global batch, and add to the gradients.

        `args` and `kwargs` are what the model takes, with the example's shapes and types, the same
        on every rank; each rank takes its rows. Returns the loss, a 0-d tensor without history (so
        there is no `backward` to call), or `(loss, *outputs)` where the program was compiled with
        `outputs`, which are global. The same on every rank; does not wait for the device. Gradients
        are views of buffers that the next step overwrites once they have been set to None. Raises
        `RunError` for inputs unlike the example's, unless `new_shapes` says to compile. Inputs that
        differ between ranks are a `MismatchError`, here or in the next call.
        """
        linked, tensors = self._find("train", args, kwargs)
        return returned(self._execute("step", linked, tensors))

    def step_local(self, *args: Any, **kwargs: Any) -> Any:
        """As `step`, given only this rank's rows of the inputs that are under `data`.

        `args` and `kwargs` have n / `data_ranks` rows for a global batch of n: rows `data_slice(n)`
        of it. Ranks with one `data_rank` pass the same rows. What is returned is of the global
        batch. Where every rank is in this process, that is one part: the whole batch.
        Raises `RunError` for other numbers of rows than the example's.
        """
        if self.transport.has_every_rank:
            return self.step(*args, **kwargs)
        self._check_usable("train")
        if self._rows is None:
            inputs = Inputs(self.program, rows=True)
            self._rows = inputs, inputs.sharders(self.states[0].coords, self.states[0].device)
        inputs, sharders = self._rows
        help = "pass the rows `data_slice(n)` of a batch like the example's"
        tensors = inputs.flatten(args, kwargs, help)
        ranks = [(self._programs.launched.ranks[0][0], sharders)]
        return returned(self._execute("step_local", self._programs.launched, tensors, ranks))

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of one global batch in the model's eval mode, without gradients.

        `args` and `kwargs` are as for `step`, but of any shape: a program is compiled at the first
        call and for each new shape. Returns what `step` returns, with the current weights. Raises
        `PlanError` for a batch that does not divide.
        """
        linked, tensors = self._find("eval", args, kwargs)
        return returned(self._execute("evaluate", linked, tensors))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs for one global batch in its eval mode, without a loss.

        `args` and `kwargs` are what the model takes, of any shape; labels that it can do without
        may be left out. Returns global tensors, the same on every rank: one, or a dictionary by
        path (`"logits"`, `"hidden_states.0"`), of `outputs` alone where the program was compiled
        with them, so what the model returns without labels must have these paths too. Raises
        `PlanError` for a batch that does not divide.
        """
        linked, tensors = self._find("infer", args, kwargs)
        found = self._execute("forward", linked, tensors)
        named = {output.name: value for output, value in found.items()}
        return named[""] if list(named) == [""] else named

    def _execute(
        self,
        method: str,
        linked: Linked,
        tensors: Sequence[Tensor],
        ranks: Ranks = (),
    ) -> Results:
        check_set(self.program, self.states[0].unset)
        check = self._input_check
        axes = data_axes(self.program) if method == "step_local" else ()
        if check is not None:
            check.before(method, linked.input_names, tensors, axes)
        ranks, training = ranks or linked.ranks, method in ("step", "step_local")
        if training:
            check_leaves(linked.input_names, tensors)
        begun = self._finite_check.begin(linked.program, ranks, tensors) if training else None
        self._forget()
        found = whole_step(self._run, ranks, tensors, linked.wire_names, training=training)
        if training:
            self._finite_check.end(begun, next(iter(found[0].values())))
        if check is not None:
            check.after(method, linked.input_names, tensors, axes)
        else:
            self._results = found if len(found) > 1 else []
        return self._reported(found[0])

    def _run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        self._check_usable(self.program.mode)
        if self._input_check is not None:
            self._input_check.settle()
        with apart_from_caller(self.program.device.type), torch.no_grad():
            return self.transport.run(programs, names)

    # -- programs by input signature ----------------------------------------------------------

    def _find(
        self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Linked, Sequence[Tensor]]:
        """The program for these inputs, compiled if that is allowed, and the inputs in order."""
        found = None if self._closed else self._programs.matched(mode, args, kwargs)
        if found is None:
            self._check_usable(mode)
            found = self._programs.launched_for(mode, args, kwargs, self.new_shapes)
        if found is None:
            if self._input_check is not None:
                self._input_check.settle()
            found = self._programs.compiled(mode, args, kwargs)
        return found

    def _check_usable(self, mode: str) -> None:
        if self._closed:
            raise RunError("this run is closed", help="launch the program again")
        if mode == "train" and self.program.mode != mode:
            raise RunError(
                f"the program was compiled with `mode={self.program.mode!r}`: it has no gradients",
                help=f"compile it with `mode={mode!r}`",
            )

    # -- data ---------------------------------------------------------------------------------

    @property
    def data_ranks(self) -> int:
        """The number of parts that the batch is read in: 1 where every rank is in this process."""
        if self.transport.has_every_rank:
            return 1
        return self.mesh.size(data_axes(self.program))

    @property
    def data_rank(self) -> int:
        """The part, counted from 0, that this process reads; what a `DistributedSampler` wants."""
        if self.transport.has_every_rank:
            return 0
        return self.mesh.position(self.states[0].coords, data_axes(self.program))

    def data_slice(self, num_rows: int) -> slice:
        """The rows of a global batch of `num_rows` that `step_local` takes here.

        Raises `RunError` for a number of rows that does not divide.
        """
        return rows_of(num_rows, self.data_ranks, self.data_rank)

    # -- parameters ---------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """The local shards; on the virtual mesh those of every rank, one rank after the other.

        What looks at all gradients together, as `torch.nn.utils.clip_grad_norm_` does, sees parts
        and copies here, and finds another norm than the model's: use `clip_grad_norm_` of the run.
        """
        for _, parameter in self.named_parameters():
            yield parameter

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The local shards with the model's names; on the virtual mesh names repeat by rank."""
        for state in self.states:
            yield from state.parameters.items()

    def optimizer(
        self,
        kind: Callable[..., torch.optim.Optimizer],
        *,
        groups: Groups = (),
        **options: Any,
    ) -> torch.optim.Optimizer:
        """An optimizer over the local shards: `run.optimizer(torch.optim.AdamW, lr=3e-4)`.

        `kind` is a class of `torch.optim` or one like them, `options` are its keywords. `groups`
        are its parameter groups, whose `"params"` are selectors as in plans: the first that matches
        counts, and a last group has the rest. Torch's learning-rate schedulers work on it.
        Classes with a `fused` kernel for the device use it, unless options say how to compute.
        Raises `RunError` for options that the class does not take, and for classes that look along
        a dim that is split (Muon, Adafactor), or at all tensors together (LBFGS) where this process
        has more than one rank or the plan offloads any; classes that are not known to be
        elementwise are tried out first.
        Raises `PlanError` for a selector that matches nothing.
        """
        widened = Widened(self.states, self.program)
        with apart_from_caller(self.program.device.type), widened:
            found = make_optimizer(self.program, self.named_parameters(), kind, groups, options)
        attach_updates(found, self.states, widened)
        refuse_habits(found, elementwise=is_elementwise(self.program, found))
        self._finite_check.attach(found)
        self._made[found] = Made(kind, options)
        return found

    @property
    def loss_scale(self) -> float:
        """The factor in gradients while `precision fp16` computes them; 1 elsewhere."""
        return self._finite_check.scaler.value

    @property
    def num_skipped(self) -> int:
        """The number of updates skipped so far because a gradient overflowed.

        Those before a checkpoint that was loaded count too.
        """
        return self._finite_check.scaler.num_skipped

    def gradients(self) -> dict[str, Tensor]:
        """Global gradients under every name of each parameter; those without one are left out.

        Gathered on every rank, so every rank calls it.
        """
        trained = [s for s in self.program.parameters.values() if s.requires_grad]
        return self._gather(trained, lambda state, s: state.parameters[s.name].grad)

    def state_dict(self) -> dict[str, Tensor]:
        """Global parameters and buffers under the model's own names, gathered on every rank.

        A model built like the one compiled takes it with its own `load_state_dict`.
        """
        found = self._everything()
        return {name: found[name] for name in state_names(self.program)}

    def _everything(self) -> dict[str, Tensor]:
        check_set(self.program, self.states[0].unset)
        kinds = {stored.name: kind for kind, stored in stored_tensors(self.program)}
        stored = [stored for _, stored in stored_tensors(self.program)]
        return self._gather(stored, lambda state, s: state.tensors[kinds[s.name], s.name])

    def _gather(
        self, stored: Sequence[Stored], value: Callable[[RankState, Stored], Tensor | None]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._run(
            [gathered_all(stored, value, state) for state in self.states]
        )[0]
        aliases = self.program.captured.aliases
        return {alias: found[name] for alias, name in aliases.items() if name in found}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over global tensors, as `state_dict` gives them; all ranks those of rank 0.

        Raises `RunError` naming what in `state_dict` is missing, unknown or of another shape.
        """
        same = self.transport.has_every_rank
        self._run([take_over(self.program, state, state_dict, same=same) for state in self.states])

    def copy_to(self, model: nn.Module) -> None:
        """Write the trained values into `model`, the one compiled or a copy of it.

        Every rank calls it. Raises `RunError` for a model with other names or shapes, or without
        values of its own.
        """
        targets = self._run(
            [
                agreed(state, lambda: targets_in(self.program, model), "copy_to")
                for state in self.states
            ]
        )[0]
        found = self._everything()
        self._run([fill(state, targets, found) for state in self.states])

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that their global norm is at most `max_norm`.

        Returns the norm before, a 0-d tensor, the same on every rank. `norm_type` is 2, another
        positive number, or `float("inf")`. Pad entries and copies on multiple ranks count once, as
        in the whole model. Raises `RunError` for a norm that cannot be.
        """
        check_norms(max_norm, norm_type)
        clips = [clipped(state, self.program, max_norm, float(norm_type)) for state in self.states]
        norm: Tensor = self._run(clips)[0]
        self._finite_check.clipped(norm)
        return norm

    # -- checks, checkpoints and the end ------------------------------------------------------

    def check(
        self, optimizer: torch.optim.Optimizer | None = None, *, tolerance: float = 0.0
    ) -> None:
        """Compare what multiple ranks hold copies of: weights, buffers and gradients; with
        `optimizer` its state and options; on the virtual mesh the last call's results too.

        Copies are equal to the bit unless something is wrong; `tolerance` allows for operators
        that are not deterministic on the device. Raises `MismatchError` that names each tensor that
        differs, the ranks, and by how much.
        """
        check_kind(tolerance, (int, float), "`tolerance`", "pass a number")
        if optimizer is not None:
            check_owner(self.states, optimizer)
        self._check_usable(self.program.mode)
        with apart_from_caller(self.program.device.type):
            programs = comparing(self.program, self.states, optimizer, self._results, tolerance)
        check_found(self._run(programs)[0], self.states[0].rank)

    def save(
        self,
        path: str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        extra: dict[str, Any] | None = None,
        keep: int | None = 3,
        wait: bool = True,
    ) -> None:
        """Write a checkpoint into the folder `path`, which every rank must reach.

        It has the parameters and buffers, the seed, the numbers of steps and updates, and the loss
        scale of float16; with `optimizer`, its state and its groups' options. Not in it:
        schedulers, and how far a loader has come. Those go into `extra`, plain values that `load`
        returns (numbers, texts, lists, tuples, dictionaries): `extra={"epoch": 3, "scheduler":
        scheduler.state_dict()}`.

        The checkpoint is a subfolder `step-120`, named by the number of calls of `step` (and
        `step-120-2` where that is there). It gets its name once it is whole and on the disk. Then
        those before the newest `keep` are removed; None keeps all.

        Without `wait`, this returns once everything has been copied into CPU memory, and the copies
        are written while the run goes on. The next `save` or `load`, `wait_saved` and `close` wait
        until they are whole.

        Any plan for this model can `load` it. Every rank passes the same options, or `extra` on
        rank 0 alone. Raises `RunError` on every rank where they differ or any rank cannot write,
        here or where a call waits for an earlier save; the run can go on.
        """
        check_set(self.program, self.states[0].unset)
        self._saves.save(path, optimizer, extra=extra, keep=keep, wait=wait)

    def wait_saved(self) -> None:
        """Wait for the checkpoint that `save(..., wait=False)` writes, if it is not whole yet.

        Raises the `RunError` of that save on every rank, once.
        """
        self._saves.finish("wait_saved")

    def load(
        self,
        path: str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        missing_ok: bool = False,
    ) -> dict[str, Any]:
        """Take over a checkpoint, which any plan for this model wrote.

        `path` is the folder that was given to `save`, for the newest checkpoint in it, or that of
        one checkpoint, such as `"folder/step-120"`. Returns the `extra` of `save`, or an empty
        dictionary. With `missing_ok`, nothing happens where there is no checkpoint at all, not even
        a damaged one, or one in a subfolder that was renamed.

        With `optimizer`, its state and its options are taken over too, but for those that say how
        this process computes (`foreach`, `fused`, `capturable`, `differentiable`). Make its
        schedulers before or after.

        Nothing in the files is executed. A rank reads what it is to hold, and checks all of that
        before anything is changed, in CPU memory as large as what it holds (the optimizer's state
        on its device). Raises `RunError` on every rank, with all as it was, where the checkpoint is
        damaged or incomplete, or where names, shapes, groups or options are not those of this run;
        its text says which. Floating-point numbers of another dtype are converted to this run's.
        """
        self._saves.finish("load")
        found: dict[str, Any] = self._run(
            checkpoint.load(self.program, self.states, path, optimizer, missing_ok=missing_ok)
        )[0]
        return found

    # -- layers that share parameters ---------------------------------------------------------

    def delink(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        plan: Plan | None = None,
        state: str = "copy",
    ) -> tuple[Run, Any]:
        """Go on with a copy of what is shared under `share` for every layer.

        Returns another run and, in place of `optimizer`, which `Run.optimizer` made, another
        optimizer of its class; every rank calls it. They go on where these end: with equal
        parameters and buffers, the numbers of steps and updates, random numbers and loss scale, and
        parameter groups with their options as they are now. Of what the optimizer keeps of a shared
        parameter every layer has a copy or, with `state="reset"`, nothing. Gradients are left
        behind: delink after an update. Give the state of a scheduler to one over the new optimizer.

        The new program is that of the same plan without `share`, or of another `plan`, of any mesh
        with as many processes; see `Program.delinked`.

        This run ends, and so do its optimizers: each of their methods raises `RunError` from then
        on. The end of a `with` around this run closes the new one. Raises `RunError` for a program
        without shared layers or a wrong argument, and `PlanError` as `meshwright.compile`, with
        everything as it was.
        """
        self._check_usable("train")
        self._saves.finish("delink")
        return delinked(self, optimizer, plan, state)

    def close(self) -> None:
        """Leave the mesh. Afterwards whatever would run something raises `RunError`.

        Raises the `RunError` of a save that nobody has waited for yet.
        """
        if self._closed:
            return
        try:
            self._saves.finish("close")
        finally:
            self._close()

    def _close(self) -> None:
        self._closed = True
        try:
            if self._input_check is not None:
                # Peers that are gone already do not concern a rank that has finished.
                with contextlib.suppress(PeerError, DeadlockError):
                    self._input_check.settle()
        finally:
            close_stores(self.states)
            self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A `with` keeps this method of the class with which it began; that of a run which was
        # delinked inside is another now.
        type(self)._leave(self, error)

    def _leave(self, error: BaseException | None) -> None:
        """End what a `with` around this run began."""
        if error is not None and not self._closed:
            self._closed = True
            try:
                self.transport.close(error)
            finally:
                self._saves.leave()
        self.close()


def launch(program: Program, **options: Any) -> Run:
    """Start a run of `program`; see `Run`."""
    check_device(program.device)
    with apart_from_caller(program.device.type):
        return Run(program, **options)
