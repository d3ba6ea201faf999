"""The registry of composites: operators of our own, each with all there is to say of it.

A file of `compiler/composites/` holds one composite, its backward and the steps that it is lowered
to, each a class that `composite` registers. Rules, types, `check`, adjoints, lowering, code
generation and reports ask here and nowhere else, so a new composite is one new file.

A composite is differentiated whole, by an adjoint written by hand; the values that the adjoint
names are what is saved. Where its work is split over ranks it is lowered afterwards, to steps
(composites too) and the collectives between them, which may stand in a loop:

- Ring attention (`composites/ring_attention.py`): the rule has queries, keys and values split along
  the sequence together; the adjoint calls a backward on the output and its log-sum-exp; `lower`
  emits, for each rank of the axis, a step on the block at hand, which merges its result with those
  before it, and a `permute` of keys and values to the next rank. The backward goes round with the
  gradients of its blocks.
- SUMMA: the rule yields one `Placement`, both matrices split over rows and columns of the mesh; the
  adjoint is the same composite on transposed operands; `lower` emits for each panel two broadcasts
  and a step that adds one product to the sum so far.
- A mixture of experts needs no lowering (`composites/experts.py`): tokens are put in the slots of
  experts, and back, on the rank that has them, and between those steps layouts say which rank has
  which expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, NodeType, Op
from meshwright.compiler.kernels.hashing import Coords, RandomIndex
from meshwright.compiler.layout.extents import Extent
from meshwright.compiler.layout.factors import Dim
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.rules.notation import Call, Placement, Spec

Cotangents: TypeAlias = "Sequence[Node | None]"
"""One for each operand, in the order of `Node.operands()`; `None` where there is none."""
Lowered: TypeAlias = "Node | tuple[Node | None, ...] | None"
"""What stands for a call that was lowered: a node with all its results, or each of them."""
Kernel: TypeAlias = Callable[..., Any]
"""A function of one rank's tensors."""


class AdjointContext(Protocol):
    """A call whose backward is written: its nodes, and what writes the calls of the backward."""

    node: Node
    operands: tuple[Node, ...]
    results: tuple[Node | None, ...]
    grads: tuple[Node | None, ...]
    """The cotangent of each result; None where there is none."""

    @property
    def grad(self) -> Node:
        """The cotangent of the first result."""

    def call(self, op: Op, *args: Arg) -> Node:
        """Write one call of the backward; all are placed together, by their rules."""

    def items(self, source: Node) -> list[Node | None]:
        """The results of a call that has multiple."""


class LoweringContext(Protocol):
    """A placed call to lower: its node, its arguments in the new graph, and what emits there."""

    node: Node
    args: tuple[Arg, ...]

    @property
    def mesh(self) -> Mesh:
        """The axes over which operands may be split."""

    def call(self, op: Op, *args: Arg, type: NodeType = None, **kwargs: Arg) -> Node:
        """Emit a step, placed by its rule; `type` is given where it depends on the mesh."""

    def shared(self, op: Op, *args: Arg) -> Node:
        """A step that other composites may need too: emitted once for these arguments."""

    def items(self, source: Node) -> list[Node | None]:
        """The results of a step that has multiple."""

    def reshard(self, value: Node, layout: Layout, *, anew: bool = False) -> Node:
        """`value` in another layout, by as many collectives as that takes; `anew`, also where it is
        there in that layout: a backward that takes it then saves `value` as it was."""

    def collective(
        self,
        kind: str,
        value: Node,
        layout: Layout,
        axes: tuple[str, ...],
        *,
        type: NodeType = None,
        **options: Arg,
    ) -> Node:
        """Emit one collective of this kind, which leaves `value` in `layout`; `type` is given where
        it changes. With the option `after`, a node, it starts once that is computed."""


class LossFactor(Protocol):
    """A number that may change between steps."""

    @property
    def value(self) -> float:
        """The number now."""


