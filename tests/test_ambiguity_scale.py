"""Where rounding or overflow would show: tiny radii, steep tilts over masked losses, losses of any scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustgrad.ambiguity import KL, ChiSquare, _problem
from robustgrad.ambiguity._problem import all_equal


def losses() -> Tensor:
    return torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log().neg()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("radius", [1e-12, 1e-8, 1e-5])
def test_a_tiny_radius_is_reached(radius: float, rows: int) -> None:
    """Far from 0 the mean distance below the maximum is large, and must not drown the divergence."""
    given = losses().expand(rows, -1).squeeze(0)
    theta = (2 * radius / losses().var(correction=0)).sqrt()
    skewness = ((losses() - losses().mean()) ** 3).mean() / losses().var(correction=0)
    found = KL(radius).solve(given).ratio.log().reshape(rows, -1)
    tilt = (found.amax(-1) - found.amin(-1)) / (losses().max() - losses().min())
    expected = theta * (1 - theta * skewness / 3)
    torch.testing.assert_close(tilt, expected.expand(rows), rtol=20 * radius + 1e-5, atol=0.0)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("hidden", [float("nan"), 1e6])
def test_masked_losses_do_not_overflow_under_a_steep_tilt(rows: int, hidden: float) -> None:
    shown = torch.tensor([1.0, 1.0 - 1e-4, 0.5, -1.0], dtype=torch.float64)
    mask = torch.tensor([True, True, True, True, False])
    given = torch.cat((shown, torch.tensor([hidden], dtype=torch.float64))).expand(rows, -1).squeeze(0)
    ratio = KL(1.0).solve(given, mask=mask).ratio.reshape(rows, -1)
    torch.testing.assert_close(ratio[:, :4], KL(1.0).solve(shown).ratio.expand(rows, -1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e-100, 1e-90, 1e-77, 1e-72, 1e-60, 1e60, 1e99, 1e200])
@pytest.mark.parametrize("ambiguity", [KL(0.3), ChiSquare(0.5)], ids=str)
def test_a_single_row_of_any_scale(ambiguity: KL | ChiSquare, scale: float) -> None:
    torch.testing.assert_close(ambiguity.solve(losses() * scale).ratio, ambiguity.solve(losses()).ratio)


@pytest.mark.parametrize("ambiguity", [KL(0.3), KL(temperature=0.5), ChiSquare(0.5), ChiSquare(penalty=0.5)], ids=str)
def test_a_rule_is_fitted_alike_where_no_value_is_looked_at(
    ambiguity: KL | ChiSquare, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, weight, one = losses(), torch.ones(40, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    looked = ambiguity.fit(given, weight, unit=one, step_size=one).ratio(given)
    monkeypatch.setattr(_problem, "readable", lambda tensor: False)
    torch.testing.assert_close(ambiguity.fit(given, weight, unit=one, step_size=one).ratio(given), looked)


def test_weights_that_are_all_zero_are_no_uniform_base() -> None:
    assert all_equal(torch.full((3,), 0.5)) and not all_equal(torch.zeros(3))
    assert not all_equal(torch.tensor([0.5, 0.5, 1.0]))
