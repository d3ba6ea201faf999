"""Rows to the owners of their groups and back, by indices, on one rank.

Each of `experts` groups has a matrix; each of `owners` has `experts / owners` of these, in their
order. Rows come with the numbers of their groups, `group[g, s, t]`. One from `experts` on has no
owner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.compiler.kernels import experts as slotted
from meshwright.compiler.kernels.blocks import has_data


def to_owners(
    x: Tensor, group: Tensor, experts: int, owners: int, maximum: int, first: int, count: int
) -> Tensor:
    """The rows of each of `count` owners from the `first` on, in their order and then zeros:
    `x[g, s, k]` or `x[g, s, t, k]` gives `[g, count, maximum, k]`."""
    slot = _slots(group, experts, owners, maximum, first, count)
    if x.dim() == 4:
        x, slot = x.flatten(1, 2), slot.flatten(1).unsqueeze(-1)
    rows = slotted.dispatch(x, slot, None, count * maximum)
    return rows.view(x.shape[0], count, maximum, x.shape[-1])


def owned_groups(
    group: Tensor, experts: int, owners: int, maximum: int, first: int, count: int
) -> Tensor:
    """The same for the numbers of groups, counted from the first of their owner; one more than its
    last behind them."""
    each = experts // owners
    rows = (group % each - each).unsqueeze(-1)
    return to_owners(rows, group, experts, owners, maximum, first, count).squeeze(-1) + each


def from_owners(y: Tensor, group: Tensor, experts: int, owners: int, first: int) -> Tensor:
    """The rows `y[g, count, m, n]` of these owners where they came from, `[g, s, t, n]`; zeros for
    those of others."""
    count, maximum = y.shape[1:3]
    slot = _slots(group, experts, owners, maximum, first, count)
    rows = slotted.combine(y.flatten(1, 2), slot.flatten(1).unsqueeze(-1), None)
    return rows.view(*group.shape, y.shape[-1])


def owner_order(group: Tensor, experts: int, owners: int) -> Tensor:
    """The places of all rows `[g s t]`, those of the first owner first."""
    return torch.argsort((group // (experts // owners)).flatten(), stable=True)


def by_owner(x: Tensor, order: Tensor) -> Tensor:
    """The rows of `x[g, s, k]`, each of which stands for several, or `x[g, s, t, k]` in an order:
    `[g s t, k]`."""
    if x.dim() == 3:
        return x.flatten(0, 1).index_select(0, order // (order.numel() // x.shape[:2].numel()))
    return x.flatten(0, 2).index_select(0, order)


def in_order(rows: Tensor, order: Tensor, group: Tensor) -> Tensor:
    """What `by_owner` gives as it was before, `[g, s, t, k]`."""
    return torch.empty_like(rows).index_copy_(0, order, rows).view(*group.shape, rows.shape[1])


def owner_counts(group: Tensor, experts: int, owners: int) -> Tensor:
    """How many rows each owner has: `[1, 1, owners]`."""
    owner = (group // (experts // owners)).flatten().clamp(max=owners)
    counts = owner.new_zeros(owners + 1).scatter_add(0, owner, torch.ones_like(owner))
    return counts[:owners].view(1, 1, owners)


def _slots(
    group: Tensor, experts: int, owners: int, maximum: int, first: int, count: int
) -> Tensor:
    """The place of each row among those of these owners, `[g, s, t]`; -1 for one of others."""
    owner = group // (experts // owners)
    place = slotted.positions(owner.flatten(1)).view_as(group)
    own = (owner >= first) & (owner < first + count)
    if maximum < group[0].numel() and has_data(group):
        _check(place.where(own, 0), maximum)
    return ((owner - first) * maximum + place).where(own, -1)


def _check(place: Tensor, maximum: int) -> None:
    """Raises RuntimeError where the rows of an owner are more than the maximum."""
    needed = int(place.max()) + 1
    if needed > maximum:
        raise RuntimeError(
            f"{needed} rows go to the experts of one rank, which has room for {maximum}: "
            "write a larger `maximum` in the `experts` statement"
        )
