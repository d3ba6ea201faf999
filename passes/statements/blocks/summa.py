"""Split both matrices of every product in blocks over two axes, or over three.

Before:  up_weight: f32[32, 16] = input(parameter up.weight)
         up_bias: f32[32]       = input(parameter up.bias)
         linear: f32[8, 32]     = linear(x, up_weight, up_bias)
After:   up_weight: f32[32@col, 16@row] = input(parameter up.weight)
         up_bias: f32[32@(col, row)]    = input(parameter up.bias)
         slice: f32[8@row, 16@col]      = slice(x, row, col)
         summa: f32[8@row, 32@col]      = mesh::summa(slice, up_weight, True, [row], col)
         all_gather_replicated: f32[32@col]
                                        = all_gather_replicated(up_bias, row)
         vary: f32[32@col] varying(row) = vary(all_gather_replicated, row)
         add: f32[8@row, 32@col]        = add(summa, vary)

`summa` lays out the parameters of linears, lookup tables and norms inside the modules that it
names, but not what `columns`, `rows` or `vocab` lay out; `block_products` puts products and lookups
in blocks in the place of the model's. All else
follows from layouts: activations have rows over the first axis and features over the second, and
attention has its heads there. A table that is an output head too is multiplied as it is. What
operators use whole along an axis, such as a bias, is stored split over that as well. With `depth=`,
the 2.5-D form, activations have rows over that axis too, and weights are the same along it.

Over three axes weights are `[n@y, k@z]`, stored split over x as well, and activations `[m@(x, y),
k@z]`. Each product leaves `[m@(x, z), n@y]`, so the last two axes then change places.
Requires: modules with a product. Ensures: their parameters are pinned; products are composites.
Elsewhere: Optimus (Xu et al., 2104.05343); Tesseract (Wang et al., 2105.14500); Bian et al.,
2105.14450.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from meshwright.compiler.composites.embedding import Embedding
from meshwright.compiler.composites.norm import Norm
from meshwright.compiler.composites.product_3d import Product3d
from meshwright.compiler.composites.rows_in_blocks import RowsInBlocks
from meshwright.compiler.composites.summa import Summa, SummaTransposed
from meshwright.compiler.composites.summa_embedding import SummaEmbedding
from meshwright.compiler.graph.ir import INPUT, Arg, Builder, Node, Origin, map_nodes
from meshwright.compiler.graph.text import node_type_text
from meshwright.compiler.layout.factors import Dim, cut, dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.dsl import statements as dsl
from meshwright.dsl.errors import PlanError, either
from meshwright.dsl.suggest import selectors_of
from meshwright.passes.rewriting.rewriter import emit_for
from meshwright.passes.statements.blocks.stored import split_further
from meshwright.passes.statements.draft import Draft, Pin, input_key, with_graph
from meshwright.passes.statements.linears import (
    Linear,
    is_convolution,
    linears,
    of_parameter,
    product_of,
    tables,
)
from meshwright.passes.statements.pins import (
    contradiction,
    module_text,
    pin,
    tensor_text,
    to_dim,
    with_pin,
)
from meshwright.passes.statements.targets import modules_of

aten = torch.ops.aten

_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.unflatten.int}
_THROUGH = _VIEWS | {
    aten._to_copy.default, aten.transpose.int, aten.permute.default, aten.clone.default
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Grid:
    """The axes that split, at one product, the `inner` dim of the matrix, its `columns`, the
    `features` of what is multiplied, and the `rows` of a table."""

    inner: str
    columns: str
    features: str
    rows: str


def _grid(statement: dsl.Summa, turned: bool = False) -> _Grid:
    if len(statement.over) == 2:
        row, col = statement.over
        return _Grid(row, col, col, row)
    _, y, z = statement.over
    if turned:
        y, z = z, y
    return _Grid(z, y, z, y)


def summa(draft: Draft) -> Draft:
    """Pin the parameters of products, lookups and norms under `summa` statements."""
    if not draft.plan.of(dsl.Summa):
        return draft
    covered, found = _Covered(draft), set[dsl.Summa]()
    for node, statement in covered.statements.items():
        after = _pinned_for(draft, node, statement, covered)
        if after is not draft:
            found.add(statement)
        draft = after
    for statement in draft.plan.of(dsl.Summa):
        if statement not in found and draft.variant_of is None:
            raise _nothing(draft, statement)
    return draft


def store_once(draft: Draft) -> Draft:
    """Store what operators use whole along some axes of a `summa` split over those, too."""
    stored, levels = dict(draft.stored), dict(draft.zero)
    for name, found in draft.inputs.items():
        statement = _statement(found)
        over = statement.over if statement else ()
        rest = tuple(axis for axis in over if axis not in found.layout.split_axes)
        if statement is not None and draft.mesh.size(rest) > 1:
            layout = split_further(found.layout, rest, draft.mesh)
            stored[name], levels[name] = Pin(layout, (statement,)), 3
    return replace(draft, stored=stored, zero=levels)


def block_products(draft: Draft) -> Draft:
    """Put products and lookups in blocks in the place of those whose parameters are pinned so."""
    if not draft.plan.of(dsl.Summa):
        return draft
    covered = _Covered(draft)
    builder = Builder(draft.graph.name, draft.graph.mesh)
    mapping, first = dict[Node, Node](), dict[Node, Node]()
    for node in draft.graph.nodes:
        place = len(builder.nodes)
        found = _in_blocks(draft, covered, builder, node, mapping)
        mapping[node] = found or builder.copy(node, mapping)
        first[node] = builder.nodes[place]
    graph = builder.graph(each.of(mapping[each.node]) for each in draft.graph.outputs)
    return with_graph(draft, graph, mapping, first)


def _in_blocks(
    draft: Draft, covered: _Covered, builder: Builder, node: Node, mapping: Mapping[Node, Node]
) -> Node | None:
    """A product or lookup in blocks, if a parameter of the node is laid out so."""
    statement = covered.statements.get(node)
    weight = _multiplied(node) or _looked_up(node)
    own = draft.inputs.get(input_key(weight.weight)) if weight else None
    if statement is None or weight is None or own is None or _statement(own) is None:
        return None
    args = map_nodes(node.args, mapping.__getitem__)
    if node.op == Embedding.op:
        return _lookup(draft, builder, node, args, own, statement)
    turned = covered.turned(_left(node))
    form = _form(weight, own, _grid(statement, turned))
    if form is None:
        return None
    _check_rows(draft, node, statement)
    return _product(builder, node, args, form, _product_axes(statement, turned))


class _Covered:
    """The nodes inside modules that a statement names, with that of the innermost."""

    def __init__(self, draft: Draft) -> None:
        # What the root calls itself is inside of it, too: `**` names it.
        names = dict.fromkeys(["", *modules_of(draft, dsl.Summa)])
        resolved = draft.plan.resolve(dsl.Summa, names.keys())
        self.others = {name for name, own in draft.inputs.items() if _statement(own) is None}
        """What other statements lay out."""
        self.statements: dict[Node, dsl.Summa] = {}
        self.tables: set[Node] = set()
        """The tables that inputs of the program are looked up in: vocabularies, not positions."""
        self._turned: dict[Node, bool] = {}
        given: set[Node] = set()
        for node in draft.graph.nodes:
            around = (path for own, _ in reversed(node.origin.modules) for path in _outward(own))
            path = next((path for path in around if path in resolved), "")
            if path in resolved:
                self.statements[node] = resolved[path]
            if (node.op == INPUT and not node.of_model) or given.intersection(node.operands()):
                given.add(node)
            table = _looked_up(node)
            if table is not None and node in self.statements and node.args[1] in given:
                self.tables.add(table.weight)
            self._turn(node)

    def turned(self, node: Node) -> bool:
        """Whether the last two of three axes have changed places in activations."""
        return self._turned.get(node, False)

    def _turn(self, node: Node) -> None:
        known = [self._turned[each] for each in node.operands() if each in self._turned]
        statement = self.statements.get(node)
        if statement is not None and len(statement.over) == 3 and _multiplied(node):
            self._turned[node] = not self.turned(_left(node))
        elif known:
            self._turned[node] = known[0]


def _outward(path: str) -> Iterator[str]:
    """A module and those that contain it: nothing calls a list of modules."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _pinned_for(draft: Draft, node: Node, statement: dsl.Summa, covered: _Covered) -> Draft:
    """`draft` with the parameters pinned that a node uses."""
    weight = _multiplied(node) or _looked_up(node)
    if weight and input_key(weight.weight) in covered.others:
        return draft
    if product := _multiplied(node):
        if product.weight in covered.tables:
            return draft
        return _linear(draft, product, statement, _grid(statement, covered.turned(_left(node))))
    if table := _looked_up(node):
        return _table(draft, table, statement, table.weight in covered.tables)
    if node.op == Norm.op and not _is_part(node.args[0]):
        return _vectors(draft, node, statement, _grid(statement, covered.turned(node)).features)
    return draft


