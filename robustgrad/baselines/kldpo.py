"""KLDPO: exponential weights of the batch, normalised, and as its code was released."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .. import _checks
from ..ambiguity import KL

_RELEASED_CAP = 10.0


def kldpo_ratio(
    losses: Tensor, *, temperature: float, form: Literal["normalised", "released"] = "normalised"
) -> Tensor:
    """Ratio of every sample, (n,), detached: `(ratio * losses).mean()` is what is descended.

        form="normalised":   exp(l / tau) / mean exp(l / tau)          mean 1; the same as KL(temperature=tau)
        form="released":     min(exp((l - mean l) / tau), 10)          mean above 1 unless clipped

    The released form is a compatibility mode, not a worst case: its mean above 1 is a hidden multiplier of the
    learning rate, which grows as tau falls.

    Args:
        losses: (n,) higher is worse; the whole batch, of all ranks.
        temperature: > 0, tau, in units of the loss.
        form: "normalised" or "released".
    Returns: (n,) float32 or wider. A NaN loss makes it NaN.
    Raises: TypeError or ValueError: an argument of another shape, type or range.
    Source: arXiv 2502.01930 (KLDPO) and its code; weights as arXiv 2509.19104 (KL DRO-REBEL).

    >>> import torch
    >>> kldpo_ratio(torch.tensor([0.0, 1.0]), temperature=1.0)
    tensor([0.5379, 1.4621])
    >>> kldpo_ratio(torch.tensor([0.0, 1.0]), temperature=1.0, form="released")
    tensor([0.6065, 1.6487])
    """
    _checks.per_sample("losses", losses)
    _checks.choice("form", form, ("normalised", "released"))
    worst = KL(temperature=temperature).solve(losses)
    if form == "normalised":
        return worst.ratio
    wide = losses.detach().to(worst.ratio.dtype)
    return ((wide - wide.mean()) / temperature).exp().clamp_max(_RELEASED_CAP)
