"""How many answers to sample to prompts of each group: the variance-optimal split of a fixed budget."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks


def rollout_counts(
    variances: Tensor, shares: Tensor, *, mean: float, low: float = 1.0, high: float = torch.inf
) -> Tensor:
    """Rollouts per prompt of each group, (G,), that give the gradient its least variance.

        min_n  sum_g p_g v_g / n_g    s.t.   sum_g p_g n_g = mean,   low <= n_g <= high
        n_g = clip(c sqrt(v_g), low, high)       with c to spend the budget

    Real numbers: round them at random, up with the probability of their fraction, to stay on budget in the mean.
    Where every variance is 0 they are all `mean`.

    Args:
        variances: (G,) >= 0, of the gradient (or the reward) of one answer to a prompt of the group.
        shares: (G,) >= 0, p, the groups' shares of the prompts, of any positive sum.
        mean: in [low, high], the budget: answers per prompt on average.
        low, high: bounds of a count, 0 < low <= high.
    Returns: (G,) float32 or wider. A NaN or negative variance makes it NaN.
    Raises: TypeError or ValueError: an argument of another shape, type or range.
    Source: the square-root law of arXiv 2601.19280, equations 29 and 30, with bounds (derived here). `RolloutGDRO`
        learns whole counts from losses instead.

    >>> import torch
    >>> rollout_counts(torch.tensor([1.0, 4.0]), torch.tensor([0.5, 0.5]), mean=6.0)
    tensor([4., 8.])
    """
    _checks.per_sample("variances", variances)
    _checks.same_samples("shares", shares, "variances", variances)
    _checks.number("low", low, 0.0, high, "A prompt needs an answer.", open_low=True)
    _checks.number("mean", mean, low, high, "It is the budget per prompt.")
    wide = torch.promote_types(variances.dtype, torch.float64)
    p, root = (shares / shares.sum()).to(wide), variances.to(wide).sqrt()
    root = torch.where(root.amax() == 0, 1.0, root)  # all alike: all the same
    high = min(high, mean / float(torch.finfo(torch.float32).eps))
    # What is spent rises with c: halve the interval of log c that holds the answer.
    below, above = root.new_tensor(-745.0), root.new_tensor(709.0)
    for _ in range(80):
        middle = (below + above) / 2
        spends_less = (p * (middle.exp() * root).clamp(low, high)).sum() < mean
        below, above = torch.where(spends_less, middle, below), torch.where(spends_less, above, middle)
    counts = (above.exp() * root).clamp(low, high)
    return torch.where(root.isnan().any(), torch.nan, counts).to(torch.promote_types(variances.dtype, torch.float32))
