"""What a rule says, and the one-line notation most rules are written in.

A row names every dimension of every operand and result, as an einsum does:

    linear   "... i, o i, o? -> ... o"       a letter that a result lacks is contracted: split, it
                                             leaves that result partial
    softmax  "... n! -> ... n"               `!`: must be whole on a rank
    norm     "... n~, n?, n? -> ... n, ..."  `~`: the operator itself finishes what a split leaves
    embedding "v^ d, ... -> ... d"           `^`: split only so that a rank has consecutive entries,
                                             as where indices or classes are counted from its first
             "o?"                            the operand may be absent
             "... 1"                         a dimension of size 1

`...` stands for leading dimensions, aligned at the right as in broadcasting; `...!` for leading
dimensions that must be whole. The terms are the tensor arguments of the operator's schema, in order
(of a composite: its first arguments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Arg, MeshOp, Op, TensorType
from meshwright.compiler.graph.slots import Slot
from meshwright.compiler.layout.factors import Dim
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh

Letters: TypeAlias = tuple[str, ...]
"""One name per dimension; an empty name is a dimension of size 1 that is broadcast."""

Group: TypeAlias = frozenset[int]
"""Operands whose pending sums may stay pending together."""

FIRST: tuple[Group, ...] = (frozenset({0}),)
"""The groups of an operator that is linear in its first operand."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor operand as rules see it."""

    type: TensorType
    layout: Layout
    differentiable: bool = False
    zero: bool = False
    """Whether the value is known to be all zeros."""
    others: tuple[Layout, ...] = ()
    """Other layouts that it can be had in."""

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Every layout that it can be had in."""
        return (self.layout, *self.others)

    @property
    def any_sum(self) -> bool:
        """Whether the value is zeros, which are a pending sum over any axis as they are.

        Not where it has a cotangent: as the value is not typed as pending, that would be counted
        once per rank.
        """
        return self.zero and not self.differentiable


@dataclass(frozen=True, slots=True)
class Call:
    """One use of an operator: hashable, so that equal calls are placed once."""

    op: Op
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    operands: tuple[Operand, ...]
    results: tuple[TensorType | None, ...]
    mesh: Mesh
    wanted: tuple[Layout, ...] = ()
    """Layouts that users ask for of the first result: tried where the operands leave a choice."""

    def arg(self, position: int, default: Arg = None) -> Arg:
        """An argument by its place in the schema, given in place or by name, or `default`."""
        if position < len(self.args):
            return self.args[position]
        if self.kwargs and not isinstance(self.op, MeshOp):
            name = self.op._schema.arguments[position].name
            return dict(self.kwargs).get(name, default)
        return default


@dataclass(frozen=True, slots=True)
class Placement:
    """One way to run a call: the layout each operand must have, and each result then has."""

    operands: tuple[Layout, ...]
    results: tuple[Layout | None, ...]


Dims: TypeAlias = Mapping[str, Dim]
"""How each letter is split."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A rule for one call: letters for each dimension, and where pending sums may pass.

    `whole` letters are never split; `inner` ones may be, and leave nothing pending. `linear` lists
    groups of operands: a sum may stay pending where all operands of one group, and no other
    operand, have it pending. The values of `shape_only` operands do not matter. `derived` letters
    are not chosen: `bind` works them out, and any letter that only results have, from those that
    are; it raises LayoutError for a choice that the operator cannot run on. `offers` are ways to
    split a letter that no operand shows.
    """

    operands: tuple[Letters, ...]
    results: tuple[Letters | None, ...]
    whole: frozenset[str] = frozenset()
    inner: frozenset[str] = frozenset()
    linear: tuple[Group, ...] = ()
    reduce: str = "sum"
    shape_only: Group = frozenset()
    derived: frozenset[str] = frozenset()
    bind: Callable[[Dims], Dims] | None = None
    offers: Mapping[str, tuple[Dim, ...]] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    """Letters that only results have, and that may be split as `Call.wanted` asks."""
    ignored: Group = frozenset()
    """Operands of which not even the shape on a rank matters: they stay as they are."""
    consecutive: frozenset[str] = frozenset()
    """Letters that are split only so that each rank holds consecutive entries."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Placements on the layouts that a rule is given, and the operands that it does not look at."""

    placements: tuple[Placement, ...]
    ignored: Group


Rule: TypeAlias = Callable[[Call], "Spec | Placed | Iterable[Placement]"]


