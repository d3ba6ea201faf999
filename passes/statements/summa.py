"""Split both matrices of every product in blocks over two axes.

Before:  up_weight: f32[32, 16] = input(parameter up.weight)
         up_bias: f32[32]       = input(parameter up.bias)
         linear: f32[8, 32]     = linear(x, up_weight, up_bias)
After:   up_weight: f32[32@col, 16@row] = input(parameter up.weight)
         up_bias: f32[32@(col, row)]    = input(parameter up.bias)
         slice: f32[8@row, 16@col]      = slice(x, (row, col))
         summa: f32[8@row, 32@col]      = mesh::summa(slice, up_weight, True, (row,), col)
         all_gather: f32[32@col] varying(row) = all_gather(up_bias, row)
         add: f32[8@row, 32@col]        = add(summa, all_gather)

`summa` lays out the parameters of linears, lookup tables and norms inside the modules that it
names; `grid_products` puts products and lookups in blocks in the place of those of the model. All
else follows from layouts: activations keep rows over the first axis and features over the second,
attention has its heads over that. A table that is also an output head is multiplied as it is,
`[v@row, d@col]`. What has one dim, and a table of positions, is stored once: split over both axes,
and gathered over the first. With `depth=`, the 2.5-D form, activations have rows over that axis
too, and weights are the same along it.
Requires: modules with a product. Ensures: their parameters are pinned; products are composites.
Elsewhere: Optimus (Xu et al., 2104.05343); Tesseract (Wang et al., 2105.14500).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from meshwright.compiler.composites.embedding import Embedding
from meshwright.compiler.composites.norm import Norm
from meshwright.compiler.composites.summa import Summa, SummaTransposed
from meshwright.compiler.composites.summa_embedding import SummaEmbedding
from meshwright.compiler.graph.ir import INPUT, Arg, Builder, Node, map_nodes, rewrite
from meshwright.compiler.layout.factors import Dim, cut, dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.dsl import statements as dsl
from meshwright.dsl.errors import PlanError, either
from meshwright.dsl.suggest import selectors_of
from meshwright.passes.rewriting.rewriter import emit_for
from meshwright.passes.statements.draft import Draft, Pin, input_key
from meshwright.passes.statements.linears import (
    Linear,
    is_convolution,
    linears,
    of_parameter,
    product_of,
    tables,
)
from meshwright.passes.statements.pins import contradiction, pin, tensor_text, to_dim, with_pin
from meshwright.passes.statements.stored import split_further
from meshwright.passes.statements.targets import modules_of

aten = torch.ops.aten

Found = Iterator[tuple[dsl.Summa, Node]]


def summa(draft: Draft) -> Draft:
    """Pin the parameters of products, lookups and norms under `summa` statements."""
    if not draft.plan.of(dsl.Summa):
        return draft
    tables = {table.weight for _, table in _lookups(draft)}
    found: set[dsl.Summa] = set()
    for statement, node in _covered(draft):
        pinned = draft
        if product := of_parameter(product_of(node)):
            if product.weight not in tables and not is_convolution(node.op):
                pinned = _linear(draft, product, statement)
        elif node.op == Embedding.op and (table := of_parameter(Linear(node.args[0], 0, 1))):
            pinned = _table(draft, table, statement, is_vocabulary=table.weight in tables)
        elif node.op == Norm.op and not _is_part(node.args[0]):
            pinned = _vectors(draft, node.args[1:3], statement)
        if pinned is not draft:
            found.add(statement)
        draft = pinned
    for statement in draft.plan.of(dsl.Summa):
        if statement not in found and draft.variant_of is None:
            raise _nothing(draft, statement)
    return draft


def store_once(draft: Draft) -> Draft:
    """Store what operators use whole along the first axis of a `summa` split over that, too."""
    stored, levels = dict(draft.stored), dict(draft.zero)
    for name, found in draft.inputs.items():
        statement = next((s for s in found.statements if isinstance(s, dsl.Summa)), None)
        if statement is None or statement.over[0] in found.layout.split_axes:
            continue
        layout = split_further(found.layout, statement.over[:1], draft.mesh)
        stored[name], levels[name] = Pin(layout, (statement,)), 3
    return replace(draft, stored=stored, zero=levels)


def grid_products(draft: Draft) -> Draft:
    """Put products and lookups in blocks in the place of those whose parameters are pinned so."""
    if not draft.plan.of(dsl.Summa):
        return draft
    covered = {node: statement for statement, node in _covered(draft)}

    def replaced(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        if node not in covered:
            return None
        return _in_blocks(draft, builder, node, mapping, covered[node])

    return replace(draft, graph=rewrite(draft.graph, replaced))


def _covered(draft: Draft) -> Found:
    """The nodes inside modules that a statement names, with that of the innermost."""
    resolved = draft.plan.resolve(dsl.Summa, modules_of(draft, dsl.Summa))
    for node in draft.graph.nodes:
        paths = (path for path, _ in reversed(node.origin.modules))
        statement = next((resolved[path] for path in paths if path in resolved), None)
        statement = statement or resolved.get("")
        if statement is not None:
            yield statement, node


def _lookups(draft: Draft) -> Iterator[tuple[dsl.Summa, Linear]]:
    """The tables that inputs of the program are looked up in: vocabularies, not positions."""
    given: set[Node] = set()
    for node in draft.graph.nodes:
        argument = node.op == INPUT and not node.of_model
        if argument or any(operand in given for operand in node.operands()):
            given.add(node)
    for statement, node in _covered(draft):
        table = of_parameter(Linear(node.args[0], 0, 1)) if node.op == Embedding.op else None
        if table is not None and node.args[1] in given:
            yield statement, table


def _linear(draft: Draft, product: Linear, statement: dsl.Summa) -> Draft:
    """Pin `[n@col, k@row]`, and biases `[n@col]`."""
    weight, (row, _) = product.weight, statement.over
    shape, text = weight.tensor.shape, tensor_text(weight, shape=False)
    columns = to_dim(draft.plan.columns_dim(statement, shape, product.features, text))
    inner = _blocks(draft, weight, product.inputs, row, statement, "input features")
    draft = pin(draft, weight, {product.features: columns, product.inputs: inner}, statement)
    for bias in product.biases:
        draft = pin(draft, bias, {0: columns}, statement)
    return draft


def _table(draft: Draft, table: Linear, statement: dsl.Summa, *, is_vocabulary: bool) -> Draft:
    """Pin `[v@row, d@col]`, padded where it does not divide; of positions, `[v, d@col]`."""
    weight, (row, col) = table.weight, statement.over
    width = _blocks(draft, weight, 1, col, statement, "features")
    if not is_vocabulary:
        return pin(draft, weight, {1: width}, statement)
    key, steps = input_key(weight), _steps(draft, statement)
    size = -(-weight.tensor.shape[0] // steps) * steps
    layout = Layout((cut(size, row), width))
    before = draft.inputs.get(key)
    if before is not None and not before.layout.equals(layout, draft.mesh):
        raise contradiction(draft, weight, before.statements, statement)
    return with_pin(draft, key, Pin(layout, (statement,)))


def _vectors(draft: Draft, nodes: Iterable[object], statement: dsl.Summa) -> Draft:
    """Pin the weight and the bias of a norm: `[n@col]`."""
    for node in nodes:
        if isinstance(node, Node) and node.op == INPUT and node.of_model:
            dim = _blocks(draft, node, 0, statement.over[1], statement, "features")
            draft = pin(draft, node, {0: dim}, statement)
    return draft


def _blocks(
    draft: Draft, weight: Node, dim: int, axis: str, statement: dsl.Summa, what: str
) -> Dim:
    """A dim in blocks over an axis, each of which can be cut into panels."""
    size, steps = weight.tensor.shape[dim], _steps(draft, statement)
    if size % steps == 0:
        return cut(size, axis)
    sizes = ", ".join(f"{name}={draft.mesh.size(name)}" for name in statement.over)
    raise draft.plan.error(
        "P203",
        f"cannot split {size} {what} over {sizes}",
        statement.at("over"),
        subject=tensor_text(weight),
        help=f"use axes whose least common multiple, {steps} here, divides {size}",
    )


def _steps(draft: Draft, statement: dsl.Summa) -> int:
    return math.lcm(*map(draft.mesh.size, statement.over))


def _is_part(x: Node) -> bool:
    """Whether the last dim of a value is a part of features, such as those of a head."""
    while x.op in _THROUGH:
        operand: Node = x.args[0]
        if operand.tensor.shape[-1] != x.tensor.shape[-1] and x.op in _VIEWS:
            return True
        x = operand
    return False


_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.unflatten.int}
_THROUGH = _VIEWS | {
    aten._to_copy.default, aten.transpose.int, aten.permute.default, aten.clone.default
}  # fmt: skip


def _in_blocks(
    draft: Draft,
    builder: Builder,
    node: Node,
    mapping: Mapping[Node, Node],
    statement: dsl.Summa,
) -> Node | None:
    """What takes the place of a node; None for what stays as it is."""
    (row, col), depth = statement.over, statement.depth
    rows = (*([depth] if depth else []), row)
    args = map_nodes(node.args, mapping.__getitem__)
    if node.op == Embedding.op:
        pinned = _pinned(draft, of_parameter(Linear(node.args[0], 0, 1)))
        if pinned is None or row not in pinned.layout.split_axes:
            return None
        table, index, padding_idx, *known = args
        num_rows = known[0] if known else table.tensor.shape[0]
        given = (table, index, padding_idx, num_rows, rows, col)
        return emit_for(node, builder, SummaEmbedding.op, given, name=node.name)
    product = product_of(node)
    pinned = _pinned(draft, of_parameter(product))
    if product is None or pinned is None or is_convolution(node.op):
        return None
    bias, x, weight = _operands(node, args)
    if len(x.tensor.shape) < 2:
        return None
    parameter = of_parameter(product)
    assert parameter is not None
    split = dim_axes(pinned.layout.dims[parameter.features])
    op, is_transposed = (
        (SummaTransposed.op, product.features == 1)
        if split == (row,)
        else (Summa.op, product.features == 0)
    )
    found = emit_for(node, builder, op, (x, weight, is_transposed, rows, col))
    return emit_for(node, builder, aten.add.Tensor, (found, bias)) if bias else found


def _operands(node: Node, args: tuple[Arg, ...]) -> tuple[Node | None, Node, Node]:
    """The bias of a product, what is multiplied, and the weight."""
    if node.op == aten.addmm.default:
        return args[0], args[1], args[2]
    x, weight, bias = (*args, None)[:3]
    return bias, x, weight


def _pinned(draft: Draft, found: Linear | None) -> Pin | None:
    """How a statement `summa` has laid out a weight."""
    own = draft.inputs.get(input_key(found.weight)) if found else None
    return own if own and any(isinstance(s, dsl.Summa) for s in own.statements) else None


def _nothing(draft: Draft, statement: dsl.Summa) -> PlanError:
    names = selectors_of(list({**linears(draft.graph), **tables(draft.graph)}))[:3]
    return draft.plan.error(
        "P501",
        "`summa` needs a linear, an embedding or a norm inside of what it names",
        statement,
        help=f"name modules that have one, such as {either(names)}" if names else "remove it",
    )
