"""How much a rank sends for a collective: by the algorithm that is assumed, for sizes that are
numbers or symbols.

- `pipelined`: messages are cut up, so that each link is busy all the time. That is optimal in
  bandwidth, and what `program.comm()` counts.
- `ring`: the same, but for broadcasts and reductions to one rank, which pass whole messages on from
  rank to rank.
- `tree`: broadcasts, reductions and all-reduces go down and up a binomial tree, in whole messages;
  an all-to-all takes as many rounds (Bruck).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import sympy

from meshwright.compiler.errors import CompilerError
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import WIRES, Wire
from meshwright.dsl.errors import did_you_mean, spelled


class log2(sympy.Function):  # type: ignore[misc]  # as texts spell it
    """The rounds of a tree over n ranks: the logarithm of n, rounded up."""

    is_positive = True

    @classmethod
    def eval(cls, n: Any) -> Any:
        """Its value, where n is a number."""
        return sympy.Integer((int(n) - 1).bit_length()) if n.is_Integer else None


_Share = Callable[[Any], Any]
"""The share of an operand that a rank sends, in a group of n: a `Fraction` or a symbol."""


def _rounds(n: Any) -> Any:
    return Fraction((int(n) - 1).bit_length()) if isinstance(n, Fraction) else log2(n)


_WHOLE: Mapping[str, _Share] = {"broadcast": lambda n: n - 1, "reduce": lambda n: n - 1}
_TREE: Mapping[str, _Share] = {
    "broadcast": _rounds,
    "reduce": _rounds,
    "all_reduce": lambda n: 2 * _rounds(n),
    "all_to_all": lambda n: _rounds(n) / 2,
}
CONVENTIONS: Mapping[str, Mapping[str, _Share]] = {"pipelined": {}, "ring": _WHOLE, "tree": _TREE}
"""By convention: the kinds of wires whose volume is not the optimal one."""


def check_convention(convention: str) -> None:
    """Raise `CompilerError` unless there is such a convention."""
    if convention not in CONVENTIONS:
        raise CompilerError(
            f"unknown convention {spelled(convention)} for the volume of collectives",
            help=did_you_mean(str(convention), CONVENTIONS),
        )


def share_sent(wire: Wire, n: Any, convention: str = "pipelined") -> Any:
    """The share of its operand that a rank sends in a group of `n` ranks: for a `Fraction` one,
    for a symbol an expression."""
    special = CONVENTIONS[convention].get(wire.kind)
    return special(n) if special else WIRES[wire.kind].sent(wire, n)


def bytes_sent(
    wire: Wire, local_numel_in: int, itemsize: int, mesh: Mesh, convention: str = "pipelined"
) -> int:
    """The bytes that one rank, of a transfer the source, sends for its operand. What does not
    divide is rounded down."""
    share = share_sent(wire, Fraction(mesh.size(wire.axes)), convention)
    return int(share * local_numel_in * itemsize)
