"""The graph before and after each pass, and as a pass's docstring shows it."""

from __future__ import annotations

import re
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import nn

import meshwright
from meshwright.compiler.capture.capture import capture
from meshwright.compiler.graph.ir import Graph, Node
from meshwright.compiler.graph.text import call_text, node_type_text
from meshwright.compiler.layout.mesh import Mesh
from meshwright.passes.driver import PASSES, REWRITING
from meshwright.passes.statements.draft import Draft


def captured(model: nn.Module, example: Any, plan: str) -> Draft:
    """The program as it is captured, no pass carried out."""
    parsed = meshwright.Plan.parse(plan)
    mesh = Mesh(parsed.mesh)
    found = capture(model, example)
    modules = tuple(name for name, _ in model.named_modules() if name)
    return Draft(parsed, mesh, found, found.graph, modules)


def stages(model: nn.Module, example: Any, plan: str) -> dict[str, Graph]:
    """The graph after each pass, by the pass's name; `captured` before all.

    Of the passes from `separate` on it is the one that they are given.
    """
    draft = captured(model, example, plan)
    found = {"captured": draft.graph}
    graph = draft.graph
    for rewriting in REWRITING:
        graph = found[rewriting.__name__] = rewriting(graph)
    draft = replace(draft, graph=replace(graph, mesh=draft.mesh))
    for each in PASSES:
        draft = each(draft)
        found[each.__name__] = draft.graph
    return found


def shown(graph: Graph, *names: str) -> list[str]:
    """These nodes as `name: type = call`, in the order of the graph."""
    nodes = {node.name: node for node in graph.nodes}
    missing = set(names) - set(nodes)
    assert not missing, f"no {missing} among {list(nodes)}"
    return [_line(node, graph) for node in graph.nodes if node.name in names]


def _line(node: Node, graph: Graph) -> str:
    return f"{node.name}: {node_type_text(node, graph)} = {call_text(node)}"


def documented(module: ModuleType) -> tuple[list[str], list[str]]:
    """What stands behind `Before:` and `After:` in a pass's docstring, spaces made single.

    A line that is indented further goes on from the one before.
    """
    text = module.__doc__ or ""
    found = re.search(r"\nBefore:  (.*?)\nAfter:   (.*?)\n\n", text, re.DOTALL)
    assert found, f"{module.__name__} shows no graph before and after"
    before, after = (part.replace("\n" + " " * 10, " ").split("\n") for part in found.groups())
    return [_single(line) for line in before], [_single(line) for line in after]


def _single(line: str) -> str:
    return re.sub(r"\s+", " ", line).strip()


def check_documented(module: ModuleType, before: list[str], after: list[str]) -> None:
    """Assert that a pass's docstring shows these lines."""
    assert documented(module) == (before, after), "\n".join(
        ["the docstring should show:", "Before:", *before, "After:", *after]
    )
