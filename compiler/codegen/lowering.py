"""Lower a graph to instructions, in its own order: every collective is waited for at once."""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from meshwright.compiler.codegen.functions import FAST, is_large_product, large_product
from meshwright.compiler.codegen.instructions import (
    Arrive,
    BucketView,
    Call,
    Constant,
    Copy,
    Exchange,
    Instruction,
    Instructions,
    Item,
    Move,
    Operand,
    Rearrange,
    Return,
    Save,
    Take,
    Value,
    Variable,
)
from meshwright.compiler.codegen.linking import RankContext, bind
from meshwright.compiler.codegen.local import local_args
from meshwright.compiler.codegen.packing import Packing
from meshwright.compiler.codegen.totals import (
    add_composite,
    add_large_product,
    add_product,
    add_to,
    write_composite,
)
from meshwright.compiler.graph.aliasing import IDENTITIES, is_allocated
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    MOVES,
    SAVED,
    WAIT,
    Arg,
    Graph,
    MeshOp,
    Node,
    Output,
    OutputKind,
    op_stem,
)
from meshwright.compiler.graph.transfers import (
    COUNTS,
    TransferKey,
    collective_kind,
    transfer_key,
    transfers_of,
)
from meshwright.compiler.layout.collectives import Transfer
from meshwright.compiler.layout.wires import Wire
from meshwright.compiler.placing.composite import composite_of

aten = torch.ops.aten

OUT = {aten.mm.default, aten.sum.dim_IntList, aten.add.Tensor}
"""Operators that can write straight into a bucket."""

_FRESH = {
    aten.mm.default, aten.matmul.default, aten.linear.default, aten.bmm.default,
    aten.add.Tensor, aten.sum.default, aten.sum.dim_IntList, MeshOp("bucket"),
}  # fmt: skip
"""Operators whose result is memory of its own, which a collective may overwrite."""

_HANDLED = {"device", "layout", "pin_memory"}
"""Keywords of factories that a rank is given its own value for, or that are left out."""

_ADD = Constant("_add_to", add_to)
_ADD_PRODUCT = Constant("_add_product", add_product)
_ADD_LARGE = Constant("_add_large_product", add_large_product)
_DEVICE = Constant("_device", lambda context: context.device)


def lowered(
    graph: Graph, *, first_wire: int = 0, added: frozenset[int] = frozenset()
) -> Instructions:
    """The instructions of a graph; its wires are numbered from `first_wire`.

    The saved values of the numbers `added` are added up over all turns of a loop: each turn is
    handed the totals, and the first of them writes over what they hold.
    """
    return _Lowering(graph, first_wire, added).run()


