"""What a rule says, and the one-line notation most rules are written in.

A row names every dimension of every operand and result, as an einsum does:

    linear   "... i, o i, o? -> ... o"       a letter that no result has is contracted: split, it leaves
                                             the result partial
    softmax  "... n! -> ... n"               `!`: must be whole on a rank
    norm     "... n~, n?, n? -> ... n, ..."  `~`: the operator itself finishes what splitting it leaves
             "o?"                            the operand may be absent

`...` stands for leading dimensions, aligned at the right as in broadcasting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from meshwright.compiler.ir import Arg, Op, TensorType
from meshwright.compiler.layout import Layout
from meshwright.compiler.mesh import Mesh

Letters: TypeAlias = tuple[str, ...]
"""One name per dimension; an empty name is a dimension of size 1 that is broadcast."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor operand as the engine sees it."""

    type: TensorType
    layout: Layout
    differentiable: bool = False
    explicit: bool = False
    """Whether the plan wrote this layout: it is not changed where anything else can be."""
    available: frozenset[Layout] = frozenset()
    """Layouts that the value already has elsewhere in the graph, at no further cost."""
    proposals: tuple[Layout, ...] = ()
    """Layouts worth trying for a value whose pending sum must be reduced here."""
    keep_partial: bool = True
    """Whether a pending sum may stay pending; not where several users would each reduce it."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for the tensor operand of this number in the arguments of a call."""

    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """One use of an operator: hashable, so that equal calls are placed once."""

    op: Op
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    operands: tuple[Operand, ...]
    results: tuple[TensorType | None, ...]
    mesh: Mesh

    def arg(self, position: int, default: Arg = None) -> Arg:
        """The positional argument, or `default` if the call leaves it out."""
        return self.args[position] if position < len(self.args) else default


@dataclass(frozen=True, slots=True)
class Placement:
    """One way to run a call: the layout each operand must have, and each result then has."""

    operands: tuple[Layout, ...]
    results: tuple[Layout | None, ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """A rule for one call: letters for each dimension, and where pending sums may pass.

    `whole` letters are never split; `inner` ones may be, and leave nothing pending. `linear` lists groups of operands: a sum may stay pending where all operands of one group, and
    no other operand, have it pending.
    """

    operands: tuple[Letters, ...]
    results: tuple[Letters | None, ...]
    whole: frozenset[str] = frozenset()
    inner: frozenset[str] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    reduce: str = "sum"


@dataclass(frozen=True, slots=True)
class Row:
    """A parsed line of the table."""

    operands: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]
    optional: frozenset[int]
    whole: frozenset[str]
    inner: frozenset[str]


@lru_cache(maxsize=1024)
def parse_row(text: str) -> Row:
    """Read one line of the notation."""
    left, right = text.split("->")
    terms = [term.split() for term in left.split(",")]
    optional = frozenset(i for i, term in enumerate(terms) if any("?" in w for w in term))
    words = text.replace("->", " ").replace(",", " ").split()
    operands = tuple(tuple(word.strip("!?~") for word in term) for term in terms)
    results = tuple(tuple(word.strip("!~") for word in term.split()) for term in right.split(","))
    whole, inner = (
        frozenset(word.strip("!?~") for word in words if mark in word) for mark in "!~"
    )
    return Row(operands, results, optional, whole, inner)


def expand(row: Row, present: Sequence[int], call: Call) -> Spec:
    """The row's letters for the shapes of one call; `present` are the row's terms that it passes."""
    operands = tuple(
        _letters(row.operands[term], operand.type)
        for term, operand in zip(present, call.operands, strict=True)
    )
    sizes = letter_sizes(operands, call)
    operands = tuple(
        broadcast_letters(letters, operand.type, sizes)
        for letters, operand in zip(operands, call.operands, strict=True)
    )
    results = tuple(
        None if result is None else _letters(term, result)
        for term, result in zip(row.results, call.results, strict=False)
    )
    return Spec(operands, results, row.whole, row.inner)


def _letters(term: tuple[str, ...], type: TensorType) -> Letters:
    if "..." not in term:
        assert len(term) == len(type.shape), (term, type)
        return term
    place = term.index("...")
    leading = len(type.shape) - (len(term) - 1)
    return (
        *term[:place],
        *(f".{leading - 1 - i}" for i in range(leading)),
        *term[place + 1 :],
    )


def letter_sizes(operands: Iterable[Letters], call: Call) -> dict[str, int]:
    """Each letter's size: the largest seen, since 1 is broadcast."""
    sizes: dict[str, int] = {}
    for letters, operand in zip(operands, call.operands, strict=True):
        for letter, size in zip(letters, operand.type.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return sizes


def broadcast_letters(letters: Letters, type: TensorType, sizes: dict[str, int]) -> Letters:
    """The letters with those of broadcast dimensions made empty."""
    return tuple(
        "" if size == 1 and sizes.get(letter, 1) != 1 else letter
        for letter, size in zip(letters, type.shape, strict=True)
    )
