"""Mesh operators as functions of one rank's local tensors.

A binding is made once per node and rank: it works out what depends on the rank (the first row of a
split table, the global coordinates of random numbers) and returns a function of the node's tensor
operands, in the order of `Node.operands()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from meshwright.compiler.graph.ir import MeshOp, Node
from meshwright.compiler.kernels import attention as attention_kernels
from meshwright.compiler.kernels import cross_entropy as loss_kernels
from meshwright.compiler.kernels import embedding as table_kernels
from meshwright.compiler.kernels import grouped as grouped_kernels
from meshwright.compiler.kernels import norm as norm_kernels
from meshwright.compiler.kernels import sampling
from meshwright.compiler.kernels.dropout import dropout
from meshwright.compiler.kernels.hashing import Coords, RandomIndex
from meshwright.compiler.kernels.random import random
from meshwright.compiler.layout.extents import Extent, extend, true_positions
from meshwright.compiler.layout.layout import Dim, Layout, block_map, dim_axes
from meshwright.compiler.layout.mesh import Mesh

Local: TypeAlias = Callable[..., Any]


@dataclass(slots=True)
class RandomState:
    """What every random operator of a rank is keyed by: the run's seed, and when it draws.

    An evaluation draws new numbers each time, and does not change those of the steps after it.
    """

    seed: int = 0
    step: int = 0
    evaluations: int = 0
    training: bool = True

    def begin(self, *, training: bool) -> None:
        """Turn to the next training step, or the next evaluation."""
        self.training = training
        if training:
            self.step += 1
        else:
            self.evaluations += 1

    def restore(self, earlier: RandomState) -> None:
        """Take over where `earlier`, a copy, stood: what began since then did not happen."""
        self.step, self.evaluations = earlier.step, earlier.evaluations
        self.training = earlier.training

    @property
    def draw(self) -> int:
        """The number of the step, or another for each evaluation."""
        return self.step if self.training else self.step + (self.evaluations << 40)


@dataclass(frozen=True, slots=True)
class Binding:
    """A node to bind, on the rank with these coordinates."""

    node: Node
    mesh: Mesh
    coords: Mapping[str, int]
    random: RandomState
    device: torch.device
    _present: tuple[bool, ...] = field(init=False)

    def __post_init__(self) -> None:
        present = tuple(isinstance(arg, Node) for arg in self.node.args)
        object.__setattr__(self, "_present", present)

    def operand(self, position: int) -> Node:
        """The node given as this argument."""
        found = self.node.args[position]
        assert isinstance(found, Node)
        return found

    def start(self, dim: Dim) -> int:
        """The global index of the first of the consecutive entries of `dim` held here."""
        return int(block_map(Layout((dim,)), self.mesh, self.coords)[0])

    def coordinates(self, dims: tuple[Dim, ...]) -> tuple[Coords, ...]:
        """Where the local tensor lies along each dim, as `RandomIndex` wants it."""
        return tuple(self._positions(dim) for dim in dims)

    def _positions(self, dim: Dim) -> Coords:
        if not dim_axes(dim):
            return 0
        index = block_map(Layout((dim,)), self.mesh, self.coords)
        first = int(index[0])
        consecutive = torch.equal(index, torch.arange(first, first + len(index)))
        return first if consecutive else index

    def spread(self, tensors: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The tensors at their places among the arguments; None where the node has none."""
        given = iter(tensors)
        return [next(given) if present else None for present in self._present]


BINDINGS: dict[str, Callable[[Binding], Local]] = {}


def binds(*names: str) -> Callable[[Callable[[Binding], Local]], Callable[[Binding], Local]]:
    """Register how these mesh operators are bound."""

    def register(function: Callable[[Binding], Local]) -> Callable[[Binding], Local]:
        BINDINGS.update(dict.fromkeys(names, function))
        return function

    return register


def bind(
    node: Node,
    mesh: Mesh,
    coords: Mapping[str, int],
    random: RandomState,
    device: torch.device,
) -> Local:
    """The function that runs `node` on one rank."""
    assert isinstance(node.op, MeshOp)
    return BINDINGS[node.op.name](Binding(node, mesh, coords, random, device))


def _offset(binding: Binding, dim: Dim) -> int:
    return binding.start(dim) if dim_axes(dim) else -1


@binds("embedding")
def _embedding(binding: Binding) -> Local:
    table = binding.operand(0)
    offset = _offset(binding, table.placed.dims[0])
    # A padded table says how many rows it has without its padding.
    num_rows = binding.node.args[3] if len(binding.node.args) > 3 else table.tensor.shape[0]

    def embedding(weight: Tensor, index: Tensor) -> Tensor:
        return table_kernels.embedding(weight, index, num_rows=num_rows, offset=offset)

    return embedding


