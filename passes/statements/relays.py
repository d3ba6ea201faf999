"""The values of a forward by the stage in which they are used: what another stage computes is sent.

An activation goes from stage to stage until it is where it is used, so that cotangents are summed
on the way back. A weight goes straight from its owner, once for each stage that uses it, as it is
stored. What no parameter feeds is not sent: each stage computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.placing.emit import Emitter
from meshwright.passes.statements.stages import Source


class Arriving(dict[Node, Node]):
    """What stands for each node of a graph in stage `number` of all `stages`."""

    def __init__(
        self,
        number: int,
        stages: Sequence[Mapping[Node, Node]],
        sources: Mapping[Node, Source],
        emitter: Emitter,
        plan_line: str,
    ) -> None:
        super().__init__()
        self.number, self.stages, self.sources = number, stages, sources
        self.emitter, self.plan_line = emitter, plan_line

    def __missing__(self, node: Node) -> Node:
        if node.stage == self.number:
            raise KeyError(node)
        source = self.sources[node]
        if source is Source.FREE:
            return self.stages[node.stage][node]
        sender = self.number - 1 if source is Source.ACTIVATION else node.stage
        return self.received(node, self.stages[sender][node])

    def received(self, node: Node, value: Node) -> Node:
        """What stands for a node of another stage, in which it is `value`."""
        if node not in self:
            origin = replace(node.origin, plan_line=self.plan_line)
            self[node] = self.emitter.transfer(value, origin, self.number)
        return self[node]
