"""How many losses saturate a set, how many it wants remembered, and radii in other conventions."""

from __future__ import annotations

import math

import pytest
import torch

from robustgrad.ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

SATURATES = {
    TotalVariation(0.75): 4.0,
    TotalVariation(1.0): math.inf,
    TotalVariation(0.3, cap=2.0): 1 / 0.7,
    TotalVariation(0.75, cap=2.0): 2.0,
    TotalVariation(0.75, cap=8.0): 4.0,
    TotalVariation(penalty=1.0): 1.0,
    ChiSquare(1.5): 4.0,
    ChiSquare(penalty=1.0): 1.0,
    KL(math.log(4.0)): 4.0,
    KL(temperature=1.0): 1.0,
    CVaR(0.25): 4.0,
}


@pytest.mark.parametrize("ambiguity", SATURATES, ids=str)
def test_a_pool_this_small_is_its_maximum_and_a_larger_one_is_not(ambiguity: AmbiguitySet) -> None:
    assert ambiguity.saturating_size == pytest.approx(SATURATES[ambiguity])
    for n in (2, 4, 5):
        if not math.isclose(n, SATURATES[ambiguity]):  # on the edge rounding decides
            saturated = ambiguity.solve(torch.arange(float(n)) / n).max_ratio > n * (1 - 1e-6)
            assert bool(saturated) == (n < SATURATES[ambiguity]), n


@pytest.mark.parametrize(
    ("ambiguity", "step_size", "size"),
    [
        (KL(0.1), 8, 512),
        (KL(0.1), 200, 800),
        (ChiSquare(0.1), 200, 800),
        (CVaR(0.5), 8, 512),
        (CVaR(0.05), 8, 1000),
        (TotalVariation(0.1), 8, 512),
        (TotalVariation(0.1), 50, 800),
        (TotalVariation(0.1), 64, 1024),
        (TotalVariation(0.1), 100, 1024),
        (TotalVariation(0.1), 0, 512),
        (TotalVariation(0.1, cap=11.0), 8, 1600),
        (TotalVariation(penalty=1.0), 64, 1024),
    ],
    ids=str,
)
def test_memory_size(ambiguity: AmbiguitySet, step_size: int, size: int) -> None:
    """The largest of 512, 4B, 50 / alpha and 16 / kappa."""
    assert ambiguity.memory_size(step_size) == size


def test_radii_without_the_half() -> None:
    assert TotalVariation.from_l1(0.4) == TotalVariation(0.2)
    assert TotalVariation.from_l1(2.0, cap=3.0) == TotalVariation(1.0, cap=3.0)
    assert ChiSquare.from_unhalved(0.4) == ChiSquare(0.2)