@binds("embedding_backward")
def _embedding_backward(binding: Binding) -> Local:
    offset = _offset(binding, binding.operand(2).placed.dims[0])
    padding_idx = binding.node.args[3]

    def backward(grad: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return table_kernels.embedding_backward(
            grad, index, weight.shape[0], offset=offset, padding_idx=padding_idx
        )

    return backward


def _loss_options(binding: Binding, first: int) -> dict[str, Any]:
    names = ("ignore_index", "label_smoothing", "num_classes")
    return dict(zip(names, binding.node.args[first:], strict=True))


@binds("cross_entropy")
def _cross_entropy(binding: Binding) -> Local:
    options = _loss_options(binding, 3)

    def cross_entropy(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        logits, target, weight = binding.spread(tensors)[:3]
        assert logits is not None and target is not None
        rows, lse = loss_kernels.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), target.reshape(-1), weight=weight, **options
        )
        return rows.view(target.shape), lse.view(target.shape)

    return cross_entropy


@binds("cross_entropy_stats")
def _cross_entropy_stats(binding: Binding) -> Local:
    options = _loss_options(binding, 3)
    offset = binding.start(binding.operand(0).placed.dims[-1])

    def stats(*tensors: Tensor) -> Tensor:
        logits, target, weight = binding.spread(tensors)[:3]
        assert logits is not None and target is not None
        found = loss_kernels.cross_entropy_stats(
            logits.reshape(-1, logits.shape[-1]),
            target.reshape(-1),
            offset=offset,
            weight=weight,
            **options,
        )
        return found.view(1, -1, *target.shape)

    return stats


