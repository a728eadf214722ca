"""The pull towards the reference policy: in the reward, or in the loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import _checks, _token_checks
from ._inputs import per_entry, widened


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, *, kind: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Estimate of KL(pi || pi_ref) from samples of pi, entry by entry.

        k1: d        k2: d^2 / 2        k3: exp(-d) - 1 + d,       d = log_probs - reference_log_probs

    k1 is unbiased and can be negative: for the reward. Its gradient in the loss has mean zero, so there
    use k3 (unbiased value, never negative) or k2 (its gradient is the true one of the KL).

    Args:
        log_probs, reference_log_probs: of one shape, any.
        kind: "k1", "k2" or "k3".
    Returns: of that shape, in float32 or wider; 0 where the policies agree.
    Raises: TypeError or ValueError: an argument of another shape, type, device or name.
    Source: Schulman (2020), "Approximating KL divergence"; k3 in the loss: arXiv 2402.03300, eq. 4.

    >>> import torch
    >>> kl_estimate(torch.tensor([0.5]), torch.tensor([0.0]), kind="k1")
    tensor([0.5000])
    """
    _checks.choice("kind", kind, ("k3", "k2", "k1"))
    log_probs, reference = per_entry(log_probs=log_probs, reference_log_probs=reference_log_probs)
    gap = log_probs - reference
    if kind == "k1":
        return gap
    # expm1: beside a small gap the 1 would eat the digits.
    return gap.square() / 2 if kind == "k2" else torch.expm1(-gap) + gap


def penalised_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """Reward of every token: -beta kl on each real one, and the sequence's own reward on the last of them.

    Args:
        rewards: (n,) one for each sequence.
        kl: (n, T) estimate for every token (`kl_estimate(..., kind="k1")`).
        mask: (n, T) bool, True on the tokens of the response.
        beta: >= 0.
    Returns: (n, T) in float32 or wider, detached; 0 on padding. Row sums are rewards - beta * KL. A
        sequence without a real token has nowhere to put its reward: all 0.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range.
    Source: arXiv 2203.02155, eq. 2, spread over the tokens as in Ziegler et al. (arXiv 1909.08593).

    >>> import torch
    >>> mask = torch.tensor([[True, True, False]])
    >>> penalised_rewards(torch.tensor([1.0]), torch.full((1, 3), 0.5), mask, beta=0.2)
    tensor([[-0.1000,  0.9000,  0.0000]])
    """
    _checks.number("beta", beta, 0.0, torch.inf, "Use 0 for no penalty.")
    _checks.per_sample("rewards", rewards)
    _checks.floating("kl", kl)
    _token_checks.token_mask(mask, "kl", kl)
    if kl.shape[:-1] != rewards.shape:
        raise ValueError(f"kl must have shape (n, T) with n = {len(rewards)} as rewards, got {tuple(kl.shape)}.")
    rewards, kl = widened(rewards.detach(), kl.detach())
    # Real tokens from here on: the last one of a row counts one.
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(mask, -beta * kl, 0.0) + torch.where(last, rewards.unsqueeze(-1), 0.0)
