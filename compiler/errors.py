"""The errors that the compiler raises: they carry data, of which their text is made."""

from __future__ import annotations

from meshwright.dsl.errors import MeshwrightError


class CompilerError(MeshwrightError):
    """The base class of the compiler's errors: a problem in words, and one line of help.

    `problem` is the first line; `code` names the kind of problem for programs that catch it;
    `culprit` is the node, factor, axis or source line at fault (empty if the problem names it
    already); `help` begins with a verb and works when followed. `str(error)` is all of it.
    """

    def __init__(self, problem: str, *, code: str = "", culprit: str = "", help: str = "") -> None:
        super().__init__(problem, code, culprit, help)
        self.code, self.problem, self.culprit, self.help = code, problem, culprit, help

    def __str__(self) -> str:
        lines = [self.problem]
        if self.culprit:
            lines.append(f"  at: {self.culprit}")
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)


class CaptureError(CompilerError):
    """The model cannot be captured as one graph with the gradients that autograd would give.

    Raised by `compile`, and by `Run.evaluate` and `Run.forward` when they first compile, for a
    forward that branches on a tensor's value, a call that does not fit it, or a wrong argument.
    """


class LayoutError(CompilerError):
    """No layout expresses what was asked for, or an operator needs a dim whole that is split.

    Raised by `compile`. For a gather that the plan did not ask for, the help has the `allow` or
    `shard` line to write.
    """


class PassError(CompilerError):
    """A pass broke its own contract. This is always a bug in Meshwright: please report it.

    Raised by `compile`, which checks every graph after every pass.
    """
