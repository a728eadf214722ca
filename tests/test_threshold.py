"""The threshold, read off the ratio: the loss at which the rule of each set bends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustgrad.ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation


def expected(ambiguity: AmbiguitySet, losses: Tensor, ratio: Tensor) -> Tensor:
    (r1, r2), at = ratio.topk(2)
    l1, l2 = losses[at]
    match ambiguity:
        case ChiSquare():  # where the line through the two largest reaches 0
            return l1 - r1 * (l1 - l2) / (r1 - r2)
        case KL():  # where the exponential through them reaches 1
            return l1 - r1.log() * (l1 - l2) / (r1 / r2).log()
        case TotalVariation(penalty=float(penalty)):
            return l1 - penalty
    return losses[ratio > 0].min()


BALLS = [TotalVariation(0.3), ChiSquare(0.1), ChiSquare(2.0), KL(0.3), KL(1e-6), KL(0.0), CVaR(0.35)]
PRICED = [TotalVariation(penalty=2.0), ChiSquare(penalty=1.5), KL(temperature=2.0)]
each_base = pytest.mark.parametrize("weighted", [False, True])


def bends(ambiguity: AmbiguitySet, weighted: bool, scale: float = 1.0) -> None:
    losses = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 - 7
    base = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if weighted else None
    worst = ambiguity.solve(losses * scale, base=base)
    want = worst.mean / scale if ambiguity == KL(0.0) else expected(ambiguity, losses, worst.ratio)
    torch.testing.assert_close(worst.threshold / scale, want, rtol=1e-6, atol=1e-6)


@each_base
@pytest.mark.parametrize("ambiguity", [*BALLS, *PRICED, TotalVariation(0.3, cap=2.0)], ids=str)
def test_the_rule_bends_at_the_threshold(ambiguity: AmbiguitySet, weighted: bool) -> None:
    bends(ambiguity, weighted)


@each_base
@pytest.mark.parametrize("ambiguity", BALLS, ids=str)
def test_also_where_squares_would_overflow(ambiguity: AmbiguitySet, weighted: bool) -> None:
    bends(ambiguity, weighted, 1e200)


@pytest.mark.parametrize("ambiguity", [TotalVariation(0.5), CVaR(0.5), ChiSquare(0.1)], ids=str)
def test_a_weight_of_two_is_the_loss_twice(ambiguity: AmbiguitySet) -> None:
    """The top half ends exactly between 4 and 3: 4 is what it reaches."""
    losses, counts = torch.tensor([5.0, 4.0, 3.0, 1.0]), torch.tensor([2, 2, 1, 3])
    weighted = ambiguity.solve(losses, base=counts.float())
    repeated = ambiguity.solve(losses.repeat_interleave(counts))
    torch.testing.assert_close(weighted.threshold, repeated.threshold)
