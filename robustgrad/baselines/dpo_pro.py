"""DPO-PRO: only the preference label is uncertain, within a chi-square ball around its probability."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..objectives import bradley_terry, log_ratios


def dpo_pro(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    preference: Tensor,
    *,
    radius: float,
    beta: float = 0.1,
) -> Tensor:
    """DPO loss under the worst label probability, (n,).

        max_p  p l(h) + (1 - p) l(-h)    s.t.  (p - q)^2 / (q (1 - q)) <= radius,  0 <= p <= 1
        l(h) = -log sigmoid(beta h);     p = clip(q +- sqrt(radius q (1 - q))), plus where l(h) >= l(-h)

    While nothing is clipped: the soft-label loss plus sqrt(radius q (1 - q)) beta |h|. A hard label (q of
    0 or 1) is certain: nothing changes.

    Args:
        chosen, rejected, reference_chosen, reference_rejected: (n,) as in `robustgrad.objectives.dpo`.
        preference: (n,) q in [0, 1], probability that `chosen` is the better one. Outside, NaN losses.
        radius: >= 0, chi-square without the half. 0 is DPO with soft labels.
        beta: > 0, as in `dpo`.
    Returns: (n,) losses in float32 or wider; p is held fixed for the gradient.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range.
    Source: arXiv 2510.23590 as secondary notes give it, the closed form derived here; its text was not read.

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> dpo_pro(zero + 2, zero, zero, zero, zero + 0.5, radius=1.0, beta=1.0)
    tensor([2.1269])
    """
    _checks.number("radius", radius, 0.0, torch.inf, "0 is DPO with soft labels.")
    _checks.number("beta", beta, 0.0, torch.inf, "It multiplies the log-ratio.", open_low=True)
    first, second = log_ratios(chosen, rejected, reference_chosen, reference_rejected)
    _checks.same_samples("preference", preference, "chosen", chosen)
    right, wrong = bradley_terry(beta * first, beta * second), bradley_terry(beta * second, beta * first)
    q = preference.detach().to(right.dtype)
    # The root of a negative number: a probability outside [0, 1] gives NaN, not a label.
    reach = (radius * q * (1 - q)).sqrt() + 0 * (q * (1 - q)).sqrt()
    p = torch.where(right >= wrong, q + reach, q - reach).clamp(0, 1)
    return p * right + (1 - p) * wrong
