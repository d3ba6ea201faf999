"""Agreement among ranks: an error on one rank is raised on all of them, in the same words.

A rank that raised alone would leave the others in a collective that never completes. So what can
fail on one rank (a full disk, a file that is not there) is done apart from collectives, and then
every rank says whether it could. Where all could, that is one all-reduce of three numbers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from meshwright.compiler.layout.wires import Wire
from meshwright.runtime.errors import CALL_SAME_METHODS, MismatchError, RunError, spell_ranks
from meshwright.runtime.rank import RankProgram, RankState

T = TypeVar("T")
_DONE = "done "
_METHOD_CHARS, _PROBLEM_CHARS, _LINE_CHARS, _LINES = 32, 2000, 300, 8
"""Limits of the text that a rank sends; what is longer is cut."""


def agreed(state: RankState, work: Callable[[], T], method: str = "") -> Generator[Any, Any, T]:
    """Do `work`, which has no collectives, on every rank, and return what it returns on this one.

    A method of the run gives its name where it first agrees: where ranks called different methods,
    all of them raise `MismatchError`. Where the work raised a `RunError` or ran out of memory on
    any rank, every rank raises a `RunError`, and the run can be used afterwards. A caller that has
    to undo the work on the other ranks catches the error.
    """
    found, problem = _tried(work)
    yield from agree(state, problem, method)
    return found


def first_says(state: RankState, work: Callable[[], str]) -> Generator[Any, Any, str]:
    """Do `work` on rank 0 for all: every rank returns its text, or raises its error."""
    said = ""
    if state.rank == 0:
        text, problem = _tried(work)
        said = _DONE + text if problem is None else _encoded(problem).decode()
    heard: str = yield from told(state, said)
    if not heard.startswith(_DONE):
        raise _decoded(json.loads(heard), state.rank, (0,))
    return heard.removeprefix(_DONE)


def agree(state: RankState, problem: RunError | None, method: str = "") -> RankProgram:
    """Raise on every rank, in the same words, the problem that any rank has.

    The error names the ranks with a problem; where all have the same one, it is theirs as it is.
    Ranks that called different methods all raise that instead.
    """
    every_axis = state.mesh.names
    data = b"" if problem is None else _encoded(problem)
    code = zlib.crc32(method.encode())
    numbers = torch.tensor([len(data), code, -code], device=state.device)
    longest, most, least = (yield Wire("all_reduce", every_axis, "max"), numbers).tolist()
    if most != -least:
        yield from _refuse_methods(state, method)
    if not longest:
        return
    own = _tensor(data.ljust(longest), state)
    every = yield Wire("all_gather", every_axis), own
    texts = [_bytes(row).decode().strip() for row in every]
    if problem is not None and len(set(texts)) == 1:
        problem.peers = tuple(range(state.mesh.num_ranks))
        raise problem
    raise _joint([json.loads(text) if text else None for text in texts], state.rank)


def _refuse_methods(state: RankState, method: str) -> RankProgram:
    name = _tensor(method.encode()[:_METHOD_CHARS].ljust(_METHOD_CHARS), state)
    every = yield Wire("all_gather", state.mesh.names), name
    callers: dict[str, list[int]] = {}
    for rank, row in enumerate(every):
        callers.setdefault(_bytes(row).decode().strip(), []).append(rank)
    raise MismatchError(
        "ranks called different methods",
        rank=state.rank,
        peers=tuple(range(state.mesh.num_ranks)),
        where=[f"`{called}` on {spell_ranks(ranks)}" for called, ranks in callers.items()],
        help=CALL_SAME_METHODS,
    )


def told(state: RankState, text: str, root: int = 0) -> RankProgram:
    """The text that the rank `root` gives, on every rank; that of the others is ignored."""
    wire = Wire("broadcast", state.mesh.names, root=root)
    data = text.encode() if state.rank == root else b""
    length = torch.tensor([len(data)], device=state.device)
    size = int((yield wire, length))
    given = yield wire, _tensor(data.ljust(size), state)
    return _bytes(given).decode()


def all_told(state: RankState, text: str, roots: Iterable[int]) -> RankProgram:
    """The texts that these ranks give, in their order, on every rank."""
    found = []
    for root in roots:
        found += [(yield from told(state, text, root))]
    return found


def _tried(work: Callable[[], T]) -> tuple[T, RunError | None]:
    """What `work` returns, or the problem that it has; the caller looks at the problem first."""
    nothing: Any = None
    try:
        return work(), None
    except RunError as error:
        return nothing, error
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        problem = RunError(
            f"ran out of memory: {reason}" if reason else "ran out of memory",
            help="free memory on the machine of that rank, or use more ranks",
        )
        return nothing, problem


def _joint(found: Sequence[dict[str, Any] | None], rank: int) -> RunError:
    """One error for what ranks found: the first in full, the others in one line each."""
    holders: dict[str, list[int]] = {}
    problems: dict[str, dict[str, Any]] = {}
    for holder, each in enumerate(found):
        if each is not None:
            text = json.dumps(each)
            problems[text] = each
            holders.setdefault(text, []).append(holder)
    first, *others = holders
    where = list(problems[first]["where"])
    where += [
        _shortened(f"on {spell_ranks(holders[text])}: {problems[text]['problem']}", _LINE_CHARS)
        for text in others[:_LINES]
    ]
    if unsaid := sum(len(holders[text]) for text in others[_LINES:]):
        where.append(f"and on {unsaid} more rank{'s' if unsaid > 1 else ''}")
    problem = f"on {spell_ranks(holders[first])}: {problems[first]['problem']}"
    peers = tuple(sorted(each for ranks in holders.values() for each in ranks))
    return _decoded({**problems[first], "problem": problem, "where": where}, rank, peers)


def _decoded(content: dict[str, Any], rank: int, peers: tuple[int, ...]) -> RunError:
    """The error that `_encoded` made bytes of."""
    mismatch = content.pop("mismatch")
    return (MismatchError if mismatch else RunError)(**content, rank=rank, peers=peers)


def _encoded(problem: RunError) -> bytes:
    """A problem as JSON; bytes of a path that are not text are escaped."""
    content = {
        "problem": _shortened(problem.problem, _PROBLEM_CHARS),
        "where": [_shortened(line, _LINE_CHARS) for line in problem.where[:_LINES]],
        "help": _shortened(problem.help, _LINE_CHARS),
        "mismatch": isinstance(problem, MismatchError),
    }
    return json.dumps(content).encode()


def _shortened(text: str, length: int) -> str:
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= length else text[: length - 3] + "..."


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch raises a plain `RuntimeError` where the CPU's did."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def _tensor(data: bytes, state: RankState) -> Tensor:
    return torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)[: len(data)].to(
        state.device
    )


def _bytes(tensor: Tensor) -> bytes:
    data = bytearray(tensor.numel())
    if data:
        torch.frombuffer(data, dtype=torch.uint8).copy_(tensor)
    return bytes(data)
