"""Find out whether the adjoint of a call leaves a pending cotangent pending.

The cotangent of a varying value is a pending sum. Most adjoints are linear in it by rules that say
so, and pass the pending sum on. Others (that of a Cholesky factor) need the cotangent whole: it
would be reduced before them, and their results once more at the parameter.
"""

from __future__ import annotations

from meshwright.compiler.autodiff.adjoints import cotangents
from meshwright.compiler.autodiff.vjp import VjpContext
from meshwright.compiler.graph.ir import INPUT, Builder, Node
from meshwright.compiler.graph.transfers import collective_kind
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.emit import Emitter


def keeps_pending(node: Node, axes: tuple[str, ...], mesh: Mesh) -> bool:
    """Whether the operands of a placed call have cotangents that are pending over `axes` if its
    result has one, with nothing reduced on the way.

    Requires: a call with one result, replicated over `axes`. Its backward is written to find out.
    """
    if collective_kind(node.op) is not None:
        return True
    emitter = Emitter(Builder("pending", mesh), backward=True)
    context = _context(emitter, node, axes)
    found = cotangents(context)
    return not emitter.movements and all(
        set(axes) <= set(grad.placed.partial_axes)
        for grad, operand in zip(found, context.operands, strict=True)
        if grad is not None and operand.requires_grad
    )


def _context(emitter: Emitter, node: Node, axes: tuple[str, ...]) -> VjpContext:
    """The backward of `node` on operands that vary over `axes`."""
    builder = emitter.builder

    def stand_in(value: Node, layout: Layout) -> Node:
        return builder.emit(
            INPUT,
            ("operand", value.name),
            type=value.type,
            layout=layout.canonical(builder.mesh),
            requires_grad=value.requires_grad,
        )

    operands = {
        n: stand_in(n, n.placed.add_varying(axes) if n.requires_grad else n.placed)
        for n in node.operands()
    }
    layout = node.placed.add_varying(axes).canonical(builder.mesh)
    result = builder.copy(node, operands, layout=layout)
    cotangent = stand_in(node, result.placed.dual())
    return VjpContext(emitter, result, (result,), (cotangent,), node.origin)
