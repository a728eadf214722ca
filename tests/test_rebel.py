"""REBEL: both scalings by hand, their relation, and which ambiguity sets see the difference."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation
from robustgrad.objectives import rebel


def inputs(n: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, dtype=torch.float64, generator=generator) for _ in range(5)]


def test_both_scalings_by_hand() -> None:
    first, second, old_first, old_second, gap = rows = inputs()
    for i in range(12):
        lead = (first[i] - old_first[i]) - (second[i] - old_second[i])
        assert_close(rebel(*rows, eta=0.5)[i], (lead / 0.5 - gap[i]) ** 2)
        assert_close(rebel(*rows, eta=0.5, scale="log_prob")[i], (lead - 0.5 * gap[i]) ** 2)
    assert_close(rebel(*rows, eta=0.5, scale="log_prob"), 0.25 * rebel(*rows, eta=0.5))


@pytest.mark.parametrize("scale", ["reward", "log_prob"])
def test_gradients_against_differences(scale: str) -> None:
    rows = [row.requires_grad_() for row in inputs(4)]
    assert torch.autograd.gradcheck(lambda *r: rebel(*r, eta=0.7, scale=scale), rows)


@pytest.mark.parametrize(
    ("ambiguity", "sees_the_scale"),
    [
        (TotalVariation(0.2), False),
        (ChiSquare(0.5), False),
        (KL(0.3), False),
        (CVaR(0.3), False),
        (KL(temperature=0.5), True),
        (ChiSquare(penalty=0.5), True),
    ],
    ids=repr,
)
def test_radii_do_not_see_the_scale_and_prices_do(ambiguity: AmbiguitySet, sees_the_scale: bool) -> None:
    rows = inputs()
    one, other = (ambiguity.solve(rebel(*rows, eta=0.1, scale=scale)).ratio for scale in ("reward", "log_prob"))
    assert torch.allclose(one, other) is not sees_the_scale


def test_zero_where_the_policy_has_taken_the_step() -> None:
    """pi proportional to pi_t exp(eta r): the log-ratios differ by eta times the gap."""
    _, second, old_first, old_second, gap = inputs()
    first = old_first + (second - old_second) + 0.3 * gap
    assert_close(rebel(first, second, old_first, old_second, gap, eta=0.3), torch.zeros(12, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "eta must be in (0, inf), got 0.0"),
        ({"eta": 0.1, "scale": "half"}, "scale must be 'reward' or 'log_prob', got 'half'"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rebel(*inputs(), **options)


def test_shapes_that_are_refused() -> None:
    first, second, old_first, old_second, gap = inputs()
    with pytest.raises(ValueError, match=re.escape("reward_gap must have the shape of first (12,), got (3,)")):
        rebel(first, second, old_first, old_second, gap[:3], eta=1.0)
