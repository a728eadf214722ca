"""Group-relative policy optimisation: the other responses to a prompt are the baseline."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import _checks


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Advantage of every response over the mean of its prompt.

        (r - mean of its group) / (std + eps)

    They average 0 within each prompt: as losses they say nothing about which *prompts* go badly. The
    adversary needs `scores` (minus the reward) and `groups` for that; see `robustgrad.robust_ppo`.

    Args:
        rewards: (n,) one for each response.
        groups: (n,) integer id of the prompt of each response, in any order.
        scale: which unbiased standard deviation divides: of the "group", of all rewards of the "batch", or
            "none" (Dr. GRPO).
        eps: >= 0, added to the standard deviation.
    Returns: (n,) detached, float32 or wider; 0 for a response alone with its prompt. A NaN reward makes its
        own group NaN (with scale="batch", all).
    Raises: TypeError or ValueError: an argument of another shape, type, device or range, or no groups.
    Source: arXiv 2402.03300, section 4.1.2; without division: arXiv 2503.20783.

    >>> import torch
    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]), scale="none")
    tensor([-1.,  1.,  0.,  0.])
    """
    _checks.per_sample("rewards", rewards)
    if groups is None:
        raise ValueError("groups must be the prompt's integer id of every response, got None. Number the prompts.")
    _checks.integer_ids(groups, rewards)
    _checks.choice("scale", scale, ("group", "batch", "none"))
    _checks.number("eps", eps, 0.0, torch.inf, "1e-4 is usual.")
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    same = groups[:, None] == groups
    count = same.sum(-1)
    # Through where, not a product: a NaN reward stays in its own group.
    centred = rewards - torch.where(same, rewards, 0.0).sum(-1) / count
    if scale == "none":
        return centred
    if scale == "group":
        variance = torch.where(same, centred.square(), 0.0).sum(-1) / (count - 1).clamp_min(1)
    else:
        variance = (rewards - rewards.mean()).square().sum() / max(len(rewards) - 1, 1)
    return centred / (variance.sqrt() + eps)
