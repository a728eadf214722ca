"""Inverse-frequency weights: all groups count the same, whatever their losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks


def inverse_frequency_ratio(groups: Tensor, *, counts: Sequence[int] | Tensor | None = None) -> Tensor:
    """Ratio of every sample, (n,): `(ratio * losses).mean()` is the mean of the groups' means.

        with counts:   N / (G N_g)          mean 1 over the training set
        without:       n / (G n_g)          mean 1 in the batch, over the G groups that it holds

    Args:
        groups: (n,) integer ids; 0 .. G - 1 where `counts` is given, any otherwise.
        counts: (G,) samples of each group in the training set, above 0. None counts those of the batch: noisy
            for small batches, where one sample of a rare group gets a large ratio.
    Returns: (n,) float32.
    Raises: TypeError or ValueError: an argument of another shape, type or range.

    >>> import torch
    >>> inverse_frequency_ratio(torch.tensor([0, 0, 0, 1]))
    tensor([0.6667, 0.6667, 0.6667, 2.0000])
    """
    _checks.integer_ids(groups, groups.detach())
    if groups.dim() != 1:
        raise ValueError(f"groups must have shape (n,), got {tuple(groups.shape)}. Give one id per sample.")
    if counts is None:
        members = (groups[:, None] == groups).sum(-1).float()
        return len(groups) / (members * members.reciprocal().sum())
    table = torch.as_tensor(counts, dtype=torch.float32)
    _checks.group_counts(table)
    _checks.group_ids(groups, groups, len(table))
    table = table.to(groups.device)
    return (table.sum() / (len(table) * table))[groups.long()]
