"""Have layers use the parameters of one of them.

Before:  blocks_0_weight: f32[16, 16] = input(parameter blocks.0.weight)
         blocks_1_weight: f32[16, 16] = input(parameter blocks.1.weight)
         linear: f32[8, 16]           = linear(x, blocks_0_weight)
         linear_1: f32[8, 16]         = linear(linear, blocks_1_weight)
After:   blocks_0_weight: f32[16, 16] = input(parameter blocks.0.weight)
         linear: f32[8, 16]           = linear(x, blocks_0_weight)
         linear_1: f32[8, 16]         = linear(linear, blocks_0_weight)

What layers share is one parameter from here on, as tied weights are: its gradient is the sum over
its uses, and an optimizer keeps the state of one. The other names become aliases of the first, and
`Captured.apart` has the model as it is. Buffers stay the layers' own.
Requires: nothing. Ensures: one input and one entry of `captured` for each parameter that is shared.
Elsewhere: ALBERT (1909.11942), WideNet (2107.11817), Pseudo-to-Real (2110.03888).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor

from meshwright.compiler.graph.ir import INPUT, Builder, Graph, InputKind, Node, TensorType, rewrite
from meshwright.compiler.graph.text import dtype_text
from meshwright.compiler.program import Shared
from meshwright.dsl.errors import either
from meshwright.dsl.selectors import Selector
from meshwright.dsl.statements import Share
from meshwright.dsl.suggest import nothing_matches
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.pins import module_text
from meshwright.passes.statements.targets import modules_of

_Names: TypeAlias = Mapping[str, str]
"""The parameters of a layer, by the names that they have inside it."""


def share(draft: Draft) -> Draft:
    """`draft` with one parameter for all those that its `share` statements make one."""
    if not draft.plan.of(Share):
        return draft
    found = [each for layers in _by_statement(draft) for each in _sets(draft, layers)]
    captured = draft.captured
    one = _One(list(captured.parameters))
    for each in found:
        first, *others = each.layers
        for name, other in ((name, other) for name in each.parameters for other in others):
            one.join(captured.aliases[f"{first}.{name}"], captured.aliases[f"{other}.{name}"])
    shared = replace(
        captured,
        graph=_joined(captured.graph, one),
        parameters={n: value for n, value in captured.parameters.items() if one.of(n) == n},
        aliases={alias: one.of(name) for alias, name in captured.aliases.items()},
        apart=captured,
    )
    graph = _joined(draft.graph, one)
    return replace(draft, graph=graph, captured=shared, shared=tuple(found))


class _One:
    """Which parameters are one: the first of them in the model's order stands for all."""

    def __init__(self, names: Sequence[str]) -> None:
        self._order = {name: place for place, name in enumerate(names)}
        self._first: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The name that stands for a parameter; that of anything else is its own."""
        while name in self._first:
            name = self._first[name]
        return name

    def join(self, one: str, other: str) -> None:
        """Make two parameters one."""
        first, second = sorted((self.of(one), self.of(other)), key=self._order.__getitem__)
        if first != second:
            self._first[second] = first


def _joined(graph: Graph, one: _One) -> Graph:
    """The graph with one input for all parameters that are one."""
    found: dict[str, Node] = {}

    def input_of(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        if node.op != INPUT or node.args[0] != InputKind.PARAMETER:
            return None
        name = one.of(node.args[1])
        if name not in found:
            found[name] = builder.copy(node, mapping, args=(node.args[0], name))
        return found[name]

    return rewrite(graph, input_of)


@dataclass
class _Layers:
    """The layers of one statement, in the model's order."""

    statement: Share
    own: dict[str, dict[str, str]] = field(default_factory=dict)
    """By layer: its parameters, by the names that they have inside it."""
    inner: set[str] = field(default_factory=set)
    """The names inside of layers that are up to statements about layers further inside."""

    @property
    def together(self) -> Iterator[Sequence[str]]:
        """The layers that share parameters with one another."""
        layers, every = list(self.own), self.statement.every
        if every is not None:
            yield from (layers[i::every] for i in range(min(every, len(layers))))
            return
        size = self.statement.group or len(layers)
        yield from (layers[start : start + size] for start in range(0, len(layers), size))


def _by_statement(draft: Draft) -> Iterable[_Layers]:
    """The layers of each statement. Of two around a parameter, the inner one shares it."""
    resolved = draft.plan.resolve(Share, modules_of(draft, Share))
    found: dict[int, _Layers] = {}
    for layer, statement in resolved.items():
        layers = found.setdefault(id(statement), _Layers(statement))
        outer = next((each for each in _around(layer)[1:] if each in layers.own), None)
        if outer is not None:
            raise draft.plan.error(
                "P501",
                f"`{layer}` is inside {module_text(outer)}, and both are to share parameters",
                statement,
                help="name layers alone, such as `blocks.*`, not what is in them",
            )
        layers.own[layer] = {}
    for alias, name in draft.captured.aliases.items():
        around = [each for each in _around(alias) if each in resolved]
        if name in draft.captured.parameters and around:
            found[id(resolved[around[0]])].own[around[0]][_inside(alias, around[0])] = name
            for each in around[1:]:
                found[id(resolved[each])].inner.add(_inside(alias, each))
    return found.values()


