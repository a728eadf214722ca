"""REBEL: regression of the difference in log-ratios onto the difference in rewards."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from ._inputs import per_sample


def rebel(
    first: Tensor,
    second: Tensor,
    old_first: Tensor,
    old_second: Tensor,
    reward_gap: Tensor,
    *,
    eta: float,
    scale: Literal["reward", "log_prob"] = "reward",
) -> Tensor:
    """Squared error of every pair of responses to one prompt.

        scale="reward":     ( h / eta - gap )^2         (arXiv 2404.16767; arXiv 2509.19104)
        scale="log_prob":   ( h - eta gap )^2           (the released code: eta^2 times the first)
        h = log pi/pi_t(first) - log pi/pi_t(second),   gap = r(first) - r(second)

    Both have the same minimiser. A TV, chi-square, KL or CVaR *radius* picks the same weights on either; a
    KL temperature, a penalty and the coefficient of a squared gradient penalty do not: they carry the unit of
    the loss, the squared reward under "reward" and eta^2 times that under "log_prob".

    Args:
        first, second: (n,) log-probabilities of the two responses under the policy, summed over tokens.
        old_first, old_second: (n,) the same under pi_t, the policy that generated them: each iteration has
            its own. Offline, the reference model.
        reward_gap: (n,) reward of the first response minus that of the second.
        eta: > 0, step size of the mirror descent that the regression carries out.
    Returns: (n,) losses in float32 or wider.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range.

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> rebel(torch.tensor([0.5]), zero, zero, zero, torch.tensor([0.4]), eta=1.0)
    tensor([0.0100])
    """
    _checks.number("eta", eta, 0.0, torch.inf, "It is a step size.", open_low=True)
    _checks.choice("scale", scale, ("reward", "log_prob"))
    first, second, old_first, old_second, gap = per_sample(
        first=first, second=second, old_first=old_first, old_second=old_second, reward_gap=reward_gap
    )
    lead = (first - old_first) - (second - old_second)
    return (lead / eta - gap).square() if scale == "reward" else (lead - eta * gap).square()
