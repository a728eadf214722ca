"""The two losses of proximal policy optimisation, entry by entry: a token or a sequence each."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _token_checks
from ._inputs import per_entry, widened


def clipped_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Tensor:
    """Clipped policy loss of every token, or of every sequence.

        -min(w A, clip(w, 1 - clip, 1 + clip_high) A),     w = exp(log_probs - old_log_probs)

    Per token with (n, T) inputs: `sequence_mean(losses, mask)` then makes it one loss per sample. Per
    sequence with (n,) inputs, log-probabilities summed (or, as in GSPO, averaged) over the tokens before.

    It is positively homogeneous in A: scaling the advantages by a ratio >= 0 scales the loss.

    Args:
        log_probs: (n, T) or (n,) under the policy.
        old_log_probs: of the same shape, under the policy that generated.
        advantages: of the same shape, or (n,) where one advantage holds for a whole sequence.
        clip: in (0, 1), how far the probability ratio may fall, and rise where `clip_high` is None.
        clip_high: > 0, how far it may rise.
    Returns: losses of the shape of `log_probs`, in float32 or wider; -A where policies agree.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range.
    Source: arXiv 1707.06347, eq. 7; separate upper clip: arXiv 2503.14476; sequences: arXiv 2507.18071.

    >>> import torch
    >>> clipped_surrogate(torch.tensor([0.5, 0.0]), torch.zeros(2), torch.tensor([1.0, 2.0]), clip=0.2)
    tensor([-1.2000, -2.0000])
    """
    _checks.number("clip", clip, 0.0, 1.0, "0.2 is usual.", open_low=True, open_high=True)
    high = clip if clip_high is None else clip_high
    _checks.number("clip_high", high, 0.0, torch.inf, "Leave it out to clip as far as below.", open_low=True)
    log_probs, old_log_probs = per_entry(log_probs=log_probs, old_log_probs=old_log_probs)
    log_probs, old_log_probs, advantages = widened(log_probs, old_log_probs, _of_tokens(advantages, log_probs))
    moved = (log_probs - old_log_probs).exp()
    return -torch.minimum(moved * advantages, moved.clamp(1 - clip, 1 + high) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """Loss of the critic for every token, or every sequence.

        (1/2) max((V - R)^2, (V_clipped - R)^2),     V_clipped = V_old + clip(V - V_old, -clip, clip)

    Args:
        values, old_values, returns: of one shape, any. `old_values` are those of the rollout.
        clip: > 0, or None for the plain squared error.
    Returns: losses of that shape, in float32 or wider.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range.
    Source: arXiv 1707.06347 (squared error); the clipping is of the released code (openai/baselines).

    >>> import torch
    >>> value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip=0.5)
    tensor([0.1250])
    """
    values, old_values, returns = per_entry(values=values, old_values=old_values, returns=returns)
    error = (values - returns).square()
    if clip is not None:
        _checks.number("clip", clip, 0.0, torch.inf, "Use None for the plain squared error.", open_low=True)
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2


def _of_tokens(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """Advantages for every entry; one for a sequence holds for all its tokens."""
    _checks.floating("advantages", advantages)
    if log_probs.dim() == 2 and advantages.dim() == 1 and len(advantages) == len(log_probs):
        advantages = advantages.unsqueeze(-1).expand_as(log_probs)
    _token_checks.same_entries("advantages", advantages, "log_probs", log_probs)
    return advantages
