"""Find what a plan's selectors name in a captured model."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

from meshwright.compiler.graph.ir import Graph, Node, TensorType
from meshwright.dsl.statements import Spread, Targeted
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.missing import nothing_found, runs

S = TypeVar("S", bound=Spread)
T = TypeVar("T", bound=Targeted)
F = TypeVar("F")


def modules_of(draft: Draft, verb: type[Targeted] | None = None) -> list[str]:
    """The qualified names of all modules of the model.

    The root, whose name is empty, is among them where a statement of `verb` names it: `""`.
    """
    targets = (t for each in draft.plan.of(verb) for t in each.targets) if verb is not None else ()
    return [*([""] if any(not target.segments for target in targets) else []), *draft.modules]


def tensors_of(draft: Draft) -> list[str]:
    """The names of all parameters and buffers, every alias, and of the inputs."""
    return [*draft.captured.aliases, *inputs_of(draft)]


def inputs_of(draft: Draft) -> list[str]:
    """The names of the example's inputs, and of those that only the first program has."""
    return list(dict.fromkeys([*draft.captured.input_names, *(draft.variant_of or ())]))


def of_parameters(
    draft: Draft, verb: type[T], kept: Callable[[T], object], **fields: object
) -> dict[str, T]:
    """By parameter: the statement of the innermost module around it, or of its own name; `fields`
    select among the statements of a verb.

    Raises `PlanError` where two names of one have statements that differ in what `kept` says.
    """
    own = [s for s in draft.plan.of(verb) if all(getattr(s, f) == v for f, v in fields.items())]
    everywhere = next((each for each in own if not each.targets), None)
    aliases = draft.captured.aliases
    names = [alias for alias, name in aliases.items() if name in draft.captured.parameters]
    resolved = draft.plan.resolve(verb, [*modules_of(draft, verb), *names], **fields)
    found: dict[str, T] = {}
    for alias in names:
        path = alias.split(".")
        around = (".".join(path[:end]) for end in range(len(path), -1, -1))
        named = [resolved[each] for each in around if each in resolved]
        statement = next((each for each in named if each.targets), everywhere)
        if statement is None:
            continue
        name = aliases[alias]
        before = found.setdefault(name, statement)
        if kept(before) != kept(statement):
            raise draft.plan.error(
                "P301",
                f"two statements store `{name}` differently, which is also `{alias}`",
                [before, statement],
                help="give both names one statement",
            )
    return found


Find: TypeAlias = Callable[[Graph], Mapping[str, Sequence[F]]]
"""Finds something in a graph, by module."""


def of_modules(
    find: Find[F], verb: type[S], draft: Draft, what: str
) -> Iterator[tuple[S, Sequence[F]]]:
    """For every module under a statement of `verb`: the statement, and what `find` finds there.

    Raises `PlanError` for a module where `find` finds nothing, unless the program is a variant or
    `find` finds something in the model's eval mode.
    """
    if not draft.plan.of(verb):
        return
    found = find(draft.graph)
    for module, statement in draft.plan.resolve(verb, modules_of(draft, verb)).items():
        if found.get(module):
            yield statement, found[module]
        elif draft.variant_of is None and not _has(find, evaluated(draft, module), module):
            raise nothing_found(draft, found, module, statement, what)


def _has(find: Find[F], graph: Graph | None, module: str) -> bool:
    return graph is not None and bool(find(graph).get(module))


def evaluated(draft: Draft, module: str) -> Graph | None:
    """The graph of the model's eval mode, if `module` runs there and not in training."""
    if draft.captured.mode != "train" or runs(draft.graph, module):
        return None
    graph = draft.evaluation()
    return graph if graph is not None and runs(graph, module) else None


def entered(
    graph: Graph,
    modules: Container[str],
    fits: Callable[[TensorType], bool] = lambda type: True,
) -> dict[str, tuple[Node, Node]]:
    """By module: the first node inside that takes a tensor from outside, and that tensor.

    Weights do not count, nor does what has a type that does not fit.
    """
    found: dict[str, tuple[Node, Node]] = {}
    for node in graph.nodes:
        for module, _ in node.origin.modules:
            if module in modules and module not in found:
                value = next((n for n in node.operands() if _from_outside(n, module, fits)), None)
                if value is not None:
                    found[module] = (node, value)
    return found


def _from_outside(value: Node, module: str, fits: Callable[[TensorType], bool]) -> bool:
    outside = all(path != module for path, _ in value.origin.modules)
    tensor = isinstance(value.type, TensorType) and fits(value.type)
    return outside and tensor and not value.of_model