class BindingContext(Protocol):
    """A node to bind on one rank, and where on the mesh and in its tensors the rank is."""

    @property
    def node(self) -> Node:
        """The node, with global arguments."""

    @property
    def mesh(self) -> Mesh:
        """The axes over which operands may be split."""

    @property
    def coords(self) -> Mapping[str, int]:
        """The rank's coordinate along each axis."""

    @property
    def device(self) -> torch.device:
        """Where the rank's tensors are."""

    @property
    def scale(self) -> LossFactor:
        """The loss scale of the run, as it is when the kernel runs."""

    def operand(self, position: int) -> Node:
        """The node given as this argument."""

    def positions(self, dim: Dim) -> torch.Tensor:
        """The global indices of the entries of `dim` held here."""

    def start(self, dim: Dim) -> int:
        """The global index of the first of the consecutive entries of `dim` held here."""

    def coordinates(self, dims: tuple[Dim, ...]) -> tuple[Coords, ...]:
        """Where the local tensor lies along each dim, as `RandomIndex` wants it."""

    def index(
        self, op_id: int, shape: Sequence[int], coords: tuple[Coords, ...]
    ) -> Callable[[], RandomIndex]:
        """The index of the numbers that this step draws for a global tensor of `shape`."""


class Composite:
    """An operator of our own: a subclass says what it is, and `composite` registers it."""

    op: ClassVar[MeshOp]
    """What nodes name it by."""
    number: ClassVar[int | None] = None
    """The argument that numbers its random draws by its place in the model, and is 0 if it draws
    none: equal layers differ in it alone."""
    draws_in_order: ClassVar[bool] = False
    """Whether its random numbers can be those of sequences in another order than that in which they
    are stored, by `in_zigzag`."""
    is_fresh: ClassVar[bool] = False
    """Whether its result is memory of its own, which a collective may overwrite."""
    overwrites: ClassVar[int | None] = None
    """The argument over which it may write its result: where nothing reads that afterwards, its
    node has the keyword `overwrite`."""
    adds: ClassVar[bool] = False
    """Whether it can add its result to a tensor that is there, by `bind_adding`."""
    rule: Callable[[Call], Spec | Iterable[Placement]]
    """Which splits its operands and results may have; a `Row` of the notation, or a method."""

    def result_type(self, *args: Any) -> NodeType:
        """The type, or types, of its results, from its arguments with types in place of nodes."""
        found: NodeType = args[0]
        return found

    def padded(self, args: tuple[Arg, ...], extents: Mapping[int, Extent]) -> tuple[Arg, ...]:
        """The arguments of a call whose first operand is padded in these dims."""
        return args

    def in_zigzag(
        self, args: tuple[Arg, ...], places: Mapping[int, int], length: int, ranks: int
    ) -> tuple[Arg, ...]:
        """The arguments of a call whose first operand has sequences of `length` in zigzag order
        over `ranks` in these dims, each with how many elements are outside of the sequence."""
        return args

    def adjoint(self, context: AdjointContext) -> Cotangents:
        """Emit its backward."""
        raise PassError(f"`{self.op}` has no adjoint", help="give its class an `adjoint`")

    def lower(self, context: LoweringContext) -> Lowered:
        """Emit steps and collectives in its place, and return the last step or, of multiple
        results, each; None where each rank can run it as it is."""
        return None

    def bind(self, binding: BindingContext) -> Kernel:
        """Its kernel on one rank: a function of the arguments up to the first that is neither a
        tensor nor None."""
        raise PassError(f"`{self.op}` has no kernel", help="give its class a `bind`")

    def fuses(self, node: Node) -> bool:
        """Whether a compiler of kernels can fuse the kernel of a node with others: it is operators
        of torch that depend on its operands and its other arguments alone, and not on the rank or
        on random numbers."""
        return False

    def bind_adding(self, binding: BindingContext) -> Kernel:
        """Its kernel on one rank where its result is added to others: a function of their total and
        of its operands, which are all tensors; it makes no tensor of the total's size."""
        raise PassError(f"`{self.op}` does not add", help="give its class a `bind_adding`")


COMPOSITES: dict[MeshOp, Composite] = {}
"""Every composite, by its operator."""

_Class = TypeVar("_Class", bound="type[Composite]")


def composite(kind: _Class) -> _Class:
    """Register a composite; a class decorator."""
    assert kind.op not in COMPOSITES, kind.op
    COMPOSITES[kind.op] = kind()
    return kind


def composite_of(op: Op) -> Composite | None:
    """The composite that an operator is, if it is one."""
    return COMPOSITES.get(op) if isinstance(op, MeshOp) else None
