"""Pessimism about rewards: the worst of several reward models, or the worst in a ball around one."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _token_checks


def pessimistic_rewards(rewards: Tensor, *, temperature: float) -> Tensor:
    """Worst case over the members of an ensemble under a KL penalty, (n,).

        min_q <q, r> + b KL(q || uniform)  =  -b log mean_k exp(-r_k / b)

    Args:
        rewards: (m, n) of m reward models for n responses.
        temperature: > 0, b, in units of the reward. Towards infinity it is the mean of the members, towards 0
            the lowest of them.
    Returns: (n,) float32 or wider, with its graph.
    Raises: TypeError or ValueError: an argument of another shape, type or range.
    Source: arXiv 2606.09073 as secondary notes give it; its text was not read.

    >>> import torch
    >>> pessimistic_rewards(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), temperature=1.0)
    tensor([0.3799, 1.0000])
    """
    _checks.number("temperature", temperature, 0.0, torch.inf, "It is the price of a KL of 1.", open_low=True)
    _table("rewards", rewards, "(m, n) of m reward models for n responses")
    wide = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    # One member, or equal ones: the mean of the exponentials is then 1 exactly.
    low = wide.detach().amin(0)
    return low - temperature * ((low - wide) / temperature).exp().mean(0).log()


def worst_regret(rewards: Tensor, probs: Tensor, *, radius: float) -> Tensor:
    """Regret of a policy under the worst rewards in an l1 ball, (n,).

        max_{|r' - r|_1 <= d}  max_a r'_a - pi . r'   =   max_a [r_a + d (1 - pi_a)] - pi . r

    Args:
        rewards: (n, K) of K candidate responses for each of n prompts.
        probs: (n, K) the policy's probabilities of them, summing to 1.
        radius: >= 0, d, in units of the reward. 0 is the plain regret.
    Returns: (n,) float32 or wider, with its graph.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range.
    Source: arXiv 2605.00155, of which the abstract was read; the closed form is derived here.

    >>> import torch
    >>> worst_regret(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]), radius=1.0)
    tensor([1.])
    """
    _checks.number("radius", radius, 0.0, torch.inf, "0 is the plain regret.")
    _table("rewards", rewards, "(n, K) of K candidates for n prompts")
    _token_checks.same_entries("probs", probs, "rewards", rewards)
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, probs.dtype), torch.float32)
    rewards, probs = rewards.to(dtype), probs.to(dtype)
    return (rewards + radius * (1 - probs)).amax(-1) - (probs * rewards).sum(-1)


def _table(name: str, tensor: Tensor, rule: str) -> None:
    _checks.floating(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have shape {rule}, got {tuple(tensor.shape)}. Stack them with torch.stack.")
