"""One option for each of several choices, the best together, at an exact total cost."""

from __future__ import annotations

import torch
from torch import Tensor


def best_on_budget(gains: Tensor, costs: Tensor, budget: int) -> Tensor:
    """The option of every choice, (B,), with the greatest sum of gains whose costs sum to the budget.

    Dynamic programming over the totals 0 .. budget: B A (budget + 1) sums.

    Args:
        gains: (k, B, A) finite, of option a of choice b. Sums that are equal are told apart by the next of the k.
        costs: (B, A) whole, >= 0.
        budget: a total that can be met.
    """
    totals = torch.arange(budget + 1)
    best = torch.where(totals == 0, 0.0, -torch.inf).to(gains).expand(len(gains), -1)
    taken = []
    for gain, cost in zip(gains.unbind(1), costs, strict=True):
        before = totals - cost[:, None]  # (A, totals): what was spent before this option
        reached = torch.where(before >= 0, best[:, before.clamp_min(0)], -torch.inf) + gain[..., None]
        taken.append(_first_in_order(reached))
        best = reached.gather(1, taken[-1].expand(len(gains), 1, -1)).squeeze(1)
    choice = []
    for options, cost in zip(reversed(taken), reversed(costs.unbind()), strict=True):
        choice.append(options[budget])
        budget -= int(cost[choice[-1]])
    return torch.stack(choice[::-1])


def _first_in_order(sums: Tensor) -> Tensor:
    """(totals,) the option whose sums, (k, A, totals), come first in lexicographic order."""
    left = torch.ones_like(sums[0], dtype=torch.bool)
    for each in sums:
        each = torch.where(left, each, -torch.inf)
        left = left & (each == each.amax(0))
    return left.float().argmax(0)
