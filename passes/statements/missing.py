"""Say why a statement about a module's linears finds none there, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from meshwright.compiler.graph.ir import INPUT, Graph, Node
from meshwright.compiler.graph.text import op_text
from meshwright.dsl.errors import PlanError, either
from meshwright.dsl.layouts import DimTemplate, FactorTemplate, format_axes
from meshwright.dsl.statements import Context, Fused, Rows, Spread, Vocab
from meshwright.dsl.suggest import selectors_of
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.linears import computed_weights, tables
from meshwright.passes.statements.pins import module_text

_LETTERS = "oiklmn"


@dataclass(frozen=True, slots=True)
class Reason:
    """The reason why a module has nothing that a statement needs, and the help."""

    why: str
    help: str


def nothing_found(
    draft: Draft, found: Iterable[str], module: str, statement: Spread, what: str
) -> PlanError:
    """The error for a statement about `module`, which is not among those `found` to have `what`."""
    found = list(found)
    reason = _no_attention(module, found) if isinstance(statement, Context) else None
    reason = reason or (
        _used_elsewhere(draft, found, module, statement)
        or _computed(draft, module, statement)
        or _other_operator(draft, module, statement)
        or _never_run(draft, module, found)
        or Reason(f"{module_text(module)} does not call one itself", _such_as(module, found))
    )
    return draft.plan.error(
        "P501", f"`{statement.verb}` needs {what}, and {reason.why}", statement, help=reason.help
    )


def _no_attention(module: str, found: Sequence[str]) -> Reason:
    """Whatever else the module runs. `F.scaled_dot_product_attention` is what is split."""
    why = f"{module_text(module)} does not call `scaled_dot_product_attention`"
    if found:
        return Reason(why, _such_as(module, [name for name in found if name] or found))
    return Reason(why, "call it in the model, where its products and softmax are spelled out")


def _such_as(module: str, found: Sequence[str]) -> str:
    inner = [name for name in found if name.startswith(f"{module}.")]
    shown = selectors_of(inner or found)[:3]
    return f"name modules that do, such as {either(shown)}" if shown else "name another module"


def _used_elsewhere(
    draft: Draft, found: Sequence[str], module: str, statement: Spread
) -> Reason | None:
    """The module never runs itself: others use its parameters."""
    own = _own_parameters(draft, module)
    if runs(draft.graph, module) or not own:
        return None
    users = draft.graph.users()
    places = {n: list(dict.fromkeys(u.origin.module for u in users[n])) for n in own.values()}
    by_name = {name: places[node] for name, node in own.items() if places[node]}
    if not by_name:
        return None
    where = list(dict.fromkeys(place for each in by_name.values() for place in each))
    place = either(_shown(where), "and")
    names, are = either(by_name, "and"), "is" if len(by_name) == 1 else "are"
    why = f"`{module}` is never run: {names} {are} used in {place}"
    others = [place for place in where if place in found]
    if others:
        return Reason(why, f"name {either(selectors_of(others), 'and')}")
    return Reason(why, _shard_lines(draft, {n: own[n] for n in by_name}, statement, module))


def _computed(draft: Draft, module: str, statement: Spread) -> Reason | None:
    """The module multiplies by a tensor that is computed from parameters."""
    found = computed_weights(draft.graph).get(module)
    if found is None:
        return None
    product, parameters = found
    names = {node.args[1]: node for node in parameters}
    dim = product.inputs if isinstance(statement, Rows) else product.features
    size = product.weight.tensor.shape[dim]
    # Those with the dim that is to be split: of `b @ a`, one of the two.
    fitting = {
        name: node
        for name, node in names.items()
        if len(node.tensor.shape) > dim and node.tensor.shape[dim] == size
    }
    why = f"the weight of {module_text(module)} is computed from {either(names, 'and')}"
    return Reason(why, _shard_lines(draft, fitting or names, statement, module, product.biases))


def _other_operator(draft: Draft, module: str, statement: Spread) -> Reason | None:
    """The module uses its parameters in something else: a lookup, a recurrence."""
    own = _own_parameters(draft, module)
    users = draft.graph.users()
    dim, ranks = 1 if isinstance(statement, Rows) else 0, draft.mesh.size(statement.over)
    fitting = {
        name: node
        for name, node in own.items()
        if len(node.tensor.shape) > 1 and node.tensor.shape[dim] % ranks == 0
    }
    uses = [user for node in fitting.values() for user in users[node]]
    if not fitting or not uses or isinstance(statement, Vocab):
        return None
    operator = op_text(uses[0].op).removeprefix("mesh::")
    why = f"{module_text(module)} runs `{operator}`, which is not one"
    if tables(draft.graph).get(module):
        target = next(each for each in statement.targets if each.matches(module))
        line = f"vocab {target} over {format_axes(statement.over)}"
        return Reason(why, f"write `{line}`")
    return Reason(why, _shard_lines(draft, fitting, statement, module))


def _never_run(draft: Draft, module: str, found: Sequence[str]) -> Reason | None:
    holds_others = any(name.startswith(f"{module}.") for name in found)
    if holds_others or runs(draft.graph, module):
        return None
    return Reason(f"`{module}` is never run, or nothing uses its result", _such_as(module, found))


def runs(graph: Graph, module: str) -> bool:
    """Whether any operator of the graph is inside a module."""
    return any(
        module == path
        for node in graph.nodes
        if node.op != INPUT
        for path, _ in node.origin.modules
    )


def _own_parameters(draft: Draft, module: str) -> dict[str, Node]:
    """The parameters that a module holds itself, by the names that they have there."""
    nodes = {node.args[1]: node for node in draft.graph.inputs if node.args[0] == "parameter"}
    found: dict[str, Node] = {}
    for alias, own in draft.captured.aliases.items():
        if alias.rpartition(".")[0] == module and own in nodes:
            found[alias] = nodes[own]
    return found


def _shard_lines(
    draft: Draft,
    parameters: Mapping[str, Node],
    statement: Spread,
    module: str,
    biases: Sequence[Node] = (),
) -> str:
    """The `shard` statements that lay these parameters out as `statement` would."""
    rows = isinstance(statement, Rows)
    named = {name: len(node.tensor.shape) for name, node in parameters.items()}
    named |= {node.args[1]: 1 for node in biases}
    by_layout: dict[str, list[str]] = {}
    for name, rank in named.items():
        if rank and not (rows and rank == 1):
            selectors = by_layout.setdefault(_layout(statement, rank), [])
            selectors.append(_selector(name, module, statement))
    lines = [f"shard {', '.join(names)} {layout}" for layout, names in by_layout.items()]
    return f"write {either(lines, 'and')}" if lines else "name another module"


def _selector(name: str, module: str, statement: Spread) -> str:
    """A parameter's name, with the wildcards by which the statement names its module."""
    target = next(each for each in statement.targets if each.matches(module))
    inside = name.startswith(f"{module}.")
    return target.text + name.removeprefix(module) if inside else selectors_of([name])[0]


def _layout(statement: Spread, rank: int) -> str:
    dim = 1 if isinstance(statement, Rows) else 0
    dims = [DimTemplate(((FactorTemplate(None, letter),),)) for letter in _LETTERS[:rank]]
    factors = statement.factors if isinstance(statement, Fused) else None
    split = (factors or dims[dim]).split_first_named(statement.over)
    return f"[{', '.join(str(split if i == dim else each) for i, each in enumerate(dims))}]"


def _shown(places: Iterable[str]) -> Iterator[str]:
    return (place or "the model" for place in places)