def _sets(draft: Draft, layers: _Layers) -> Iterable[Shared]:
    """The sets of layers that share parameters, and which.

    Raises `PlanError` for layers that are not alike, and where nothing is shared.
    """
    statement = layers.statement
    private = {*layers.inner, *_excepted(draft, layers)}
    found = []
    for together in layers.together:
        first, *others = together
        for other in others:
            _check_alike(draft, layers, first, other, private)
        if others and (names := tuple(n for n in layers.own[first] if n not in private)):
            found.append(Shared(tuple(together), names, statement.plan_line))
    if not found:
        why, help = _nothing(layers)
        raise draft.plan.error("P501", f"`share` shares nothing: {why}", statement, help=help)
    return found


def _nothing(layers: _Layers) -> tuple[str, str]:
    """Why the layers share nothing, and what to do."""
    first, statement = module_text(next(iter(layers.own))), layers.statement
    if len(layers.own) == 1:
        return f"{first} is the only layer", "name more layers, such as `blocks.*`"
    if not any(layers.own.values()):
        return f"{first} has no parameters of its own", "name layers that have some"
    if all(len(together) == 1 for together in layers.together):
        option = "group" if statement.group is not None else "every"
        count = statement.group or statement.every
        return f"with `{option}={count}` every layer is alone", f"change `{option}=`"
    return "every parameter is left to its layer", "leave fewer of them to it"


def _excepted(draft: Draft, layers: _Layers) -> Iterator[str]:
    """The parameters that `except=` leaves to their layers, by their names inside."""
    parameters = list(dict.fromkeys(name for own in layers.own.values() for name in own))
    modules = (
        _inside(m, layer) for m in draft.modules for layer in layers.own if layer in _around(m)[1:]
    )
    known = [*dict.fromkeys(modules), *parameters]
    for text in layers.statement.except_:
        selector = Selector(text, layers.statement.at("except"))
        matched = selector.match(known)
        if not matched:
            raise nothing_matches(selector, known)
        yield from (name for name in parameters if not set(matched).isdisjoint(_around(name)))


def _check_alike(
    draft: Draft, layers: _Layers, first: str, other: str, private: Collection[str]
) -> None:
    """Raises `PlanError` unless two layers have the same parameters, but for `private` ones."""
    one, two = (first, layers.own[first]), (other, layers.own[other])
    for name in dict.fromkeys((*one[1], *two[1])):
        if name not in private and (unlike := _unlike(draft, name, one, two)):
            names = (*layers.statement.except_, name)
            listed = ", ".join(each if each.isidentifier() else f'"{each}"' for each in names)
            raise draft.plan.error(
                "P501",
                f"layers that share parameters must be alike, and {unlike[0]}",
                layers.statement,
                subject=unlike[1:],
                help=f"leave `{name}` to each layer, `except=[{listed}]`, or name others",
            )


def _unlike(
    draft: Draft, name: str, one: tuple[str, _Names], two: tuple[str, _Names]
) -> tuple[str, ...]:
    """How a parameter of two layers differs, and what it is in each; empty if it does not."""
    for (here, own), (there, _) in ((one, two), (two, one)):
        if name not in own:
            return (f"`{here}` has no `{name}`, which `{there}` has",)
    first, other = (f"`{layer}.{name}`" for layer, _ in (one, two))
    ours, theirs = (draft.captured.parameters[own[name]] for _, own in (one, two))
    shown = f"{first}: {_text(ours)}", f"{other}: {_text(theirs)}"
    if TensorType.of(ours) != TensorType.of(theirs):
        return f"{other} has another shape or type than {first}", *shown
    if ours.requires_grad != theirs.requires_grad:
        return f"{other if ours.requires_grad else first} is frozen", *shown
    ties = [(layer, [n for n in own if own[n] == own[name]]) for layer, own in (one, two)]
    if ties[0][1] == ties[1][1]:
        return ()
    where, tied = max(ties, key=lambda each: len(each[1]))
    return (f"{either(tied, 'and')} are one tensor in `{where}` alone",)


def _text(tensor: Tensor) -> str:
    frozen = "" if tensor.requires_grad else ", frozen"
    return f"{dtype_text(tensor.dtype)}{list(tensor.shape)}{frozen}"


def _around(name: str) -> list[str]:
    """A name, and those of the modules around it, the innermost first and the model's last."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _inside(name: str, layer: str) -> str:
    """The name that something has inside of a layer."""
    return name.removeprefix(f"{layer}.") if layer else name
