"""A fixed factor for the hardest fraction: reweighting without an adversary."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..ambiguity import CVaR


def hardest_fraction_ratio(losses: Tensor, *, fraction: float, factor: float) -> Tensor:
    """Ratio of every sample, (n,), detached, mean 1: `(ratio * losses).mean()` is what is descended.

        prop. to `factor` on the largest `fraction` of the losses, 1 on the rest

    The loss on the boundary counts partly, ties together. factor = 1 or fraction = 1 is plain averaging; as
    the factor grows it becomes CVaR(fraction).

    Args:
        losses: (n,) higher is worse.
        fraction: in (0, 1].
        factor: >= 1.
    Returns: (n,) float32 or wider. A NaN or +inf loss makes it NaN.
    Raises: TypeError or ValueError: an argument of another shape, type or range.

    >>> import torch
    >>> hardest_fraction_ratio(torch.tensor([1.0, 2.0, 3.0, 4.0]), fraction=0.25, factor=3.0)
    tensor([0.6667, 0.6667, 0.6667, 2.0000])
    """
    _checks.per_sample("losses", losses)
    _checks.number("fraction", fraction, 0.0, 1.0, "It is a share of the losses.", open_low=True)
    _checks.number("factor", factor, 1.0, torch.inf, "1 is plain averaging.")
    hardest = fraction * CVaR(fraction).solve(losses).ratio
    return (1 + (factor - 1) * hardest) / (1 + (factor - 1) * fraction)
