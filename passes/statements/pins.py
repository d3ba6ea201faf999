"""Pin layouts to parameters, buffers and inputs as statements of the plan ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.graph.text import dtype_text
from meshwright.compiler.layout.factors import Dim, Factor, dim_axes, whole
from meshwright.compiler.layout.layout import Layout
from meshwright.dsl.errors import PlanError
from meshwright.dsl.solve import Dim as SolvedDim
from meshwright.dsl.statements import Spread, Statement
from meshwright.passes.statements.draft import Draft, Pin, input_key


def to_dim(solved: SolvedDim) -> Dim:
    """A dim of a layout from the sizes that the plan's solver found."""
    return tuple(tuple(Factor(size, axes) for size, axes in segment) for segment in solved)


def pin_lines(pin: Pin | None) -> str:
    """The places of all statements behind a pin."""
    places = (statement.plan_line for statement in pin.statements) if pin else ()
    return ", ".join(dict.fromkeys(filter(None, places)))


def axis_lines(pin: Pin | None) -> dict[str, str]:
    """By axis that a pinned layout uses: the line that asks for it, the last of them."""
    found = {}
    for axis in pin.layout.axes_used if pin else ():
        assert pin is not None
        chosen = [s for s in pin.statements if not isinstance(s, Spread) or axis in s.over]
        found[axis] = next((s.plan_line for s in reversed(chosen or pin.statements)), "")
    return found


def tensor_text(node: Node, *, shape: bool = True) -> str:
    """`blocks.0.up.weight: f32[64, 16]`, as errors show an input of the graph."""
    text = f"{node.args[1]}: {dtype_text(node.tensor.dtype)}"
    return f"{text}{list(node.tensor.shape)}" if shape else text


def module_text(module: str) -> str:
    """A module as errors name it."""
    return f"`{module}`" if module else "the model"


def pin(draft: Draft, node: Node, dims: dict[int, Dim], statement: Statement) -> Draft:
    """`draft` with these dims of an input pinned; the other dims stay as they are.

    Raises `PlanError` where another statement lays the same dim out differently, or where one axis
    would split two dims.
    """
    name = input_key(node)
    own = tuple(dims.get(i, whole(size)) for i, size in enumerate(node.tensor.shape))
    before = draft.inputs.get(name)
    if before is None:
        merged = own
    else:
        merged = tuple(
            _merge(old, new, draft, node, before, statement)
            for old, new in zip(before.layout.dims, own, strict=True)
        )
    statements = (*(before.statements if before else ()), statement)
    _check_axes(merged, draft, node, statements)
    return with_pin(draft, name, Pin(Layout(merged), statements))


def with_pin(draft: Draft, name: str, pin: Pin) -> Draft:
    """`draft` with one input pinned, in place of its pin before."""
    return replace(draft, inputs={**draft.inputs, name: pin})


def _merge(old: Dim, new: Dim, draft: Draft, node: Node, before: Pin, statement: Statement) -> Dim:
    if not dim_axes(old) or not dim_axes(new):
        return new if dim_axes(new) else old
    if Layout((old,)).equals(Layout((new,)), draft.mesh):
        return old
    raise contradiction(draft, node, before.statements, statement)


def contradiction(
    draft: Draft, node: Node, before: Sequence[Statement], statement: Statement
) -> PlanError:
    """The error for two statements, or two uses under one, that lay out one tensor differently."""
    names = [alias for alias, own in draft.captured.aliases.items() if own == node.args[1]]
    tied = f" (one tensor with {', '.join(f'`{n}`' for n in names)})" if len(names) > 1 else ""
    same = before[-1] is statement
    return draft.plan.error(
        "P301",
        f"{'two uses' if same else 'two statements'} lay out `{node.args[1]}` differently",
        statement if same else [before[-1], statement],
        subject=f"{tensor_text(node)}{tied}",
        help="name modules of which one alone uses it"
        if same
        else "keep one of them, or write the whole layout with `shard`",
    )


def _check_axes(
    dims: Iterable[Dim], draft: Draft, node: Node, statements: Sequence[Statement]
) -> None:
    used = [axis for dim in dims for axis in dim_axes(dim)]
    twice = next((axis for axis in used if used.count(axis) > 1), None)
    if twice is not None:
        raise draft.plan.error(
            "P202",
            f"`{twice}` splits two dims of `{node.args[1]}`",
            list(statements[-2:]),
            subject=tensor_text(node),
            help="split each dim over an axis of its own",
        )
