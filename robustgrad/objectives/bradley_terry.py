"""The loss of a reward model: how unlikely it makes the preference that was observed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ._inputs import per_sample


def bradley_terry(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Bradley-Terry negative log-likelihood of every preference pair.

        -(1 - eps) log sigmoid(h) - eps log sigmoid(-h),      h = chosen - rejected - margin

    Args:
        chosen: (n,) rewards of the preferred responses, float16, bfloat16, float32 or float64.
        rejected: (n,) rewards of the other responses, in the same order.
        margin: (n,) or a float: by how much the preferred reward should at least lead, in units of the
            reward. None is 0.
        label_smoothing: eps in [0, 0.5), the share of the labels that is taken to be wrong.
    Returns: (n,) losses in float32, or float64 where an input is float64, with their graph. The
        difference is taken in that dtype too: in bfloat16 it would lose most of its digits.
    Raises: TypeError or ValueError: an input that is not floating point, not (n,), or on another
        device; label_smoothing outside its range.
    A NaN reward gives a NaN loss for its own pair only. Losses and gradients stay finite for any
    finite difference.
    Source: Bradley & Terry (1952); margin: arXiv 2307.09288, section 3.2.2.

    >>> import torch
    >>> bradley_terry(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]))
    tensor([0.1269, 0.6931])
    """
    wide_chosen, wide_rejected = per_sample(chosen=chosen, rejected=rejected)
    _checks.number("label_smoothing", label_smoothing, 0.0, 0.5, "It is the share of wrong labels.", open_high=True)
    lead = wide_chosen - wide_rejected - _checked_margin(margin, chosen)
    # Without smoothing the second term stays out: an infinite lead would make it 0 * inf.
    if label_smoothing == 0:
        return -F.logsigmoid(lead)
    return -(1 - label_smoothing) * F.logsigmoid(lead) - label_smoothing * F.logsigmoid(-lead)


def _checked_margin(margin: Tensor | float | None, chosen: Tensor) -> Tensor | float:
    if margin is None:
        return 0.0
    if isinstance(margin, Tensor):
        _checks.same_samples("margin", margin, "chosen", chosen)
        return margin
    return _checks.number("margin", margin, -torch.inf, torch.inf, "Use None for no margin.")
