"""The norm of all gradients, each element counted once however many ranks hold it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meshwright.compiler.layout.layout import uniform_blocks
from meshwright.compiler.layout.wires import Wire
from meshwright.compiler.public import Program
from meshwright.dsl.errors import spelled
from meshwright.runtime.errors import RunError, check_kind
from meshwright.runtime.rank import RankProgram, RankState


def check_norms(max_norm: float, norm_type: float) -> None:
    """Raise `RunError` for arguments of `Run.clip_grad_norm_` that cannot be."""
    for value in (max_norm, norm_type):
        check_kind(value, (int, float, Tensor), "a norm", "pass a number")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise RunError(f"a norm is {spelled(value)}", help="pass a number")
    if not norm_type > 0:
        raise RunError(
            f"`norm_type` is {norm_type}", help='use a positive number, or `float("inf")`'
        )
    if not max_norm >= 0:
        raise RunError(f"`max_norm` is {max_norm}", help="use a number that is not negative")


def clipped(state: RankState, program: Program, max_norm: float, p: float) -> RankProgram:
    """Scale all gradients to a `p`-norm of at most `max_norm`; returns the norm before."""
    total = yield from total_norm(state, program, p)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in state.parameters.values():
        if parameter.grad is not None:
            by_device.setdefault(parameter.grad.device, []).append(parameter.grad)
    for device, gradients in by_device.items():
        torch._foreach_mul_(gradients, factor.to(device))
    return total


def total_norm(state: RankState, program: Program, p: float) -> RankProgram:
    """The `p`-norm over all gradients, a 0-d float64 tensor, by one all-reduce over the mesh."""
    mesh = program.mesh
    held = [
        (block, stored.num_holders(mesh) // mesh.size(axes))
        for name, parameter in state.parameters.items()
        if parameter.grad is not None
        for stored in (program.parameters[name],)
        for block, axes in uniform_blocks(parameter.grad, stored.layout, mesh)
        if block.numel()
    ]
    # A rank that holds no gradient takes part too.
    none = torch.zeros((), dtype=torch.float64, device=state.device)
    norms = torch.stack([none, *(_norm(gradient, p).to(state.device) for gradient, _ in held)])
    if math.isinf(p):
        # Not every transport's maximum keeps a NaN.
        own = torch.stack([norms.nan_to_num(0.0, math.inf).amax(), norms.isnan().any().double()])
        most, nan = yield Wire("all_reduce", mesh.names, "max"), own
        return torch.where(nan > 0, math.nan, most)
    copies = [1, *(count for _, count in held)]
    weights = torch.tensor(copies, dtype=torch.float64).to(state.device)
    total: Tensor = yield Wire("all_reduce", mesh.names), (norms**p / weights).sum()
    return total ** (1 / p)


def _norm(gradient: Tensor, p: float) -> Tensor:
    """The `p`-norm of one gradient, in float64: a power would overflow half types."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient, p, dtype=wide)
    return norm.double()