def _linear(draft: Draft, product: Linear, statement: dsl.Summa, grid: _Grid) -> Draft:
    """Pin a matrix over two axes, `[n@col, k@row]`, and biases, `[n@col]`; one that is multiplied
    as `[k, n]` elsewhere may have rows where this has columns."""
    weight, shape = product.weight, product.weight.tensor.shape
    if shape[product.features] == 1 and draft.mesh.size(grid.columns) > 1:
        raise _one_output(draft, weight, statement, grid.columns)
    text, over = tensor_text(weight, shape=False), (grid.columns,)
    columns = to_dim(draft.plan.columns_dim(statement, shape, product.features, text, over))
    key = input_key(weight)
    own = draft.inputs.get(key)
    if own is not None and _form(product, own, grid):
        draft = with_pin(draft, key, Pin(own.layout, (*own.statements, statement)))
    else:
        inner = _blocks(draft, weight, product.inputs, grid.inner, statement, "input features")
        draft = pin(draft, weight, {product.features: columns, product.inputs: inner}, statement)
    for bias in product.biases:
        draft = pin(draft, bias, {0: columns}, statement)
    return draft


def _table(draft: Draft, table: Linear, statement: dsl.Summa, is_vocabulary: bool) -> Draft:
    """Pin `[v@row, d@col]`, padded where it does not divide; of positions, `[v, d@col]`."""
    weight, grid = table.weight, _grid(statement)
    width = _blocks(draft, weight, 1, grid.features, statement, "features")
    if not is_vocabulary:
        return pin(draft, weight, {1: width}, statement)
    steps = _steps(draft, statement, grid.rows)
    size = -(-weight.tensor.shape[0] // steps) * steps
    layout, key = Layout((cut(size, grid.rows), width)), input_key(weight)
    before = draft.inputs.get(key)
    if before is not None and not before.layout.equals(layout, draft.mesh):
        raise contradiction(draft, weight, before.statements, statement)
    return with_pin(draft, key, Pin(layout, (statement,)))


def _vectors(draft: Draft, norm: Node, statement: dsl.Summa, axis: str) -> Draft:
    """Pin the weight and the bias of a norm: `[n@col]`."""
    for node in norm.args[1:3]:
        if isinstance(node, Node) and node.op == INPUT and node.of_model:
            dim = _blocks(draft, node, 0, axis, statement, "features")
            draft = pin(draft, node, {0: dim}, statement)
    return draft


def _blocks(
    draft: Draft, weight: Node, dim: int, axis: str, statement: dsl.Summa, what: str
) -> Dim:
    """A dim in blocks over an axis, each of which can be cut into panels."""
    size, steps = weight.tensor.shape[dim], _steps(draft, statement, axis)
    if size % steps == 0:
        return cut(size, axis)
    over = statement.over if len(statement.over) == 2 else (axis,)
    sizes = ", ".join(f"{name}={draft.mesh.size(name)}" for name in over)
    raise draft.plan.error(
        "P203",
        f"cannot split {size} {what} over {sizes}",
        statement.at("over"),
        subject=tensor_text(weight),
        help=f"use sizes of axes whose least common multiple divides {size}"
        if len(over) > 1
        else f"use a size of the axis that divides {size}",
    )


def _steps(draft: Draft, statement: dsl.Summa, axis: str) -> int:
    """The number of equal parts that a dim over an axis is cut into."""
    over = statement.over if len(statement.over) == 2 else (axis,)
    return math.lcm(*map(draft.mesh.size, over))


def _is_part(x: Node) -> bool:
    """Whether the last dim of a value is a part of features, such as those of a head."""
    while x.op in _THROUGH:
        operand: Node = x.args[0]
        if operand.tensor.shape[-1] != x.tensor.shape[-1] and x.op in _VIEWS:
            return True
        x = operand
    return False


def _multiplied(node: Node) -> Linear | None:
    """The matrix that rows are multiplied by, if it is a parameter."""
    product = None if is_convolution(node.op) else product_of(node)
    rows = product is not None and len(_left(node).tensor.shape) > 1
    return of_parameter(product) if rows else None


def _looked_up(node: Node) -> Linear | None:
    """The table of a lookup, if it is a parameter."""
    return of_parameter(Linear(node.args[0], 0, 1)) if node.op == Embedding.op else None


def _left(node: Node) -> Node:
    """What a product multiplies by its matrix."""
    found: Node = node.args[1 if node.op == aten.addmm.default else 0]
    return found


def _statement(found: Pin) -> dsl.Summa | None:
    return next((each for each in found.statements if isinstance(each, dsl.Summa)), None)


def _product_axes(statement: dsl.Summa, turned: bool) -> tuple[Arg, ...]:
    """The last arguments of the composite that multiplies."""
    if len(statement.over) == 2:
        row, col = statement.over
        return (*([statement.depth] if statement.depth else []), row), col
    grid = _grid(statement, turned)
    return statement.over[0], grid.columns, grid.inner


def _check_rows(draft: Draft, node: Node, statement: dsl.Summa) -> None:
    """Raises `PlanError` where the rows of what is multiplied cannot be split."""
    over, (*leading, _) = _over_rows(draft, statement), _left(node).tensor.shape
    if _divide(leading, over):
        return
    sizes = ", ".join(f"{axis}={size}" for axis, size in over.items())
    found = node_type_text(_left(node), draft.graph)
    raise draft.plan.error(
        "P203",
        f"cannot split {' x '.join(map(str, leading))} rows over {sizes}",
        statement.at("over"),
        subject=f"what {module_text(node.origin.module)} multiplies: {found}",
        help="use a batch that the axes divide, or smaller axes",
    )


def _over_rows(draft: Draft, statement: dsl.Summa) -> dict[str, int]:
    """The axes that split rows, with their sizes; of two ways, the one with more parts."""
    first, *others = statement.over
    second = [statement.depth] if len(others) == 1 else others
    ways = [{axis: draft.mesh.size(axis) for axis in (first, each) if axis} for each in second]
    return max(ways, key=lambda sizes: math.prod(sizes.values()))


def _divide(leading: Iterable[int], over: Mapping[str, int]) -> bool:
    return any(size % math.prod(over.values()) == 0 for size in leading)


def _lookup(
    draft: Draft,
    builder: Builder,
    node: Node,
    args: tuple[Arg, ...],
    own: Pin,
    statement: dsl.Summa,
) -> Node | None:
    """A lookup in a table over two axes; None for one whose rows are whole, and where nothing is to
    be done."""
    grid = _grid(statement)
    if grid.rows not in own.layout.split_axes:
        return None
    emit = partial(emit_for, node, builder, origin=_in_place_of(node))
    if len(statement.over) == 3:
        if not _divide(node.tensor.shape[:-1], _over_rows(draft, statement)):
            return None
        found = emit_for(node, builder, node.op, args, name=node.name)
        return emit(RowsInBlocks.op, (found, (statement.over[0], grid.columns), grid.features))
    table, index, padding_idx, *known = args
    num_rows = known[0] if known else table.tensor.shape[0]
    given = (table, index, padding_idx, num_rows, *_product_axes(statement, False))
    return emit(SummaEmbedding.op, given, name=node.name)


def _form(weight: Linear, own: Pin, grid: _Grid) -> str | None:
    """Whether a parameter is laid out as a `matrix` or, with rows where that has columns, as a
    `table`; None if a `shard` gives it another layout."""
    dims = (own.layout.dims[dim] for dim in (weight.features, weight.inputs))
    axes = tuple(map(dim_axes, dims))
    if axes == ((grid.columns,), (grid.inner,)):
        return "matrix"
    return "table" if axes == ((grid.rows,), (grid.features,)) else None


def _product(
    builder: Builder, node: Node, args: tuple[Arg, ...], form: str, axes: tuple[Arg, ...]
) -> Node:
    """A product in blocks, and a bias after it."""
    product = product_of(node)
    assert product is not None
    x, weight, bias = (*args, None)[:3]
    if node.op == aten.addmm.default:
        bias, x, weight = args
    op, is_transposed = Product3d.op, product.features == 0
    if form == "table":
        op, is_transposed = SummaTransposed.op, not is_transposed
    elif len(axes) == 2:
        op = Summa.op
    emit = partial(emit_for, node, builder, origin=_in_place_of(node))
    found = emit(op, (x, weight, is_transposed, *axes))
    return emit(aten.add.Tensor, (found, bias)) if bias is not None else found


def _in_place_of(node: Node) -> Origin:
    return replace(node.origin, replaced=node.op)


def _one_output(draft: Draft, weight: Node, statement: dsl.Summa, axis: str) -> PlanError:
    (module,) = selectors_of([input_key(weight).rpartition(".")[0]])
    return draft.plan.error(
        "P203",
        f"cannot split one output feature over {axis}={draft.mesh.size(axis)}",
        statement.at("over"),
        subject=tensor_text(weight),
        help=f"write `rows {module} over {axis}` as well: it splits the input features of that "
        "linear alone",
    )


def _nothing(draft: Draft, statement: dsl.Summa) -> PlanError:
    own = draft.plan.resolve(dsl.Summa, modules_of(draft, dsl.Summa))
    weights = {**linears(draft.graph), **tables(draft.graph)}
    inside = (n for n in weights if any(own.get(path) is statement for path in _outward(n)))
    if name := next(inside, None):
        return draft.plan.error(
            "P501",
            f"other statements lay out what is inside of this `summa`, such as `{name}`",
            statement,
            help="remove it, or name such modules themselves",
        )
    names = selectors_of(list(weights))[:3]
    return draft.plan.error(
        "P501",
        "`summa` needs a linear, an embedding or a norm inside of what it names",
        statement,
        help=f"name modules that have one, such as {either(names)}" if names else "remove it",
    )