@dataclass(frozen=True, slots=True)
class Terms:
    """A parsed line of the table."""

    operands: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]
    whole: frozenset[str]
    inner: frozenset[str]
    consecutive: frozenset[str]


@lru_cache(maxsize=1024)
def parse_row(text: str) -> Terms:
    """Read one line of the notation."""
    left, right = text.split("->")
    words = text.replace("->", " ").replace(",", " ").split()
    operands, results = (
        tuple(tuple(_name(word) for word in term.split()) for term in side.split(","))
        for side in (left, right)
    )
    whole, inner, consecutive = (
        frozenset(_name(word) for word in words if mark in word) for mark in "!~^"
    )
    return Terms(operands, results, whole, inner, consecutive)


def _name(word: str) -> str:
    name = word.strip("!?~^")
    return "" if name == "1" else name


@dataclass(frozen=True, slots=True)
class Row:
    """A rule in one line.

    `linear` says in which terms pending sums pass: "each" by itself, "all" together, or groups of
    terms (absent ones are left out), or a function of the call that gives those groups. `reduce` is
    the operator's own reduction over contracted letters. While the term `added` is present nothing
    is contracted: it would be added once per rank.
    """

    text: str
    linear: str | tuple[tuple[int, ...], ...] | Callable[[Call], tuple[tuple[int, ...], ...]] = ()
    reduce: str = "sum"
    shape_only: tuple[int, ...] = ()
    added: int | None = None

    def __call__(self, call: Call) -> Spec:
        terms = parse_row(self.text)
        present = present_terms(call)
        operands, results = expand(terms, present, call)
        places = {term: i for i, term in enumerate(present)}
        whole = {
            letter
            for letters in (*operands, *results)
            for letter in letters or ()
            if letter in terms.whole or (letter.startswith(".") and "..." in terms.whole)
        }
        if self.added in places or (self.reduce != "sum" and differentiable(call)):
            # Only a pending sum has an adjoint.
            whole |= contracted_letters(operands, results) - terms.inner
        return Spec(
            operands,
            results,
            frozenset(whole),
            terms.inner,
            self._groups(call, places),
            self.reduce,
            frozenset(places[term] for term in self.shape_only if term in places),
            consecutive=terms.consecutive,
        )

    def _groups(self, call: Call, places: Mapping[int, int]) -> tuple[Group, ...]:
        """The linear groups of the operands that the call has."""
        linear = self.linear(call) if callable(self.linear) else self.linear
        if linear == "each":
            return tuple(frozenset({i}) for i in places.values())
        if linear == "all":
            return () if has_number(call) else (frozenset(places.values()),)
        groups = (
            frozenset(places[int(term)] for term in group if int(term) in places)
            for group in linear
        )
        return tuple(dict.fromkeys(group for group in groups if group))


def differentiable(call: Call) -> bool:
    """Whether a gradient flows through any operand of the call."""
    return any(operand.differentiable for operand in call.operands) and any(
        result is not None and result.differentiable for result in call.results
    )


def contracted_letters(
    operands: Iterable[Letters], results: Iterable[Letters | None]
) -> frozenset[str]:
    """The letters of operands that some result lacks."""
    found: set[str] = set()
    taken = {letter for letters in operands for letter in letters if letter}
    for result in results:
        if result is not None:
            found |= taken - set(result)
    return frozenset(found)


@lru_cache(maxsize=4096)
def tensor_arguments(op: Op) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an operator's schema says are tensors."""
    if isinstance(op, MeshOp):
        return tuple((i, "") for i in range(16))
    return tuple(
        (i, argument.name)
        for i, argument in enumerate(op._schema.arguments)
        if str(argument.type).startswith(("Tensor", "Optional[Tensor"))
        and "List" not in str(argument.type)
    )


def present_terms(call: Call) -> tuple[int, ...]:
    """For each operand, the number of the term it is given for."""
    found: dict[int, int] = {}
    named = dict(call.kwargs)
    for term, (place, name) in enumerate(tensor_arguments(call.op)):
        value = call.args[place] if place < len(call.args) else named.get(name)
        if isinstance(value, Slot):
            found[value.index] = term
    return tuple(found[i] for i in range(len(call.operands)))


def has_number(call: Call) -> bool:
    """Whether a number is given where the schema has a tensor: `x + 1`."""
    return any(
        isinstance(call.args[place], (int, float, complex))
        for place, _ in tensor_arguments(call.op)
        if place < len(call.args)
    )


