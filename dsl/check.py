"""Checks that need no model: missing parts, and statements that contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import TypeAlias

from meshwright.dsl import statements as s
from meshwright.dsl.errors import PlanError, plural
from meshwright.dsl.layouts import format_axes
from meshwright.dsl.names import axis_twice
from meshwright.dsl.selectors import Selector

_ONLY_ONE = (s.Precision, s.Memory, s.Accumulate, s.Stages)
"""Verbs about the whole run, which may be used once."""

_PLACING = (s.Columns, s.Rows, s.Vocab, s.Summa)
"""Verbs that each determine how a module is split: two of them for one target contradict."""


Said: TypeAlias = Mapping[Hashable, s.Statement]
"""The statement about each subject; see `_subjects`."""


def check(
    statements: Sequence[s.Statement], mesh: Mapping[str, int], before: Said = MappingProxyType({})
) -> Said:
    """Raise `PlanError` for the first mistake in these statements, or between them and `before`.

    Returns the statement about each subject, these statements included.
    """
    for statement in statements:
        if alone := _ALONE.get(type(statement)):
            alone(statement)
    said = _without_contradictions(statements, before)
    _check_microbatches(said)
    _check_stages(statements, mesh)
    return said


def _without_contradictions(statements: Iterable[s.Statement], before: Said) -> Said:
    said = dict(before)
    for statement in statements:
        for key in _subjects(statement):
            other = said.setdefault(key, statement)
            if other is not statement and not same_content(other, statement):
                raise _contradiction(other, statement)
    return said


def _subjects(statement: s.Statement) -> Iterator[Hashable]:
    """The subjects of a statement: two statements with a common one must say the same about it."""
    if isinstance(statement, _ONLY_ONE):
        yield statement.verb
    elif isinstance(statement, s.Checkpoint) and statement.budget is not None:
        yield "checkpoint budget"
    elif isinstance(statement, s.Targeted) and not isinstance(statement, (s.Expect, s.Allow)):
        about = "placing" if isinstance(statement, _PLACING) else statement.verb
        more = tuple(getattr(statement, name, None) for name in ("of", "dim", "what"))
        for target in statement.targets or (None,):
            yield about, more, statement.scope, target


def same_content(first: s.Statement, second: s.Statement) -> bool:
    """Whether two statements say the same about their targets or, of a verb that is used once,
    the same."""
    if isinstance(first, _ONLY_ONE) or getattr(first, "budget", None) is not None:
        return first == second
    if isinstance(first, s.Targeted) and isinstance(second, s.Targeted):
        return replace(first, targets=()) == replace(second, targets=())
    return first == second


def _contradiction(first: s.Statement, second: s.Statement) -> PlanError:
    if first.verb == second.verb:
        message = f"two `{first.verb}` statements contradict each other"
    else:
        message = f"`{first.verb}` and `{second.verb}` contradict each other"
    spans = [first.span, second.span]
    return PlanError("P301", message, spans=spans, help="keep one of the two")


def _check_microbatches(said: Said) -> None:
    accumulate, stages = said.get(s.Accumulate.verb), said.get(s.Stages.verb)
    if accumulate and isinstance(stages, s.Stages) and stages.microbatches is not None:
        raise PlanError(
            "P303",
            "`accumulate` and `microbatches=` both divide the batch",
            spans=[accumulate.span, stages.at("microbatches")],
            help="remove `accumulate`: a pipeline's microbatches are accumulated",
        )
    uncut = next((d for d in said.values() if isinstance(d, s.Data) and not d.over), None)
    if uncut and not accumulate and not stages:
        raise PlanError(
            "P102",
            "`data` without `over` says what microbatches cut, and the plan has none",
            spans=[uncut.span],
            help="write `over` and a mesh axis, as in `data tokens, targets over dp`",
        )


def _check_stages(statements: Iterable[s.Statement], mesh: Mapping[str, int]) -> None:
    for stages in (each for each in statements if isinstance(each, s.Stages)):
        _check_virtual(stages)
        if stages.count is None and not all(target.is_name for target in stages.targets):
            continue  # a pattern may match any number of modules
        wanted = prod(mesh.get(axis, 1) for axis in stages.over) * stages.virtual
        if stages.num_stages != wanted:
            raise _stage_count(stages, wanted, mesh)


def _check_virtual(stages: s.Stages) -> None:
    least, most = s.SCHEDULES.get(stages.schedule, (1, None))
    if stages.virtual < least or (most is not None and stages.virtual > most):
        wanted = least if stages.virtual < least else most
        bound = "at least " if most is None else ""
        help = f"write `virtual={wanted}`"
        if stages.schedule == "1f1b" and "schedule" not in stages.parts:
            help = f"write `schedule=interleaved`, or `{help[7:]}"
        raise PlanError(
            "P306",
            f"`{stages.schedule}` has {bound}{plural(least, 'stage')} per rank,"
            f" and `virtual` is {stages.virtual}",
            spans=[stages.at("virtual" if "virtual" in stages.parts else "schedule")],
            help=help,
        )


def _stage_count(stages: s.Stages, wanted: int, mesh: Mapping[str, int]) -> PlanError:
    sizes = ", ".join(f"{axis}={mesh.get(axis, 1)}" for axis in stages.over)
    times = f" times virtual={stages.virtual}" if stages.virtual > 1 else ""
    if stages.count is not None:
        help = f"write `stages {wanted} over {format_axes(stages.over)}`"
        virtual, left = divmod(stages.count, wanted // stages.virtual)
        if virtual > 1 and not left and "schedule" not in stages.parts:
            help += f", or `schedule=interleaved virtual={virtual}` for {virtual} stages per rank"
    elif wanted == 1:
        help = "remove the statement, or give the axis more ranks"
    else:
        help = f"name {plural(wanted - 1, 'module')} after `at`"
    return PlanError(
        "P304",
        f"there are {stages.num_stages} stages, but {sizes}{times} makes {wanted}",
        spans=[stages.span],
        help=help,
    )


def _check_memory(memory: s.Memory) -> None:
    if not memory.budget:
        raise _missing(memory, "`memory` has no budget", "add one, such as `budget=60GiB`")


def _check_balance(stages: s.Stages) -> None:
    if stages.balance is not None and stages.count is None:
        raise PlanError(
            "P301",
            "`at` says where stages begin, and `balance=` has them chosen",
            spans=[stages.at("balance")],
            help="remove `balance=`, or write how many stages there are: `stages 4 over pp`",
        )


def _check_checkpoint(checkpoint: s.Checkpoint) -> None:
    if not checkpoint.targets and checkpoint.budget is None:
        help = "add a selector, or a budget such as `budget=40GiB`"
        raise _missing(checkpoint, "`checkpoint` says neither what nor how much", help)
    if checkpoint.segments is not None and checkpoint.budget is not None:
        raise _either(checkpoint, "segments", "budget")
    if checkpoint.split is not None and checkpoint.budget is not None:
        raise _either(checkpoint, "split", "budget")


def _check_summa(summa: s.Summa) -> None:
    if len(summa.over) not in (2, 3):
        help = "write `over (row, col)` with two axes of the mesh, or `over (x, y, z)` with three"
        message = f"`summa` needs two axes or three, not {len(summa.over)}"
        raise _missing(summa, message, help, "over")
    if summa.depth is not None and len(summa.over) == 3:
        help = "write `over (row, col) depth=axis`, or leave `depth` out"
        raise _missing(summa, "`depth` goes with two axes", help, "depth")
    if summa.depth in summa.over:
        raise axis_twice(str(summa.depth), [summa.at("depth"), summa.at("over")])


def _check_context(context: s.Context) -> None:
    if context.method == "ulysses" and context.order is not None:
        raise PlanError(
            "P110",
            "`order=` is that of tokens in a ring, and `method=ulysses` has none",
            spans=[context.at("order"), context.at("method")],
            help="remove it, or write `method=ring`",
        )


def _check_experts(experts: s.Experts) -> None:
    if experts.dropless and experts.capacity is not None:
        raise _either(experts, "capacity", "dropless")
    route, top, count = experts.route or "topk", experts.top, experts.count
    given = [part for part in _OF_NEW_EXPERTS if getattr(experts, part) not in (None, False)]
    if count is None and given:
        help = "remove it, or write how many experts each module is to become: `count=8`"
        message = "without `count`, experts and their routing are those that the model has"
        raise _unfit(experts, given[0], message, help)
    if route == "switch" and top not in (None, 1):
        raise _unfit(experts, "top", "`route=switch` sends each token to one expert")
    if experts.second is not None and route != "topk":
        raise _unfit(experts, "second", f"`route={route}` has no second expert")
    if experts.second is not None and top == 1:
        raise _unfit(experts, "second", "each token goes to one expert")
    losing = next((each for each in ("weight", "balance") if getattr(experts, each)), None)
    if route == "expert_choice" and losing is not None and experts.balance in (None, "aux"):
        raise _unfit(experts, losing, "`route=expert_choice` has no auxiliary loss")
    if experts.rate is not None and experts.balance != "bias":
        raise _unfit(experts, "rate", "only `balance=bias` has a rate", "write `balance=bias`")
    if experts.balance == "bias" and route == "expert_choice":
        raise _unfit(experts, "balance", "`route=expert_choice` is balanced without a bias")
    if experts.dropless:
        _check_dropless(experts, route)
    elif experts.maximum is not None and count is not None:
        what = "experts with a capacity exchange equal parts"
        raise _unfit(experts, "maximum", what, "write `dropless=true`, or remove it")
    if experts.weight is not None and (experts.balance or "aux") != "aux":
        raise _unfit(experts, "weight", f"`balance={experts.balance}` has no auxiliary loss")
    if count is None or top is None:
        return
    if top > count:
        help = f"write `top={count}` or less"
        raise _unfit(experts, "top", f"there are {count} experts, not {top}", help)
    if route == "prototype" and count % top:
        help = f"write a `count` that {top} divides"
        raise _unfit(experts, "top", f"{count} experts are not {top} equal prototypes", help)


_OF_NEW_EXPERTS = (
    "route", "top", "capacity", "dropless", "groups", "balance", "weight", "rate", "second",
    "noise", "init", "seed",
)  # fmt: skip
"""The options of `experts` that say how a module becomes experts, and how tokens reach them."""


def _check_dropless(experts: s.Experts, route: str) -> None:
    if route == "expert_choice":
        what = "`route=expert_choice` takes as many tokens as its capacity has room for"
        raise _unfit(experts, "dropless", what)
    if experts.second == "random":
        what = "`second=random` leaves out choices to save room, which `dropless=true` has"
        raise _unfit(experts, "second", what)


def _check_offload(offload: s.Offload) -> None:
    if offload.fraction is not None and offload.budget is not None:
        raise _either(offload, "fraction", "budget")
    if offload.to == "disk" and offload.path is None:
        help = 'say where its files go: `path="/scratch"`'
        raise _missing(offload, "`to=disk` has no folder", help, "to")
    if offload.what == "optimizer" and offload.prefetch is not None:
        raise PlanError(
            "P110",
            "`prefetch=` is for what steps take, and the optimizer's state stays where it is",
            spans=[offload.at("prefetch")],
            help="remove it",
        )
    if offload.path is not None and offload.to != "disk":
        help = "write `to=disk` before it, or remove it"
        raise _missing(offload, "`path=` is the folder of `to=disk`", help, "path")


def _check_share(share: s.Share) -> None:
    if share.group is not None and share.every is not None:
        raise _either(share, "group", "every")
    for text in share.except_:
        Selector(text, share.at("except")).check()


def _unfit(statement: s.Statement, part: str, message: str, help: str = "remove it") -> PlanError:
    return PlanError("P110", message, spans=[statement.at(part)], help=help)


def _missing(statement: s.Statement, message: str, help: str, part: str = "") -> PlanError:
    return PlanError("P112", message, spans=[statement.at(part)], help=help)


def _either(statement: s.Statement, first: str, second: str) -> PlanError:
    return PlanError(
        "P301",
        f"`{first}=` and `{second}=` contradict each other",
        spans=[statement.at(first), statement.at(second)],
        help="keep one of the two",
    )


_ALONE: dict[type[s.Statement], Callable[..., None]] = {
    s.Memory: _check_memory,
    s.Stages: _check_balance,
    s.Checkpoint: _check_checkpoint,
    s.Summa: _check_summa,
    s.Context: _check_context,
    s.Experts: _check_experts,
    s.Offload: _check_offload,
    s.Share: _check_share,
}
