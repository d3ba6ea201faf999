"""Where a node of the exported program comes from: its module and the user's source line."""

from __future__ import annotations

import dis
import re
import traceback
from functools import lru_cache
from pathlib import Path

import torch
from torch import fx

from meshwright.compiler.graph.ir import Origin

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')
_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).resolve().parents[2])
_LINK = str(Path(__file__).absolute().parents[2])
_FOREIGN = (_TORCH, "<frozen ", "<eval_with_key>")


def is_user(filename: str) -> bool:
    """Whether a frame of this file is the user's: not torch's, not ours, not generated."""
    if filename.startswith(_FOREIGN):
        return False
    return not any(
        filename.startswith(f"{root}/{folder}/")
        for root in (_OURS, _LINK)
        for folder in ("compiler", "passes", "runtime", "dsl")
    )


@lru_cache(maxsize=4096)
def innermost_line(stack_trace: str) -> str:
    """`file.py:123`, the last frame of a printed stack that is the user's; empty if none is."""
    for filename, line in reversed(_FRAME.findall(stack_trace)):
        if is_user(filename):
            return f"{Path(filename).name}:{line}"
    return ""


def line_of(error: BaseException) -> str:
    """The user's innermost line in an exception's traceback, or in that of its first cause."""
    cause: BaseException | None = error
    while cause is not None:
        line = innermost_line("".join(traceback.format_tb(cause.__traceback__)))
        if line:
            return line
        cause = cause.__cause__ or cause.__context__
    return ""


def raised_by_user(error: BaseException) -> bool:
    """Whether the user's own code raised this, and not something that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and is_user(frames[-1].filename)


def raised_by_statement(error: BaseException) -> bool:
    """Whether a `raise` or an `assert` in the user's own code raised this."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not is_user(last.tb_frame.f_code.co_filename):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def current_line() -> str:
    """The user's innermost line on the stack of the caller."""
    return innermost_line("".join(traceback.format_stack()))


def origin_of(node: fx.Node) -> Origin:
    """The module, its class and the source line of one exported node; the wrapper is left out."""
    stack = node.meta.get("nn_module_stack") or {}
    modules, calls = _frames(tuple((key, *frame) for key, frame in stack.items()))
    module, module_type = modules[-1] if modules else ("", "")
    source = innermost_line(node.meta.get("stack_trace") or "")
    return Origin(module, module_type, source, modules=modules, calls=calls)


@lru_cache(maxsize=4096)
def _frames(
    stack: tuple[tuple[str, str, str], ...],
) -> tuple[tuple[tuple[str, str], ...], tuple[int, ...]]:
    """The entries inside the wrapper, by their paths in the user's model, and the number of each
    call: torch's keys end in it, from the second call of a module on."""
    found, calls = [], []
    for key, path, kind in stack[1:]:
        _, _, inside = re.sub(r"@\d+", "", path).partition(".")
        found.append((inside, kind.rpartition(".")[2]))
        _, _, number = key.rpartition("@")
        calls.append(int(number) if number.isdigit() else 0)
    return tuple(found), tuple(calls)
