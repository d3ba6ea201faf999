"""Find the branches that only raise, which a captured forward need not decide.

    if labels.max() >= self.vocab_size:
        raise ValueError("label out of range")

The value of a tensor decides here, which no graph can follow. But one of the two branches only
raises, so a step takes the other one, unchecked. The same holds for `assert`.
"""

from __future__ import annotations

import ast
import dis
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType

import torch

from meshwright.compiler.capture import outputs

_TORCH = str(Path(torch.__file__).parent)
_CALLER = outputs.__file__
"""The file that calls the model: what is further out is not the forward's."""

Span = tuple[int, int, int, int]
"""First line and column, last line and column."""


@dataclass(frozen=True)
class Check:
    """A value in a condition of which one outcome only raises."""

    passing: bool | None
    """The truth of the value for which nothing is raised; None where its truth is not what decides,
    such as a number that is compared."""


def check_at(frame: FrameType) -> Check | None:
    """The check to which the expression that `frame` is evaluating belongs, if any.

    There is none where the forward could catch what the check raises.
    """
    if _is_caught(frame):
        return None
    *_, step = (s for s in dis.get_instructions(frame.f_code) if s.offset <= frame.f_lasti)
    span = _span(step)
    if span is None:
        return None
    tests = _tests(frame.f_code.co_filename)
    inside = [t for t in tests if _covers(t.span, span) or t.statement == span]
    if not inside:
        return None
    test = min(inside, key=lambda test: test.size)
    return _jump(test, step, frame) if _is_jump(step, test) else _check(test, span)


@dataclass(frozen=True)
class _Test:
    """The condition of a statement that raises unless the condition is `passing`."""

    condition: ast.expr
    passing: bool
    statement: Span

    @property
    def span(self) -> Span:
        return _extent(self.condition)

    @property
    def size(self) -> tuple[int, int]:
        return self.span[2] - self.span[0], self.span[3] - self.span[1]


def _span(step: dis.Instruction) -> Span | None:
    at = step.positions
    if at is None or at.lineno is None or at.end_lineno is None:
        return None
    if at.col_offset is None or at.end_col_offset is None:
        return None
    return at.lineno, at.col_offset, at.end_lineno, at.end_col_offset


@lru_cache(maxsize=256)
def _tests(filename: str) -> tuple[_Test, ...]:
    """The checks of a file."""
    return tuple(_found(_tree(filename)))


def _is_caught(frame: FrameType | None) -> bool:
    """Whether an exception may be caught here or in a caller, up to the model's own call."""
    while frame is not None and frame.f_code.co_filename != _CALLER:
        file, line = frame.f_code.co_filename, frame.f_lineno
        if not file.startswith(_TORCH) and any(a <= line <= b for a, b in _tries(file)):
            return True
        frame = frame.f_back
    return False


@lru_cache(maxsize=256)
def _tries(filename: str) -> tuple[tuple[int, int], ...]:
    """The lines of a file from which an exception may be caught."""
    found = []
    for node in ast.walk(_tree(filename)):
        if isinstance(node, (ast.Try, ast.TryStar)) and node.handlers:
            found.append((node.lineno, node.handlers[0].lineno - 1))
        elif isinstance(node, ast.With) and any("suppress" in ast.unparse(i) for i in node.items):
            found.append((node.lineno, _extent(node)[2]))
    return tuple(found)


@lru_cache(maxsize=256)
def _tree(filename: str) -> ast.Module:
    """A file's source; nothing where it cannot be read."""
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _found(tree: ast.AST) -> Iterator[_Test]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield _Test(node.test, True, _extent(node))
        elif isinstance(node, ast.If) and _only_raises(node.body):
            yield _Test(node.test, False, _extent(node))


def _only_raises(body: list[ast.stmt]) -> bool:
    """Whether a block does nothing but prepare and raise an exception."""
    *before, last = body
    return isinstance(last, ast.Raise) and all(
        isinstance(s, (ast.Assign, ast.Expr)) for s in before
    )


def _extent(node: ast.expr | ast.stmt) -> Span:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _covers(outer: Span, inner: Span) -> bool:
    return outer[:2] <= inner[:2] and inner[2:] <= outer[2:]


def _check(test: _Test, span: Span) -> Check:
    """The check of the expression at `span` inside a condition."""
    for leaf, passing in _leaves(test.condition, test.passing):
        if _covers(span, _extent(leaf)):
            return Check(passing)
    return Check(None)


def _jump(test: _Test, jump: dis.Instruction, frame: FrameType) -> Check:
    """The check of a jump, whose position does not say which truth it jumps on.

    The jumps come in the order of the truths, so those before this one are counted.
    """
    leaves = list(_leaves(test.condition, test.passing))
    outcomes = {passing for _, passing in leaves}
    if len(outcomes) == 1:
        return Check(outcomes.pop())
    if any(_has_jumps(leaf) for leaf, _ in leaves):
        return Check(None)
    jumps = [step.offset for step in dis.get_instructions(frame.f_code) if _is_jump(step, test)]
    # The body of a `finally` stands in the code once for each way out.
    return Check(leaves[jumps.index(jump.offset) % len(leaves)][1])


def _leaves(node: ast.expr, passing: bool) -> Iterator[tuple[ast.expr, bool]]:
    """The truths that `and`, `or` and `not` join, in order, and what each should be."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _leaves(node.operand, not passing)
    elif isinstance(node, ast.BoolOp):
        for part in node.values:
            yield from _leaves(part, passing)
    else:
        yield node, passing


def _has_jumps(leaf: ast.expr) -> bool:
    branching = (ast.IfExp, ast.BoolOp, ast.NamedExpr)
    return any(
        isinstance(node, branching) or (isinstance(node, ast.Compare) and len(node.ops) > 1)
        for node in ast.walk(leaf)
    )


def _is_jump(step: dis.Instruction, test: _Test) -> bool:
    """Whether this is a conditional jump, in the statement or after it."""
    span = _span(step)
    jumps = "JUMP" in step.opname and "IF" in step.opname
    return jumps and span is not None and span[:2] >= test.statement[:2]