@binds("cross_entropy_combine")
def _cross_entropy_combine(binding: Binding) -> Local:
    options = _loss_options(binding, 3)

    def combine(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        stats, target, weight = binding.spread(tensors)[:3]
        assert stats is not None and target is not None
        rows, lse = loss_kernels.cross_entropy_combine(
            stats.reshape(*stats.shape[:2], -1), target.reshape(-1), weight=weight, **options
        )
        return rows.view(target.shape), lse.view(target.shape)

    return combine


@binds("cross_entropy_backward")
def _cross_entropy_backward(binding: Binding) -> Local:
    options = _loss_options(binding, 5)
    offset = max(0, _offset(binding, binding.operand(1).placed.dims[-1]))
    overwrite = binding.node.kwargs.get("overwrite", False)

    def backward(*tensors: Tensor) -> Tensor:
        grad, logits, target, lse, weight = binding.spread(tensors)[:5]
        assert grad is not None and logits is not None and target is not None and lse is not None
        flat = logits.reshape(-1, logits.shape[-1])
        found = loss_kernels.cross_entropy_backward(
            flat,
            target.reshape(-1),
            lse.reshape(-1),
            grad.reshape(-1),
            offset=offset,
            weight=weight,
            out=flat if overwrite and flat.is_contiguous() else None,
            **options,
        )
        return found.view(logits.shape)

    return backward


@binds("norm")
def _norm(binding: Binding) -> Local:
    eps, kind = binding.node.args[3:]

    def layer(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = binding.spread(tensors)[:3]
        assert x is not None
        return norm_kernels.layer_norm(x, weight, bias, eps)

    def rms(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = binding.spread(tensors)[:2]
        assert x is not None
        y, rstd = norm_kernels.rms_norm(x, weight, eps)
        return y, None, rstd

    return layer if kind == "layer" else rms


@binds("norm_backward")
def _norm_backward(binding: Binding) -> Local:
    kind = binding.node.args[6]

    def backward(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, mean, rstd, weight, bias = binding.spread(tensors)[:6]
        assert grad is not None and x is not None and rstd is not None
        if kind == "layer":
            assert mean is not None
            return norm_kernels.layer_norm_backward(grad, x, mean, rstd, weight, bias)
        return (*norm_kernels.rms_norm_backward(grad, x, rstd, weight), None)

    return backward


@binds("norm_stats")
def _norm_stats(binding: Binding) -> Local:
    if binding.node.args[1] == "layer":
        return lambda x: norm_kernels.norm_stats(x).unsqueeze(0)
    return lambda x: norm_kernels.rms_stats(x)[None, None]


@binds("norm_finish")
def _norm_finish(binding: Binding) -> Local:
    eps, kind = binding.node.args[4:]
    size = binding.operand(0).tensor.shape[-1]

    def finish(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, weight, bias = binding.spread(tensors)[:4]
        assert x is not None and stats is not None
        mean, rstd = None, None
        if kind == "layer":
            mean, rstd = norm_kernels.norm_combine(stats, x.shape[-1], eps)
        else:
            rstd = norm_kernels.rms_combine(stats[:, 0], size, eps)
        return norm_kernels.norm_apply(x, mean, rstd, weight, bias), mean, rstd

    return finish


@binds("norm_backward_sums")
def _norm_backward_sums(binding: Binding) -> Local:
    def sums(*tensors: Tensor) -> Tensor:
        grad, x, mean, rstd, weight = binding.spread(tensors)[:5]
        assert grad is not None and x is not None and rstd is not None
        return norm_kernels.norm_backward_sums(grad, x, mean, rstd, weight)

    return sums


@binds("norm_backward_apply")
def _norm_backward_apply(binding: Binding) -> Local:
    size = binding.operand(2).tensor.shape[-1]

    def apply(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        sums, grad, x, mean, rstd, weight, bias = binding.spread(tensors)[:7]
        assert sums is not None and grad is not None and x is not None and rstd is not None
        needs = (True, weight is not None, bias is not None)
        return norm_kernels.norm_backward_apply(grad, x, mean, rstd, weight, sums, size, needs)

    return apply


def _index(
    binding: Binding, op_id: int, shape: tuple[int, ...], dims: tuple[Dim, ...]
) -> Callable[[], RandomIndex]:
    coords, state = binding.coordinates(dims), binding.random
    return lambda: RandomIndex(state.seed, state.draw, op_id, shape, coords)


@binds("random")
def _random(binding: Binding) -> Local:
    _, shape, kind, dtype, op_id = binding.node.args
    layout, device = binding.node.placed, binding.device
    index, local = _index(binding, op_id, shape, layout.dims), layout.local_shape(binding.mesh)
    return lambda *_: random(local, kind, index(), dtype, device)


@binds("standard_gamma", "dirichlet", "poisson", "binomial")
def _sample(binding: Binding) -> Local:
    """A sampler's parameters, then the global shape and the operator's number."""
    assert isinstance(binding.node.op, MeshOp)
    sampler = getattr(sampling, binding.node.op.name)
    *_, shape, op_id = binding.node.args
    index = _index(binding, op_id, tuple(shape), binding.node.placed.dims)
    return lambda *parameters: sampler(*parameters, index())


def _attention_options(
    binding: Binding, first: int, q: Node, k: Node
) -> Callable[[], dict[str, Any]]:
    is_causal, scale, dropout_p, op_id = binding.node.args[first : first + 4]
    fixed = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p}
    if not dropout_p:
        return lambda: fixed
    shape = (*q.tensor.shape[:3], k.tensor.shape[2])
    index = _index(binding, op_id, shape, (*q.placed.dims[:3], k.placed.dims[2]))
    return lambda: {**fixed, "index": index()}


@binds("attention")
def _attention(binding: Binding) -> Local:
    options = _attention_options(binding, 4, binding.operand(0), binding.operand(1))

    def attention(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return attention_kernels.attention(*tensors, **options())

    return attention


@binds("attention_backward")
def _attention_backward(binding: Binding) -> Local:
    options = _attention_options(binding, 7, binding.operand(1), binding.operand(2))
    need_bias_grad = binding.node.args[11]

    def backward(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        return attention_kernels.attention_backward(
            *tensors, need_bias_grad=need_bias_grad, **options()
        )

    return backward


@binds("dropout")
def _dropout(binding: Binding) -> Local:
    """A sequence that is padded draws the numbers that it would without its padding."""
    x, p, op_id, *extents = binding.node.args
    coords = list(binding.coordinates(x.placed.dims))
    shape = list(x.tensor.shape)
    for dim, *sizes in extents[0] if extents else ():
        extent = Extent(*sizes)
        shape[dim] = extent.true
        if extent.before > 1:
            stored = block_map(Layout((x.placed.dims[dim],)), binding.mesh, binding.coords)
            coords[dim] = true_positions(stored, extent)
    where, state = tuple(coords), binding.random
    return lambda tensor: dropout(
        tensor, p, RandomIndex(state.seed, state.draw, op_id, tuple(shape), where)
    )


@binds("extend")
def _extend(binding: Binding) -> Local:
    _, dim, size = binding.node.args
    return lambda x: extend(x, dim, size)


@binds("grouped_mm")
def _grouped_mm(binding: Binding) -> Local:
    return grouped_kernels.grouped_mm


@binds("grouped_mm_weight")
def _grouped_mm_weight(binding: Binding) -> Local:
    num_groups = binding.node.args[3]

    def weight(x: Tensor, grad: Tensor, group: Tensor) -> Tensor:
        return grouped_kernels.grouped_mm_weight(x, grad, group, num_groups)

    return weight
