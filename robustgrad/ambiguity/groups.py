"""Worst case over groups: every loss is replaced by the mean of its group."""

from __future__ import annotations

import torch
from torch import Tensor


def group_means(losses: Tensor, groups: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean loss of each sample's group, (n,).

    An ambiguity set gives equal losses equal ratios and sees only their joint mass, so its worst case over
    these means is the worst case over the groups, each with the base mass of its members.

    Args:
        losses: (n,) float.
        groups: (n,) integer ids; any values.
        weight: (n,) base weights of the samples, 0 where a sample does not count; None is equal.
    """
    slot = group_slots(groups)
    share = torch.ones_like(losses) if weight is None else weight.to(losses.dtype)
    counted = torch.where(share > 0, share * losses, 0.0)
    total = torch.zeros_like(losses).index_add_(0, slot, counted)
    mass = torch.zeros_like(losses).index_add_(0, slot, share)
    return (total / mass.clamp_min(torch.finfo(mass.dtype).tiny))[slot]


def group_slots(groups: Tensor) -> Tensor:
    """The ids (n,) numbered 0, 1, ... in their order: how many there are is known to the device only."""
    order = groups.argsort(stable=True)
    ids = groups[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    return torch.empty_like(order).scatter_(0, order, first.cumsum(-1) - 1)
