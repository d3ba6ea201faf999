"""Split activations along the sequence, between the split linears of a region.

Before:  getitem: f32[8, 16, 16]  = norm[0]
         linear: f32[8, 16, 64]   = linear(getitem, block_up_weight)
         linear_1: f32[8, 16, 16] = linear(relu, block_down_weight)
         add: f32[8, 16, 16]      = add(x, linear_1)
After:   slice: f32[8, 16@tp, 16]               = slice(x, tp)
         getitem: f32[8, 16@tp, 16]             = norm[0]
         all_gather: f32[8, 16, 16] varying(tp) = all_gather(getitem, tp)
         linear: f32[8, 16, 64@tp]              = linear(all_gather, block_up_weight)
         linear_1: f32[8, 16, 16] partial(tp)   = linear(relu, block_down_weight)
         reduce_scatter: f32[8, 16@tp, 16]      = reduce_scatter(linear_1, tp)
         add: f32[8, 16@tp, 16]                 = add(slice, reduce_scatter)

What enters a region is split, and sums that row-parallel linears leave pending are scattered
instead of reduced; gathers before column-parallel linears follow from the layouts, and so do their
adjoints. A sequence that does not divide is padded (`../padding/sequences.py`).
Requires: a normalised graph. Ensures: the regions that the partitioner reads.
Elsewhere: Megatron's sequence parallelism (Korthikanti et al., 2205.05198).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from meshwright.compiler.graph.ir import Node
from meshwright.dsl.errors import either
from meshwright.dsl.statements import Sequence
from meshwright.dsl.suggest import selectors_of
from meshwright.passes.statements.draft import Draft, Region
from meshwright.passes.statements.pins import module_text
from meshwright.passes.statements.sequences.regions import depth, entered_activations
from meshwright.passes.statements.targets import evaluated, modules_of


def sequence(draft: Draft) -> Draft:
    """Make one region of the modules of each `sequence` statement."""
    found = draft.plan.resolve(Sequence, modules_of(draft, Sequence))
    by_statement: dict[int, tuple[Sequence, set[str]]] = {}
    for module, statement in found.items():
        by_statement.setdefault(id(statement), (statement, set()))[1].add(module)
    for statement, modules in by_statement.values():
        _check(draft, frozenset(modules), statement)
        keeps = "all_gather" in statement.keep
        region = Region(frozenset(modules), statement.over, statement, keeps)
        draft = replace(draft, regions=(*draft.regions, region))
    return draft


def gathers_again(regions: tuple[Region, ...], node: Node) -> bool:
    """Whether the backward gathers an activation again, its shard being what is saved.

    It does for sequences that are split, unless the innermost region around the gather says
    `keep=[all_gather]`. The line of the plan tells a gather of a sequence from others.
    """
    lines = node.origin.plan_line.split(", ")
    if all(region.statement.plan_line not in lines for region in regions):
        return False
    axes = set(node.kwargs["axes"])
    around = [region for region in regions if depth(node, region) >= 0 and axes & set(region.axes)]
    return not around or not max(around, key=partial(depth, node)).keep_gathered


def _check(draft: Draft, modules: frozenset[str], statement: Sequence) -> None:
    """Raises `PlanError` for a module that no activation enters."""
    entered = entered_activations(draft.graph, modules)
    for module in sorted(modules - set(entered)) if draft.variant_of is None else ():
        graph = evaluated(draft, module)
        if graph is not None and module in entered_activations(graph, modules):
            continue
        raise draft.plan.error(
            "P501",
            f"no activation `[batch, sequence, ...]` enters {module_text(module)}",
            statement,
            help=_such_as(draft),
        )


def _such_as(draft: Draft) -> str:
    """The outermost modules that an activation enters."""
    entered = entered_activations(draft.graph, frozenset(modules_of(draft)))
    outermost = (
        name
        for name in draft.modules
        if name in entered and not any(name.startswith(f"{other}.") for other in entered)
    )
    found = sorted(selectors_of(outermost), key=lambda text: "*" not in text)
    if not found:
        return "remove the statement: no module of the model takes one"
    return f"name modules that take one, such as {either(found[:3])}"