class _Lowering:
    def __init__(self, graph: Graph, first_wire: int, added: frozenset[int]) -> None:
        self.graph, self.mesh, self.num_wires = graph, graph.mesh, first_wire
        self.users, self.returned = graph.users(), graph.returned
        self.body: list[Instruction] = []
        self.constants: dict[str, Constant] = {}
        self.values: dict[Node, Value] = {}
        self.names: set[str] = set()
        self.shared: dict[TransferKey, Value] = {}
        self.outputs: dict[Node, list[Output]] = {}
        """By node: the outputs that it computes."""
        for output in graph.outputs:
            self.outputs.setdefault(output.node, []).append(output)
        self.totals: dict[Node, list[int]] = {}
        """What is added up, and the numbers of the totals."""
        for output in graph.outputs_of(OutputKind.SAVED):
            if int(output.name) in added:
                self.totals.setdefault(output.node, []).append(int(output.name))
        self.late: dict[Node, None] = {}
        """What others send, which is brought to where it is kept once all is computed."""
        self.received: set[Value] = set()
        """What exchanges bring to memory of its own."""
        self.packed: dict[Node, Packing] = {}
        """What was sent together and is not apart yet."""
        self.slots: dict[Node, list[BucketView]] = {}
        """The places in buckets that a node's value goes to."""
        for node in graph.nodes:
            if node.op == MeshOp("bucket"):
                for i, part in enumerate(node.args):
                    self.slots.setdefault(part, []).append(BucketView(node.name, i))

    def run(self) -> Instructions:
        inputs = {self._variable(node): node for node in self.graph.inputs}
        for node in self.graph.nodes:
            if node.op != INPUT:
                self._node(node)
            if self.values.get(node) in self.received:
                self.late[node] = None
            else:
                # At once, so that its own memory is free again.
                self._keep(node)
        for node in self.late:
            self._keep(node)
        self._return()
        buckets = {
            node.name: node
            for node in self.graph.nodes
            if node.op == MeshOp("bucket") and is_allocated(node, self.mesh)
        }
        return Instructions(self.graph.name, inputs, tuple(self.body), buckets)

    def _variable(self, node: Node) -> Variable:
        found = self.values[node] = self._named(node.name)
        return found

    def _named(self, name: str) -> Variable:
        """A variable of a name like this one, that no other has."""
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            name = f"v_{''.join(c if c.isalnum() else '_' for c in name)}"
        while not self.names.isdisjoint((name, f"{name}_handle")):
            name += "_"
        self.names |= {name, f"{name}_handle"}
        return Variable(name)

    def _constant(self, stem: str, recipe: Callable[[RankContext], Any]) -> Constant:
        """A constant of one node, under a name that no other has."""
        name = f"_{stem}{len(self.constants)}_"
        found = self.constants[name] = Constant(name, recipe)
        return found

    def _fixed(self, stem: str, value: Any) -> Constant:
        """A constant that is the same on every rank and for every node."""
        name = f"_{stem}"
        return self._shared(name, lambda _: value)

    def _shared(self, name: str, recipe: Callable[[RankContext], Any]) -> Constant:
        """A constant for every node that has it under this name."""
        return self.constants.setdefault(name, Constant(name, recipe))

    def _node(self, node: Node) -> None:
        op = node.op
        if op in IDENTITIES or self._is_cast_by_use(node):
            self.values[node] = self.values[node.args[0]]
        elif op == SAVED:
            self.body.append(Take(self._variable(node), node.args[0], node))
        elif op == GETITEM:
            if node.args[0] in self.packed:
                self._unpack(node.args[0])
            source = self.values[node.args[0]]
            self.body.append(Item(self._variable(node), source, node.args[1], node))
        elif op in MOVES:
            source = self.values[node.args[0]]
            self._keep_parts(node.args[0])
            self.body.append(Move(self._variable(node), source, node))
        elif op == WAIT:
            handle = self.values[node.args[0]]
            self.body.append(Arrive(self._variable(node), handle, node))
        elif op == MeshOp("bucket"):
            self.values[node] = BucketView(node.name)
        elif op == MeshOp("bucket_item"):
            return  # a gradient: it stays where it is
        elif collective_kind(op) is not None:
            self._collective(node)
        elif composite_of(op):
            self._composite(node)
        else:
            self._torch(node)

    def _composite(self, node: Node) -> None:
        """A call of a composite, which adds to a total or writes into a bucket where it can."""
        known, stem = composite_of(node.op), op_stem(node.op)
        assert known is not None
        operands = tuple(self.values[operand] for operand in node.operands())
        out = self._own_slot(node) if known.adds else None
        if self._adds_itself(node):
            adder = self._constant(f"add_{stem}", partial(add_composite, node))
            self._call_adding(node, adder, operands)
        elif out:
            self.values[node] = out
            writer = self._constant(f"write_{stem}", partial(write_composite, node))
            self.body.append(Call(None, writer, operands, {}, node, out))
        else:
            kernel = self._constant(stem, partial(bind, node))
            self.body.append(Call(self._variable(node), kernel, operands, {}, node))

    def _call_adding(self, node: Node, adder: Constant, operands: tuple[Operand, ...]) -> None:
        """Have a call add to the only total of a node."""
        (total,) = self.totals[node]
        held = self.values[node] = self._take(node, total)
        self.body.append(Call(None, adder, (held, *operands), {}, node))

    def _torch(self, node: Node) -> None:
        """A call of torch on local sizes, written into a bucket where that is all it is for."""
        assert not isinstance(node.op, MeshOp), node.op
        results = node.layout if isinstance(node.layout, tuple) else (node.placed,)
        operands = [operand.placed for operand in node.operands()]
        args, kwargs = local_args(node.op, node.args, node.kwargs, operands, results, self.mesh)
        if self._adds_itself(node):
            add = _ADD_LARGE if is_large_product(node, self.mesh) else _ADD_PRODUCT
            self._call_adding(node, add, tuple(self._operand(arg) for arg in args))
            return
        function = self._function(node)
        given = {key: self._operand(v) for key, v in kwargs.items() if key not in _HANDLED}
        if any(argument.name == "device" for argument in node.op._schema.arguments) and (
            "device" in kwargs or not operands
        ):
            given["device"] = _DEVICE
        out = self._own_slot(node) if node.op in OUT else None
        place = None if out else self._variable(node)
        if out:
            self.values[node] = out
        positional = tuple(self._operand(arg) for arg in args)
        self.body.append(Call(place, function, positional, given, node, out))

    def _function(self, node: Node) -> Constant:
        """What computes a node on a rank, by a name that all like it share."""
        name, function = FAST.get(node.op, (str(node.op).replace(".", "_"), node.op))
        if is_large_product(node, self.mesh):
            return self._shared(f"_large_{name}", large_product(node.op))
        return self._fixed(name, function)

    def _operand(self, arg: Arg) -> Operand:
        if isinstance(arg, Node):
            return self.values[arg]
        if isinstance(arg, (tuple, list)):
            return tuple(self._operand(item) for item in arg)
        if isinstance(arg, (torch.dtype, torch.memory_format, torch.layout)):
            return self._fixed(str(arg).replace(".", "_"), arg)
        if isinstance(arg, torch.device):
            return _DEVICE
        plain = isinstance(arg, (bool, int, str)) or arg is None
        if plain or (isinstance(arg, float) and math.isfinite(arg)):
            return arg
        return self._constant("constant", lambda _: arg)

    def _own_slot(self, node: Node) -> BucketView | None:
        """The place in a bucket that a value is for, and nothing else."""
        places = self.slots.get(node, [])
        alone = len(places) == len(self.users[node]) == 1 and node not in self.returned
        return places[0] if alone else None

    def _adds_itself(self, node: Node) -> bool:
        """Whether a value is for one total and nothing else, and its operator adds to that: matrix
        products do, and some composites."""
        known = composite_of(node.op)
        alone = len(self.totals.get(node, ())) == 1 and not self.users[node]
        adds = known.adds if known else node.op == aten.mm.default
        return adds and alone and len(self.outputs[node]) == 1

    def _is_cast_by_use(self, node: Node) -> bool:
        """Whether a cast can be left out: all that takes it copies or adds it to memory of its
        type, which casts as well."""
        users, kept = self.users[node], self.outputs.get(node, [])
        added = kept and all(each.kind is OutputKind.SAVED and node in self.totals for each in kept)
        placed = users and all(user.op == MeshOp("bucket") for user in users)
        return node.op == aten._to_copy.default and bool(
            (added and not users) or (placed and not kept)
        )

    def _take(self, node: Node, number: int) -> Variable:
        held = self._named(f"{node.name}_total")
        self.body.append(Take(held, number, node))
        return held

    def _keep(self, node: Node) -> None:
        """Add a value to its totals and copy it to its places in buckets, unless it was computed
        there."""
        if not self._adds_itself(node):
            for number in self.totals.get(node, ()):
                held = self._take(node, number)
                self.body.append(Call(None, _ADD, (held, self.values[node]), {}, node))
        for slot in self.slots.get(node, ()):
            if self.values[node] != slot:
                self.body.append(Copy(self.values[node], slot, node))

    def _keep_parts(self, source: Node) -> None:
        """Bring all of a bucket there that is to leave it."""
        if source.op == MeshOp("bucket"):
            for part in [each for each in self.late if each in source.args]:
                del self.late[part]
                self._keep(part)

    def _collective(self, node: Node) -> None:
        source: Node = node.args[0]
        transfer, *others = transfers_of(node, self.mesh)
        if others:
            self._together(node, (transfer, *others))
            return
        key = transfer_key(node)
        if transfer.wire is None:
            steps = (*transfer.before, *transfer.after)
            self.values[node] = given = self.values[source]
            if steps:
                self.body.append(Rearrange(self._variable(node), given, steps, node))
        elif key in self.shared:
            self.values[node] = self.shared[key]
        else:
            self._exchange(node, transfer, transfer.wire)
            self.shared[key] = self.values[node]

    def _exchange(self, node: Node, transfer: Transfer, wire: Wire) -> None:
        source: Node = node.args[0]
        given = self.values[source]
        self._keep_parts(source)
        before, after = tuple(transfer.before), tuple(transfer.after)
        wire = replace(wire, index=self.num_wires)
        self.num_wires += 1
        found = self._variable(node)
        donate = self._may_overwrite(source)
        into = given if isinstance(given, BucketView) else self._own_slot(node)
        follows = self.values[node.kwargs["after"]] if "after" in node.kwargs else None
        counts = tuple(self.values[node.kwargs[key]] for key in COUNTS if key in node.kwargs)
        self.body.append(
            Exchange(found, wire, given, before, after, donate, into, node, follows, counts)
        )
        if into is not None:
            self.values[node] = into
        else:
            self.received.add(found)

    def _together(self, node: Node, transfers: tuple[Transfer, ...]) -> None:
        """Send operands as one flat tensor, packed before and taken apart where it is read."""
        packing = Packing(node, transfers)
        given = tuple(self.values[operand] for operand in node.args)
        packed, sent = self._named(f"{node.name}_packed"), self._named(f"{node.name}_sent")
        self.body.append(Call(packed, self._constant("pack", packing.pack), given, {}, node))
        wire = replace(packing.wire, index=self.num_wires)
        self.num_wires += 1
        self.body.append(Exchange(sent, wire, packed, (), (), False, None, node))
        self.values[node], self.packed[node] = sent, packing

    def _unpack(self, node: Node) -> None:
        unpack = self._constant("unpack", self.packed.pop(node).unpack)
        sent = (self.values[node],)
        self.body.append(Call(self._variable(node), unpack, sent, {}, node))

    def _may_overwrite(self, node: Node) -> bool:
        if len(self.users[node]) > 1 or node in self.returned:
            return False
        known = composite_of(node.op)
        return known.is_fresh if known else node.op in _FRESH

    def _return(self) -> None:
        handed = self.graph.outputs_of(OutputKind.SAVED)
        totals = {number for numbers in self.totals.values() for number in numbers}
        saved = tuple(
            (int(output.name), self.values[output.node])
            for output in handed
            if int(output.name) not in totals
        )
        if saved:
            self.body.append(Save(saved))
        self.body.append(Return(tuple(self.values[each.node] for each in self.graph.results)))
