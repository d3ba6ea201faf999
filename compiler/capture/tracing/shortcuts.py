"""Leave out what `torch.export` writes for the readers of its graphs, whom capturing does without.

On its way through export, a graph is put to Python code and compiled dozens of times, and each
operator keeps its whole stack as text. For a model of a hundred layers that is two fifths of the
time. Nothing calls the code, and of a stack the user's line alone is read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from traceback import FrameSummary, StackSummary
from types import FrameType
from typing import Any

from torch.fx import GraphModule
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._traceback import CapturedTraceback

from meshwright.compiler.capture.origin import is_user
from meshwright.compiler.capture.tracing.patches import replaced


@contextmanager
def without_texts() -> Iterator[None]:
    """Make code for a graph only where it is called, and keep the user's line of a stack alone."""
    with (
        replaced(GraphModule, "recompile", _compiled_when_called),
        replaced(CapturedTraceback, "extract", staticmethod(_user_line)),
    ):
        yield


_compile = GraphModule.recompile


def _compiled_when_called(module: GraphModule) -> None:
    def forward(called: GraphModule, *args: Any, **kwargs: Any) -> Any:
        _compile(called)
        return type(called).forward(called, *args, **kwargs)

    codegen = module.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):  # what compiling sets besides the code
        module._in_spec, module._out_spec = (
            codegen.pytree_info.in_spec,
            codegen.pytree_info.out_spec,
        )
    module.__dict__.setdefault("_code", "")  # what `str` shows, until there is any
    type(module).forward = forward  # each graph module has a class of its own


class _UserLine(CapturedTraceback):
    """One frame of a stack, or none."""

    __slots__ = ()

    def summary(self) -> StackSummary:
        return StackSummary.from_list([self.tb] if self.tb else [])


def _user_line(**_: Any) -> _UserLine:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Torch keeps these frames alone: a helper's operators belong to the line that calls it.
        if code.co_name == "forward" and _is_user(code.co_filename):
            return _UserLine(FrameSummary(code.co_filename, frame.f_lineno, "forward", line=""))
        frame = frame.f_back
    return _UserLine(None)


_is_user = lru_cache(maxsize=4096)(is_user)
