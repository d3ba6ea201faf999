"""Find the linear maps and tables of a module: which parameter, and which of its dims is what."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meshwright.compiler.composites.embedding import Embedding
from meshwright.compiler.graph.ir import INPUT, Graph, Node, Op

aten = torch.ops.aten

_CONVOLUTIONS = {
    aten.conv1d.default: 6, aten.conv2d.default: 6, aten.conv3d.default: 6,
    aten.conv1d.padding: 6, aten.conv2d.padding: 6, aten.conv3d.padding: 6,
    aten.conv_transpose1d.default: 6, aten.conv_transpose2d.input: 6,
    aten.conv_transpose3d.input: 6, aten.convolution.default: 8,
}  # fmt: skip
"""Convolutions, and where each takes its number of groups."""

_TRANSPOSED = {
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input
}  # fmt: skip


def is_convolution(op: Op) -> bool:
    """Whether an operator is a convolution, `op(x, weight, bias, ...)`."""
    return op in _CONVOLUTIONS


def contracted_dim(node: Node) -> int | None:
    """The dim of a convolution's weight that is summed over, in whole or group by group.

    None for what is not a convolution, and where groups share that dim.
    """
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
    """A product with a parameter: `features` is the weight's dim of output features (of a table:
    its rows), `inputs` that of input features; `biases` are parameters added to the result."""

    weight: Node
    features: int
    inputs: int
    biases: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class ComputedWeight:
    """The second factor of a product that is not a parameter but made of `parameters` alone."""

    weight: Node
    features: int
    inputs: int
    parameters: tuple[Node, ...]
    biases: tuple[Node, ...]


def computed_weights(graph: Graph) -> dict[str, ComputedWeight]:
    """By module: its first product whose weight is computed, as that of a parametrized linear."""
    found: dict[str, ComputedWeight] = {}
    for node in graph.nodes:
        operands = _operands(node)
        if operands is None or node.origin.module in found:
            continue
        weight, features, inputs, biases = operands
        sources = _sources(weight)
        if sources and weight.op != INPUT:
            found[node.origin.module] = ComputedWeight(weight, features, inputs, sources, biases)
    return found


def _sources(node: Node) -> tuple[Node, ...]:
    """The parameters that a value is computed from; none if anything that a user passes is, too."""
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
        linear = _linear(node)
        if linear is not None and linear not in found.setdefault(node.origin.module, []):
            found[node.origin.module].append(_with_added_bias(linear, node, users))
    return {module: each for module, each in found.items() if each}


def tables(graph: Graph) -> dict[str, list[Linear]]:
    """The lookup tables of every module that looks something up itself."""
    found: dict[str, list[Linear]] = {}
    for node in graph.nodes:
        if node.op == Embedding.op and (source := _parameter(node.args[0])):
            found.setdefault(node.origin.module, []).append(Linear(source[0], 0, 1))
    return found


def _linear(node: Node) -> Linear | None:
    """The product that a node is, if its second factor is a parameter."""
    operands = _operands(node)
    return None if operands is None else _product(*operands)


def _operands(node: Node) -> tuple[Node, int, int, tuple[Node, ...]] | None:
    """The second factor of a product, its dims of output and input features, and the biases."""
    if node.op == aten.linear.default:
        biases = tuple(arg for arg in node.args[2:3] if isinstance(arg, Node) and arg.op == INPUT)
        return node.args[1], 0, 1, biases
    if node.op == aten.addmm.default:
        biases = (node.args[0],) if node.args[0].op == INPUT else ()
        return node.args[2], 1, 0, biases
    if node.op in (aten.mm.default, aten.matmul.default):
        weight = node.args[1]
        return (weight, 1, 0, ()) if len(weight.tensor.shape) == 2 else None
    inputs = contracted_dim(node)
    if inputs is not None:
        biases = tuple(arg for arg in node.args[2:3] if isinstance(arg, Node) and arg.op == INPUT)
        return node.args[1], 1 - inputs, inputs, biases
    return None


def _product(weight: Node, features: int, inputs: int, biases: tuple[Node, ...]) -> Linear | None:
    source = _parameter(weight)
    if source is None:
        return None
    parameter, swapped = source
    return (
        Linear(parameter, inputs, features, biases)
        if swapped
        else Linear(parameter, features, inputs, biases)
    )


def _parameter(node: Node) -> tuple[Node, bool] | None:
    """The parameter behind casts and transposes, and whether its two dims are swapped."""
    swapped = False
    while node.op != INPUT:
        if node.op in (aten.t.default, aten.transpose.int, aten.permute.default):
            swapped = not swapped
        elif node.op != aten._to_copy.default:
            return None
        node = node.args[0]
    return (node, swapped) if node.args[0] == "parameter" else None


def _with_added_bias(linear: Linear, node: Node, users: dict[Node, list[Node]]) -> Linear:
    """The linear with a parameter that its module adds to the product afterwards."""
    size = linear.weight.tensor.shape[linear.features]
    added: list[Node] = []
    for user in users[node]:
        if user.op == aten.add.Tensor and user.origin.module == node.origin.module:
            added += [
                operand
                for operand in user.operands()
                if operand.op == INPUT
                and operand.args[0] == "parameter"
                and operand.tensor.shape == (size,)
            ]
    return Linear(linear.weight, linear.features, linear.inputs, linear.biases + tuple(added))
