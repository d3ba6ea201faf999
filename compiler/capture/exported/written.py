"""Make explicit where gradients stop in memory that is written in place.

Before:  o = zeros_like(h)          no history
         s = sum(o)
         v = slice(o, 1, 0, 4)
         copy_(v, h4)               from here on `o` and `v` have one
         k = detach(o)
         mul_(k, 2)                 only `k` is used from here on
After:   o = zeros_like(h)
         o_stop = clone(detach(o))  what is written follows; what was there before does not
         s = sum(detach(o_stop))
         v = slice(o_stop, 1, 0, 4)
         copy_(v, h4)
         k = clone(detach(o_stop))  memory of its own, so that its history is its own too
         mul_(k, 2)

Functionalising makes every alias of what was written anew, through its views. For views autograd
does the same. A `detach` in between would stop what was written as well, and so becomes a copy;
where both sides of it are used after a write, it stays if the detached side is only read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from meshwright.compiler.capture.exported.history import History
from meshwright.compiler.capture.exported.writes import writes, written_operands
from meshwright.compiler.capture.origin import origin_of
from meshwright.compiler.errors import CaptureError

_DETACH = torch.ops.aten.detach.default
_CLONE = torch.ops.aten.clone.default

Use = tuple[fx.Node, fx.Node]
"""A user and its operand."""


class Written:
    """The memory of a graph that is written to, and the uses of what lies in it."""

    def __init__(self, graph: fx.Graph, history: History, stopped: set[fx.Node]) -> None:
        self.graph, self.history, self.stopped = graph, history, stopped
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.writes = [(n, o) for n in graph.nodes if writes(n) for o in written_operands(n)]
        self.targets = set(self.writes)
        self.memory = frozenset[int]().union(*(history.memory[o] for _, o in self.writes))
        self.shared = frozenset[int]().union(
            *(history.memory[o] for write, o in self.writes if self._is_read_elsewhere(write, o))
        )
        """The memory in which what is detached shows what is written, and the other way round."""

    def __contains__(self, node: fx.Node) -> bool:
        return bool(self.history.memory.get(node, frozenset()) & self.memory)

    def stop_gradients(self) -> None:
        """Put in the `detach`es and copies. Raises `CaptureError` where no graph can say it."""
        for write, operand in self.writes:
            self._refuse_hidden_write(write, operand)
        stops = [*self._idle_uses(), *self._idle_sources()]
        for user, operand in stops:
            with self.graph.inserting_before(user):
                user.replace_input_with(operand, self._call(_DETACH, operand))
        for node in self.order:
            if node in self and node.op == "call_function":
                self._own_memory(node)

    def _own_memory(self, node: fx.Node) -> None:
        """Give a value that begins without a history memory of its own behind a `detach`."""
        if self.history.families[node] is not node or not is_floating(node):
            return
        detached = node.target is _DETACH
        if (detached and self.history.memory[node] & self.shared) or self.history.follows[node]:
            return
        with self.graph.inserting_after(node):
            stop = node if detached else self._call(_DETACH, node)
        with self.graph.inserting_after(stop):
            copy = self._call(_CLONE, stop)
        node.replace_all_uses_with(copy, lambda user: user not in (stop, copy))

    def _call(self, op: torch._ops.OpOverload, node: fx.Node) -> fx.Node:
        made: fx.Node = self.graph.call_function(op, (node,))
        made.meta = dict(node.meta)
        return made

    def _uses(self, operand: fx.Node) -> Iterator[Use]:
        """The uses of what shares memory with `operand`, other than by a view of it."""
        families = self.history.families
        for node in self.history.sharing(operand):
            for user in node.users:
                if (user, node) in self.targets or families.get(user) is not families[node]:
                    yield user, node

    def _uses_after(self, write: fx.Node, operand: fx.Node) -> Iterator[Use]:
        for user, node in self._uses(operand):
            if self.order[user] > self.order[write]:
                yield user, node

    def _is_read_elsewhere(self, write: fx.Node, operand: fx.Node) -> bool:
        """Whether another family that was there before the write is used after it."""
        families = self.history.families
        others = {families[node] for _, node in self._uses_after(write, operand)}
        if (root := self._root(operand)).op == "placeholder":
            others.add(root)  # the next step reads it
        others.discard(families[operand])
        return any(self.order[other] < self.order[write] for other in others)

    def _root(self, node: fx.Node) -> fx.Node:
        """The value that made the memory that `node` lies in."""
        return self.history.families[self.history.sharing(node)[0]]

    def _passes(self, use: Use) -> bool:
        """Whether a gradient comes through this use."""
        user, _ = use
        if user.op == "output":
            return self.history.reaches[use]
        idle = user in self.stopped or user.target is _DETACH or use in self.targets
        return not idle and self.history.reaches[use] and self.history.follows[user]

    def _idle_uses(self) -> Iterator[Use]:
        """The uses of what is written whose gradient goes nowhere, as autograd saw it."""
        for node in self.order:
            for user in node.users if node in self and is_floating(node) else ():
                view = self.history.families.get(user) is self.history.families[node]
                idle = not self.history.reaches[user, node] and user not in self.stopped
                if idle and not view and (user, node) not in self.targets:
                    yield user, node

    def _idle_sources(self) -> Iterator[Use]:
        """What is written where the gradient of what it is written to does not follow."""
        for write, operand in self.writes:
            apart = self.history.memory[operand] & self.shared
            hidden = apart and self.history.families[operand] is not self._root(operand)
            if hidden or write in self.stopped or not self.history.follows[write]:
                for source in write.all_input_nodes:
                    if is_floating(source) and (write, source) not in self.targets:
                        yield write, source

    def _refuse_hidden_write(self, write: fx.Node, operand: fx.Node) -> None:
        """Raise if `write` changes behind autograd's back what a gradient is followed through.

        In eager mode such a value keeps its history, as if nothing had been written; a functional
        graph has no way to say so.
        """
        families = self.history.families
        own, root = families[operand], self._root(operand)
        passing = {
            families[node]
            for use in self._uses_after(write, operand)
            if self._passes(use)
            for node in use[1:]
        }
        if self.history.memory[operand] & self.shared:
            hidden = bool(passing - {root})
            own_root = own is root and write not in self.stopped
            hidden |= not own_root and root in passing and root in self.history.held[write]
        else:
            hidden = write in self.stopped and own in passing and own in self.history.held[write]
        if hidden or self._changes_what_was_saved(own, operand):
            raise CaptureError(
                f"`{write.target}` changes a value that needs a gradient where autograd cannot see",
                code="hidden write",
                culprit=origin_of(write).source,
                help=_HELP.get(write.target, "compute a new tensor instead of writing in place"),
            )

    def _changes_what_was_saved(self, own: fx.Node, operand: fx.Node) -> bool:
        """Whether a backward would read what is written here through `.data`, behind its back."""
        source = own.args[0] if own.target is _DETACH else None
        if not isinstance(source, fx.Node) or source.target is not torch.ops.aten.alias.default:
            return False
        families = self.history.families
        return any(families[u[1]] is not own and self._passes(u) for u in self._uses(operand))


_HELP: dict[Any, str] = {
    torch.ops.aten.embedding_renorm_.default: "leave out `max_norm`, and look up in "
    "`w * (max_norm / w.norm(dim=1, keepdim=True)).clamp(max=1)` with `F.embedding`",
}
"""What to write in the place of a write that the model does not spell out."""


def is_floating(node: fx.Node) -> bool:
    """Whether this is one tensor that could have a gradient."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
