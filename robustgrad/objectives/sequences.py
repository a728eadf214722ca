"""From tokens to sequences: log-probabilities out of logits, and masked sums and means."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _token_checks


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi(token | those before it), for every token but the first, (n, T - 1).

    Args:
        logits: (n, T, V) a causal model's output for `tokens`; position t predicts token t + 1.
        tokens: (n, T) integer ids.
    Returns: (n, T - 1) in float32 or wider; entry t belongs to token t + 1.
    Raises: TypeError or ValueError: another shape or type.

    >>> import torch
    >>> token_log_probs(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]))
    tensor([[-1.3863, -1.3863]])
    """
    _checks.floating("logits", logits)
    _token_checks.token_ids(tokens, logits)
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    chosen = wide.gather(-1, tokens[:, 1:, None].long()).squeeze(-1)
    return chosen - wide.logsumexp(-1)


def sequence_log_probs(logits: Tensor, tokens: Tensor, mask: Tensor, *, average: bool = False) -> Tensor:
    """log pi(response | prompt), (n,): the sum over the tokens that `mask` marks.

    Args:
        logits: (n, T, V) a causal model's output for `tokens`.
        tokens: (n, T) integer ids of prompt and response.
        mask: (n, T) bool, True on the tokens of the response. The first token of a sequence has no
            prediction: it is left out whatever its mask.
        average: divide by the number of marked tokens (SimPO, IPO per token).
    Returns: (n,) in float32 or wider; 0 for a sequence without a marked token.
    Raises: TypeError or ValueError: another shape or type.

    >>> import torch
    >>> tokens, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]])
    >>> sequence_log_probs(torch.zeros(1, 3, 4), tokens, mask)
    tensor([-2.7726])
    """
    log_probs = token_log_probs(logits, tokens)
    _token_checks.token_mask(mask, "tokens", tokens)
    reduce = sequence_mean if average else sequence_sum
    return reduce(log_probs, mask[:, 1:])


def sequence_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the real tokens of each sequence: (..., T) values and bool mask to (...)."""
    _checks.floating("values", values)
    _token_checks.token_mask(mask, "values", values)
    # Through where: padding may hold anything.
    return torch.where(mask, values, 0.0).sum(-1)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of each sequence, (...); 0 for a sequence without one.

    >>> import torch
    >>> sequence_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([2.])
    """
    return sequence_sum(values, mask) / mask.sum(-1).clamp_min(1)
