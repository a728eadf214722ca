"""DORO: an ambiguity set on the losses that are left when the largest ones are cut off as outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..ambiguity import AmbiguitySet, CVaR


def doro_ratio(losses: Tensor, ambiguity: AmbiguitySet, *, trimmed: float) -> Tensor:
    """Ratio of every sample, (n,), detached, mean 1: `(ratio * losses).mean()` is what is descended.

        worst case of `ambiguity` over the 1 - trimmed smallest losses;    ratio 0 above them

    Plain worst cases follow outliers: one wrong label can take all the weight. CVaR-DORO is
    `CVaR(alpha)`; CHI2-DORO is `ChiSquare((1 / alpha - 1)**2 / 2)` for its alpha.

    Args:
        losses: (n,) higher is worse.
        ambiguity: any set.
        trimmed: in [0, 1), the share of the largest losses that is taken to be outliers. The loss on the
            boundary counts partly, ties together. 0 is the set itself.
    Returns: (n,) float32 or wider. A NaN or +inf loss makes it NaN: neither is an outlier.
    Raises: TypeError or ValueError: an argument of another shape, type or range.
    Source: arXiv 2106.06142, Algorithm 1.

    >>> import torch
    >>> from robustgrad import CVaR
    >>> doro_ratio(torch.tensor([1.0, 2.0, 3.0, 4.0, 99.0]), CVaR(0.5), trimmed=0.2)
    tensor([0.0000, 0.0000, 2.5000, 2.5000, 0.0000])
    """
    _checks.per_sample("losses", losses)
    _checks.number("trimmed", trimmed, 0.0, 1.0, "0 trims nothing.", open_high=True)
    if trimmed == 0:
        return ambiguity.solve(losses).ratio
    kept = 1 - trimmed * CVaR(trimmed).solve(losses.double()).ratio
    # What rounding left of a trimmed loss is no mass: a ball would follow it.
    worst = ambiguity.solve_unchecked(losses.detach(), torch.where(kept < 1e-12, 0.0, kept))
    return worst.weights * len(losses)
