"""Errors of a run: each names the rank, the axes, the node and the peers it is about."""

from __future__ import annotations

import traceback
from collections.abc import Hashable, Iterable, Sequence

from meshwright.compiler.codegen.printing import Code
from meshwright.compiler.graph.ir import Node
from meshwright.compiler.graph.text import op_text
from meshwright.compiler.layout.wires import WIRES, Wire
from meshwright.dsl.errors import MeshwrightError, one_line

CALL_SAME_METHODS = "call the same methods on every rank, in one order: none under `if rank == 0`"


class RunError(MeshwrightError, RuntimeError):
    """A run that cannot go on, or a call of one that is wrong.

    Raised by `Program.launch` and the methods of `Run`. `problem` says what happened, `rank` where
    and `peers` which ranks it is about (None and empty where that has no meaning), `where` has
    further lines, `help` begins with a verb and works when followed.
    """

    def __init__(
        self,
        problem: str,
        *,
        rank: int | None = None,
        peers: tuple[int, ...] = (),
        where: Iterable[str] = (),
        help: str = "",
    ) -> None:
        super().__init__(problem)
        self.problem, self.rank, self.peers = problem, rank, peers
        self.where, self.help = tuple(where), help

    def __str__(self) -> str:
        lines = [self.problem, *(f"  {line}" for line in self.where)]
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)


class MismatchError(RunError):
    """Ranks do not agree: on their programs, inputs, operations or copies of a tensor.

    Raised by `Program.launch`, by every method that runs something, and by `Run.check`.
    """


class DeadlockError(RunError):
    """No rank can go on, because each waits for another. Raised by the methods they wait in."""


class PeerError(RunError):
    """Another rank died, stalled, failed or finished while this one needed it.

    Raised by the method in which this rank waited, within seconds; `peers` names the others.
    """


class OperatorError(RunError):
    """An operator of the program failed on this rank, as it would have done in eager mode.

    Raised by the methods of `Run` that run the model; `where` has the line of the model.
    """


class NonFiniteError(RunError):
    """A loss or a gradient has a NaN or an infinity, and no parameter has been updated by it.

    Raised on every rank by `step` of an optimizer that `Run.optimizer` made. `rank` is where the
    first bad value was made; the text names the operator and its module, or the input or parameter
    that had it already. A run goes on after `zero_grad`, without what that step computed.
    """


class OverfullError(RunError):
    """More tokens went to the experts of one rank than the `maximum` of the plan has room for.

    Raised on every rank by the methods of `Run` that run the model, in the same words: which module
    it is, and the `maximum` that would do. Nothing has changed, and the run goes on.
    """


def operator_error(error: Exception, code: Code) -> OperatorError:
    """The error to raise for one that an operator raised while generated `code` ran."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == f"<meshwright {code.name}>" and frame.lineno
    ]
    node = code.nodes[lines[-1] - 1] if lines else None
    return failed("an operator" if node is None else f"`{op_text(node.op)}`", node, error)


def failed(what: str, node: Node | None, error: BaseException) -> OperatorError:
    """The error to raise where `what`, an operator or more, raised one at the place of a node."""
    problem = one_line(str(error).partition("\n")[0]) or type(error).__name__
    module = f"`{node.origin.module}`" if node is not None and node.origin.module else "the model"
    return OperatorError(
        f"{what} in {module} failed: {problem}",
        where=() if node is None else filter(None, (node.origin.source,)),
        help="check the values and types of the inputs: the model itself fails on them too",
    )


class ToldToStop(SystemExit):
    """Ends a rank that was sent SIGTERM, as soon as it waits for no other rank."""


def last_words(error: BaseException) -> tuple[str, str]:
    """How `error` ends a rank, "failed" or "left", and what other ranks say of it."""
    if isinstance(error, ToldToStop):
        return "left", "was told to stop (SIGTERM)"
    if isinstance(error, KeyboardInterrupt):
        return "left", "was interrupted (SIGINT)"
    if isinstance(error, SystemExit):
        return "left", f"left the program by `sys.exit({error.code!r})`".partition("\n")[0]
    return "failed", f"failed: {type(error).__name__}: {error}".partition("\n")[0]


def check_kind(value: object, kind: type | tuple[type, ...], what: str, help: str) -> None:
    """Raise `RunError`, "`what` is a `str`" with this `help`, unless `value` is of the `kind`."""
    if not isinstance(value, kind):
        raise RunError(f"{what} is a `{type(value).__name__}`", help=help)


def spell_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0 and 2`, `ranks 0, 2 and 5`; long lists are cut after eight."""
    listed = sorted(ranks)
    shown = [str(rank) for rank in listed[:8]]
    if len(listed) > len(shown):
        shown.append(f"{len(listed) - len(shown)} more")
    if len(shown) == 1:
        return f"rank {shown[0]}"
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"


def by_value(ranks: Iterable[int], values: Iterable[Hashable]) -> list[tuple[int, ...]]:
    """The ranks in sets of those with the same value: the largest first, and of equally large ones
    that with the lowest rank. So the first is taken to be right, and the others differ."""
    found: dict[Hashable, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        found.setdefault(value, []).append(rank)
    return sorted(map(tuple, found.values()), key=len, reverse=True)


def verb(ranks: Iterable[int], single: str, plural: str) -> str:
    """`rank 1 waits`, `ranks 0 and 1 wait`: the ranks with the form of the verb that fits."""
    listed = tuple(ranks)
    return f"{spell_ranks(listed)} {single if len(listed) == 1 else plural}"


def spell_wire(wire: Wire, names: Sequence[str] = ()) -> str:
    """An operation as errors name it: its node if `names` has it, kind, axes and options."""
    axes = ", ".join(wire.axes)
    text = f"{wire.kind} over `{axes}`"
    for option in WIRES[wire.kind].options if wire.kind in WIRES else ():
        value = getattr(wire, option)
        if option == "ends":
            text += f", {value[0]} to {value[1]}"
        elif option not in ("reduce", "channel"):
            text += f", {option} {value}"
        elif value not in ("sum", ""):
            text += f", {value}"
    if wire.index < 0:
        return text
    node = f"`{names[wire.index]}`" if wire.index < len(names) else f"collective {wire.index}"
    return f"{node} ({text})"