def expand(
    terms: Terms, present: Sequence[int], call: Call
) -> tuple[tuple[Letters, ...], tuple[Letters | None, ...]]:
    """The row's letters for the shapes of one call; `present` are the terms that it passes."""
    if len(call.results) > len(terms.results) or max(present, default=-1) >= len(terms.operands):
        raise _mismatch(call, "operands or results")
    operands = tuple(
        _letters(terms.operands[term], operand.type, call)
        for term, operand in zip(present, call.operands, strict=True)
    )
    sizes = letter_sizes(operands, call)
    operands = tuple(
        broadcast_letters(letters, operand.type, sizes)
        for letters, operand in zip(operands, call.operands, strict=True)
    )
    results = tuple(
        None if result is None else broadcast_letters(_letters(term, result, call), result, sizes)
        for term, result in zip(terms.results, call.results, strict=False)
    )
    return operands, results


def _letters(term: tuple[str, ...], type: TensorType, call: Call) -> Letters:
    if "..." not in term:
        if len(term) != len(type.shape):
            raise _mismatch(call, "dims")
        return term
    place = term.index("...")
    leading = len(type.shape) - (len(term) - 1)
    if leading < 0:
        raise _mismatch(call, "dims")
    return (*term[:place], *leading_letters(leading), *term[place + 1 :])


def _mismatch(call: Call, what: str) -> LayoutError:
    shapes = ", ".join(str(list(operand.type.shape)) for operand in call.operands)
    return LayoutError(
        f"the rule of `{call.op}` names other {what} than {shapes}",
        code="rule-mismatch",
        help="write one letter for each dim of each tensor in the operator's rule",
    )


def letter_sizes(operands: Iterable[Letters], call: Call) -> dict[str, int]:
    """Each letter's size: the largest seen, since 1 is broadcast; 0 rather than 1."""
    sizes: dict[str, int] = {}
    for letters, operand in zip(operands, call.operands, strict=True):
        for letter, size in zip(letters, operand.type.shape, strict=True):
            if letter:
                seen = sizes.get(letter, 1)
                sizes[letter] = size if size > 1 or seen == 1 else seen
    return sizes


def broadcast_letters(letters: Letters, type: TensorType, sizes: Mapping[str, int]) -> Letters:
    """The letters, empty for dims that are broadcast and for dims of size 0 where the letter has
    entries: statistics that an operator does not keep."""
    return tuple(
        "" if size < 2 and sizes.get(letter, size) != size else letter
        for letter, size in zip(letters, type.shape, strict=True)
    )


def broadcast(operands: tuple[Letters, ...], call: Call) -> tuple[Letters, ...]:
    """The letters of the operands, empty for dims that are broadcast."""
    sizes = letter_sizes(operands, call)
    return tuple(
        broadcast_letters(letters, operand.type, sizes)
        for letters, operand in zip(operands, call.operands, strict=True)
    )


def leading_letters(count: int) -> Letters:
    """Letters of leading dims, aligned at the right."""
    return tuple(f".{count - 1 - i}" for i in range(count))


def with_letter(letters: Letters, dim: int, letter: str) -> Letters:
    """The letters with another one in place of that of `dim`."""
    return (*letters[:dim], letter, *letters[dim + 1 :])


def numbered(prefix: str, count: int) -> Letters:
    """`count` letters of their own: `x0 x1 x2`."""
    return tuple(f"{prefix}{i}" for i in range(count))


def dim_index(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim % rank if rank else 0


def one_linear_group(call: Call) -> tuple[Group, ...]:
    """All operands together."""
    return (frozenset(range(len(call.operands))),)


def replicate(call: Call) -> Spec:
    """Everything whole on every rank; pending sums pass where torch's own backwards are linear."""
    operands = tuple(
        tuple(f"{i}.{dim}" for dim in range(len(operand.type.shape)))
        for i, operand in enumerate(call.operands)
    )
    results = tuple(
        None if type is None else tuple(f"r.{dim}" for dim in range(len(type.shape)))
        for type in call.results
    )
    whole = frozenset(letter for letters in operands for letter in letters)
    return Spec(operands, results, whole=whole, linear=_cotangents(call))


def _cotangents(call: Call) -> tuple[Group, ...]:
    """The cotangents that a `..._backward` of torch takes, in which it is linear together."""
    if isinstance(call.op, MeshOp) or not call.op._schema.name.endswith("_backward"):
        return ()
    names = [name for _, name in tensor_arguments(call.op)]
    group = (i for i, term in enumerate(present_terms(call)) if names[term].startswith("grad"))
    return (frozenset(group),)
