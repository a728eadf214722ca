"""Dr. DPO: the optimistic twin of KLDPO, which gives way to losses that look like wrong labels."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from ..ambiguity import KL
from ..robust_loss import robust_loss


def dr_dpo_loss(losses: Tensor, *, temperature: float) -> Tensor:
    """Best case over a KL penalty, 0-dim, with its gradient.

        min_q <q, l> + b KL(q || uniform)  =  -b log mean_i exp(-l_i / b),      ratio prop. to exp(-l / b)

    The opposite sign of a worst case: *high* losses are weighed down, against noise in the labels. Applied
    to a shift of the prompts it makes matters worse.

    Args:
        losses: (n,) higher is worse.
        temperature: > 0, b (the paper's beta'), in units of the loss. Towards infinity it is the mean, towards
            0 the smallest loss.
    Returns: 0-dim, float32 or wider; at most the mean.
    Raises: TypeError or ValueError: an argument of another shape, type or range.
    Source: arXiv 2407.07880.

    >>> import torch
    >>> dr_dpo_loss(torch.tensor([0.0, 1.0]), temperature=1.0)
    tensor(0.3799)
    """
    _checks.per_sample("losses", losses)
    return -robust_loss(-losses, KL(temperature=temperature))
