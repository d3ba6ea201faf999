"""Find the linear maps and tables of modules: their parameters, and what the dims of each are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from meshwright.compiler.composites.embedding import Embedding
from meshwright.compiler.composites.grouped import GroupedMM
from meshwright.compiler.graph.ir import INPUT, Graph, Node, Op

aten = torch.ops.aten

_CONVOLUTIONS = {
    aten.conv1d.default: 6, aten.conv2d.default: 6, aten.conv3d.default: 6,
    aten.conv1d.padding: 6, aten.conv2d.padding: 6, aten.conv3d.padding: 6,
    aten.conv_transpose1d.default: 6, aten.conv_transpose2d.input: 6,
    aten.conv_transpose3d.input: 6, aten.convolution.default: 8,
}  # fmt: skip
"""Convolutions, and the position of each one's number of groups."""

_TRANSPOSED = {
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input
}  # fmt: skip

_STACKED = (aten.bmm.default, GroupedMM.op)
"""Products of rows with matrices that are stacked."""

_REORDERING = {
    aten._to_copy.default, aten.t.default, aten.transpose.int, aten.permute.default,
}  # fmt: skip
"""Operators between a parameter and its use as a weight."""


def is_convolution(op: Op) -> bool:
    """Whether an operator is a convolution, `op(x, weight, bias, ...)`."""
    return op in _CONVOLUTIONS


def contracted_dim(node: Node) -> int | None:
    """The dim of a linear's or convolution's weight that is summed over, in whole or by group.

    None for any other operator, and where groups share that dim.
    """
    if node.op == aten.linear.default:
        return 1
    if node.op not in _CONVOLUTIONS:
        return None
    place = _CONVOLUTIONS[node.op]
    groups = node.args[place] if len(node.args) > place else node.kwargs.get("groups", 1)
    if not _is_transposed(node):
        return 1
    return 0 if groups == 1 else None


def _is_transposed(node: Node) -> bool:
    return node.op in _TRANSPOSED or (node.op == aten.convolution.default and node.args[6])


@dataclass(frozen=True, slots=True)
class Linear:
    """A product with a weight: `features` is the weight's dim of output features (of a table: its
    rows), `inputs` that of input features; `biases` are parameters added to the result."""

    weight: Node
    features: int
    inputs: int
    biases: tuple[Node, ...] = ()


def computed_weights(graph: Graph) -> dict[str, tuple[Linear, tuple[Node, ...]]]:
    """By module: its first product whose weight is computed from parameters alone, as that of a
    parametrized linear, and these parameters."""
    found: dict[str, tuple[Linear, tuple[Node, ...]]] = {}
    for node in graph.nodes:
        product = product_of(node)
        if product is None or product.weight.op == INPUT or node.origin.module in found:
            continue
        if sources := _sources(product.weight):
            found[node.origin.module] = product, sources
    return found


def _sources(node: Node) -> tuple[Node, ...]:
    """The parameters that a value is computed from; none if it depends on an argument too."""
    found: dict[Node, None] = {}
    waiting, seen = [node], {node}
    while waiting:
        each = waiting.pop()
        if each.op == INPUT and not each.of_model:
            return ()
        if each.op == INPUT and each.args[0] == "parameter":
            found[each] = None
        for operand in each.operands():
            if operand not in seen:
                seen.add(operand)
                waiting.append(operand)
    return tuple(sorted(found, key=lambda each: str(each.args[1])))


def linears(graph: Graph) -> dict[str, list[Linear]]:
    """The linear maps of every module that calls one itself."""
    found: dict[str, list[Linear]] = {}
    users = graph.users()
    for node in graph.nodes:
        linear = of_parameter(product_of(node) or _product_of_each(node))
        if linear is not None and linear not in found.setdefault(node.origin.module, []):
            found[node.origin.module].append(_with_added_bias(linear, node, users))
    return {module: each for module, each in found.items() if each}


def tables(graph: Graph) -> dict[str, list[Linear]]:
    """The lookup tables of every module that looks something up itself."""
    found: dict[str, list[Linear]] = {}
    for node in graph.nodes:
        if node.op == Embedding.op and (table := of_parameter(Linear(node.args[0], 0, 1))):
            found.setdefault(node.origin.module, []).append(table)
    return found


def product_of(node: Node) -> Linear | None:
    """The product that a node is, whatever its weight is computed from."""
    if node.op in (aten.mm.default, aten.matmul.default):
        weight = node.args[1]
        return Linear(weight, 1, 0) if len(weight.tensor.shape) == 2 else None
    if node.op == aten.addmm.default:
        bias, _, weight = node.args
        inputs: int | None = 0
    else:
        inputs = contracted_dim(node)
        _, weight, bias = (*node.args, None, None, None)[:3]
    if inputs is None:
        return None
    if isinstance(bias, Node) and bias.op == aten._to_copy.default:
        bias = bias.args[0]
    biases = (bias,) if isinstance(bias, Node) and bias.op == INPUT else ()
    return Linear(weight, 1 - inputs, inputs, biases)


def _product_of_each(node: Node) -> Linear | None:
    """The product that every expert of a mixture makes, with stacked weights `[e, i, o]`."""
    return Linear(node.args[1], 2, 1) if node.op in _STACKED else None


def of_parameter(product: Linear | None) -> Linear | None:
    """The product with the parameter behind its weight, and the dims as they are there; None if the
    weight is not a parameter that is cast or has its dims in another order."""
    if product is None:
        return None
    weight, features, inputs = product.weight, product.features, product.inputs
    while weight.op != INPUT:
        order = _order(weight)
        if order is None:
            return None
        weight, features, inputs = weight.args[0], order[features], order[inputs]
    if weight.args[0] != "parameter":
        return None
    return Linear(weight, features, inputs, product.biases)


def _order(node: Node) -> list[int] | None:
    """By dim of a cast or transpose: which of its operand's it is; None for any other operator."""
    if node.op not in _REORDERING:
        return None
    order = list(range(len(node.tensor.shape)))
    if node.op == aten.t.default:
        order.reverse()
    elif node.op == aten.transpose.int:
        a, b = node.args[1:]
        order[a], order[b] = order[b], order[a]
    elif node.op == aten.permute.default:
        order = [order[dim] for dim in node.args[1]]
    return order


def _with_added_bias(linear: Linear, node: Node, users: Mapping[Node, Sequence[Node]]) -> Linear:
    """The linear with a parameter that its module adds to the product afterwards."""
    stacked = linear.weight.tensor.shape[:-2] if node.op in _STACKED else ()
    shape = (*stacked, linear.weight.tensor.shape[linear.features])
    added: list[Node] = []
    for user in _users(node, users):
        if user.op == aten.add.Tensor and user.origin.module == node.origin.module:
            added += [
                operand
                for operand in map(_looked_up if stacked else _itself, user.operands())
                if operand.op == INPUT
                and operand.args[0] == "parameter"
                and operand.tensor.shape == shape
            ]
    return replace(linear, biases=(*linear.biases, *added))


def _itself(node: Node) -> Node:
    return node


def _users(node: Node, users: Mapping[Node, Sequence[Node]]) -> Iterator[Node]:
    """What takes a node, or rows that it is a view of."""
    for user in users[node]:
        yield user
        if user.op == aten.view.default:
            yield from _users(user, users)


def _looked_up(node: Node) -> Node:
    """What a node is a view of, or has rows of."""
    while node.op in (aten.view.default, aten.index.Tensor):
        node = node.args[0]
    return node
