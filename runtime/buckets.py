"""The buckets of one rank: flat buffers with gradients of parameters, which steps overwrite."""

from __future__ import annotations

from torch import Tensor, nn

from meshwright.compiler.codegen.linking import FlatBuffer
from meshwright.compiler.graph.ir import Graph, MeshOp, Node, OutputKind

Kept = Tensor | list[tuple[Tensor, Tensor]]
"""The gradients of a bucket before a step: all as one, or each with its view."""


class Bucket:
    """A flat buffer that a step overwrites, and the parameters whose gradients it holds, or its
    `home` does."""

    def __init__(self, buffer: FlatBuffer, parameters: list[nn.Parameter]) -> None:
        self.buffer, self.parameters = buffer, parameters
        self.home = buffer.home

    def keep(self) -> Kept:
        """Gradients to add to, safe from being overwritten: all as one buffer, or one by one."""
        held = [parameter.grad for parameter in self.parameters]
        own = self.home.gradients
        if not self.home.released and all(a is b for a, b in zip(held, own, strict=True)):
            return self.home.kept()
        pairs = zip(self.home.views, held, strict=True)
        return [(view, gradient.clone()) for view, gradient in pairs if gradient is not None]

    def give(self, kept: Kept) -> None:
        """Add what was kept, and let the parameters have their gradients."""
        if isinstance(kept, Tensor):
            self.home.flat.add_(kept)
            return
        for view, gradient in kept:
            view.add_(gradient)
        for parameter, gradient in zip(self.parameters, self.home.gradients, strict=True):
            parameter.grad = gradient

    def put_back(self, kept: Kept) -> None:
        """Let the buffer hold what it held at `keep`; gradients elsewhere were not touched."""
        if self.home.released:
            return
        if isinstance(kept, Tensor):
            self.home.flat.copy_(kept)
            return
        for view, gradient in kept:
            view.copy_(gradient)


def owners_of(graph: Graph) -> dict[str, tuple[tuple[str, ...], Node]]:
    """By the name of a bucket: the parameters whose gradients it holds, in order, and its node."""
    names: dict[tuple[str, int], str] = {}
    for gradient in graph.outputs_of(OutputKind.GRADIENT):
        bucket: Node = gradient.node.args[0]
        while bucket.op != MeshOp("bucket"):
            bucket = bucket.args[0]
        names[bucket.name, gradient.node.args[1]] = gradient.name
    return {
        node.name: (tuple(names[node.name, i] for i in range(len(node.args))), node)
        for node in graph.nodes
        if node.op == MeshOp("bucket")
    }
