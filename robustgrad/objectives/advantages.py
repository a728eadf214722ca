"""How much better than expected: advantages over the tokens of a response, and their whitening."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _token_checks
from ._inputs import per_entry


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float = 1.0, trace: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the critic's targets.

        A_t = sum_k (discount * trace)^k delta_{t+k},   delta_t = r_t + discount V_{t+1} - V_t,   R = A + V

    Linear in (rewards, values) jointly, not in the rewards alone: scaling the rewards is not scaling
    the advantages unless the critic is scaled too.

    Args:
        rewards: (n, T) of every token (see `penalised_rewards`).
        values: (n, T) the critic's estimates at the rollout.
        mask: (n, T) bool, True on the tokens of the response, which lie side by side.
        discount, trace: gamma and lambda, in [0, 1].
    Returns: advantages and returns, (n, T) each, detached, float32 or wider; 0 on padding.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range.
    Source: arXiv 1506.02438, eq. 16.

    >>> import torch
    >>> one = torch.ones(1, 2, dtype=torch.bool)
    >>> generalized_advantages(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), one, trace=1.0)
    (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    for name, share in (("discount", discount), ("trace", trace)):
        _checks.number(name, share, 0.0, 1.0, "It is a share.")
    rewards, values = per_entry(rewards=rewards, values=values)
    _token_checks.token_mask(mask, "rewards", rewards)
    rewards, values = (torch.where(mask, entries.detach(), 0.0) for entries in (rewards, values))
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    surprise = rewards + discount * after - values
    advantages, running = torch.zeros_like(surprise), torch.zeros_like(surprise[..., 0])
    for t in reversed(range(surprise.shape[-1])):
        running = surprise[..., t] + discount * trace * running
        advantages[..., t] = running
    advantages = torch.where(mask, advantages, 0.0)
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor, *, center: bool = True) -> Tensor:
    """(values - mean) / std over all real entries of the batch; 0 on padding.

    Args:
        values: any shape.
        mask: bool of that shape, True where the entry is real.
        center: False keeps the mean where it was.
    Returns: float32 or wider; with no spread, the centred values themselves.
    Raises: TypeError or ValueError: an argument of another shape, type or device.
    Source: the biased variance plus 1e-8, as in the released code of Ziegler et al. (arXiv 1909.08593).

    >>> import torch
    >>> whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    (values,) = per_entry(values=values)
    _token_checks.token_mask(mask, "values", values)
    count = mask.sum().clamp_min(1)
    mean = torch.where(mask, values, 0.0).sum() / count
    centred = torch.where(mask, values - mean, 0.0)
    scaled = centred * (centred.square().sum() / count + 1e-8).rsqrt()
    return scaled if center else scaled + torch.where(mask, mean, 0.0)
