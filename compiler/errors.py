"""What the compiler raises: errors that carry data, and the one renderer of their text."""

from __future__ import annotations

from meshwright.dsl.errors import MeshwrightError


class CompilerError(MeshwrightError):
    """A problem in words, with the thing it is about and one line of help.

    `code` names the kind of problem for programs that catch it; `culprit` is the node, factor, axis
    or source line at fault (empty if the problem names it already); `help` begins with a verb.
    """

    def __init__(self, problem: str, *, code: str = "", culprit: str = "", help: str = "") -> None:
        super().__init__(problem, code, culprit, help)
        self.code, self.problem, self.culprit, self.help = code, problem, culprit, help

    def __str__(self) -> str:
        return render(self)


class CaptureError(CompilerError):
    """The model can not be captured as one graph with the gradients autograd would give."""


class LayoutError(CompilerError):
    """A layout does not fit its shape or mesh, or no layout can say what was asked for."""


class PassError(CompilerError):
    """A pass broke its own contract; always a bug of Meshwright."""


def render(error: CompilerError) -> str:
    """The text of an error: the problem, where it is, and what to do."""
    lines = [error.problem]
    if error.culprit:
        lines.append(f"  at: {error.culprit}")
    if error.help:
        lines.append(f"  help: {error.help}")
    return "\n".join(lines)
