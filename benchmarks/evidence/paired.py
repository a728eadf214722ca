"""Differences between methods that ran on the same seeds, batches and pairs, with bootstrap intervals."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_DRAWS = 1000
_UNITS = 100_000  # the rows hold five decimals
_POWERED = 1.96 + 0.84  # standard errors: found at the 5% level in 80% of experiments


class Difference(NamedTuple):
    mean: float
    low: float
    high: float
    error: float

    @property
    def clear(self) -> bool:
        """The 95% interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def smallest(self) -> float:
        """The smallest true difference that such a run would have seen."""
        return _POWERED * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    @property
    def short(self) -> str:
        return f"{self.mean:+.3f}" + ("*" if self.clear else "")


def difference(one: Tensor, other: Tensor) -> Difference:
    """Of means of (seeds, pairs). Seeds and pairs are both drawn anew: the interval is about others of either."""
    return mean_of([(one, other)])


def difference_of_numbers(one: list[float], other: list[float]) -> Difference:
    """Of numbers by seed, of at most five decimals, seeds drawn anew."""
    gap = torch.tensor([round(_UNITS * (a - b)) for a, b in zip(one, other, strict=True)], dtype=torch.float64)
    return _summary(gap.mean().item() / _UNITS, (_counts(len(gap), 0) * gap).sum(-1) / (len(gap) * _UNITS))


def mean_of(parts: list[tuple[Tensor, Tensor]]) -> Difference:
    """Of the mean over several sets, each counting the same; the seeds are the same in all."""
    gaps = [(one - other).double() for one, other in parts]
    drawn = [_drawn(gap, 1 + i) for i, gap in enumerate(gaps)]
    return _summary(sum(gap.mean().item() for gap in gaps) / len(gaps), torch.stack(drawn).mean(0))


def _drawn(gap: Tensor, of_pairs: int) -> Tensor:
    """(draws,) means of (seeds, pairs), both drawn anew."""
    # Counts times halves: the sums are exact, so that every machine rounds the page alike.
    by_seed = _counts(gap.shape[1], of_pairs) @ gap.T
    return (_counts(gap.shape[0], 0) * by_seed).sum(-1) / gap.numel()


def _summary(mean: float, drawn: Tensor) -> Difference:
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Difference(mean, low, high, drawn.std().item())


@lru_cache(maxsize=64)
def _counts(count: int, seed: int) -> Tensor:
    """(draws, count) how often each of them is drawn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (_DRAWS, count), generator=generator)
    ones = torch.ones(_DRAWS, count, dtype=torch.float64)
    return torch.zeros(_DRAWS, count, dtype=torch.float64).scatter_add_(1, drawn, ones)
