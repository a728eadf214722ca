"""The worst-case value as a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from .ambiguity import AmbiguitySet, group_means
from .ambiguity._problem import wide_dtype


def robust_loss(
    losses: Tensor,
    ambiguity: AmbiguitySet,
    *,
    groups: Tensor | None = None,
    base: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Worst-case value of the given losses, with its gradient sum_i q_i grad loss_i.

        max_q <q, losses>   over the ambiguity set (less its penalty, where it has one)

    The losses given compete among themselves; for small micro-batches use `Reweighter`, whose memory
    lets them compete with recent ones.

    Args:
        losses: (n,) floating, higher is worse.
        ambiguity: the set.
        groups: (n,) integer ids: worst case over the means of groups.
        base: (n,) >= 0, reference weights; None is uniform.
        mask: (n,) bool, True where the loss is real.
    Returns: 0-dim, float32 or wider; NaN if a loss that counts is NaN or +inf.
    Raises: ValueError or TypeError: an argument of the wrong shape, type or range.
    Source: the envelope theorem (Danskin); arXiv 2503.00539, Algorithm 1.

    Example:
        >>> import torch
        >>> from robustgrad import CVaR, robust_loss
        >>> robust_loss(torch.tensor([1.0, 2.0, 3.0, 4.0]), CVaR(0.5))
        tensor(3.5000)
    """
    _checks.per_sample("losses", losses)
    scores = losses.detach()
    if groups is not None:
        _checks.integer_ids(groups, losses)
        weight = torch.ones_like(scores) if base is None else base
        weight = weight if mask is None else torch.where(mask, weight, 0.0)
        scores = group_means(scores.to(wide_dtype(scores.device)), groups, weight)
    worst = ambiguity.solve(scores, base=base, mask=mask)
    out = torch.promote_types(losses.dtype, torch.float32)
    weights, value = worst.weights.to(out), worst.value.to(out)
    # Through where: an entry without weight may be -inf or, masked, anything.
    mean = (torch.where(weights == 0, 0.0, losses) * weights).sum()
    return mean - (mean.detach() - value)
