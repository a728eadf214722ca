"""The worst-case value and its envelope gradient."""

from __future__ import annotations

import pytest
import torch

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation, robust_loss

SETS = [TotalVariation(0.3), ChiSquare(0.5), ChiSquare(penalty=0.5), KL(0.3), KL(temperature=0.5), CVaR(0.4)]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)


@each_set
def test_value_and_gradient(ambiguity: AmbiguitySet) -> None:
    losses = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    base = torch.linspace(1, 2, 20)
    value = robust_loss(losses, ambiguity, base=base)
    worst = ambiguity.solve(losses, base=base)
    value.backward()
    torch.testing.assert_close(value, worst.value)
    torch.testing.assert_close(losses.grad, worst.weights)


@each_set
def test_gradient_is_the_derivative_of_the_value(ambiguity: AmbiguitySet) -> None:
    """Against central differences of the value itself, where it is smooth."""
    losses = torch.tensor([0.1, 0.5, 0.9, 1.7, 2.2, 3.1], dtype=torch.float64, requires_grad=True)
    robust_loss(losses, ambiguity).backward()
    step = 1e-6 * torch.eye(6, dtype=torch.float64)
    slopes = (ambiguity.solve(losses + step).value - ambiguity.solve(losses - step).value) / 2e-6
    torch.testing.assert_close(losses.grad, slopes, rtol=1e-5, atol=1e-6)


def test_groups_and_mask() -> None:
    losses = torch.tensor([0.0, 4.0, 3.0, torch.nan], requires_grad=True)
    mask, groups = torch.tensor([True, True, True, False]), torch.tensor([0, 0, 1, 1])
    value = robust_loss(losses, CVaR(1 / 3), groups=groups, mask=mask)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(3.0))
    torch.testing.assert_close(losses.grad, torch.tensor([0.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_losses_give_nan(bad: float) -> None:
    losses = torch.tensor([1.0, bad, 2.0], requires_grad=True)
    value = robust_loss(losses, TotalVariation(0.1))
    value.backward()
    assert value.isnan() and losses.grad.isnan().all()


def test_minus_infinity_without_weight_is_nothing() -> None:
    losses = torch.tensor([1.0, -torch.inf, 2.0], requires_grad=True)
    value = robust_loss(losses, CVaR(0.5))
    value.backward()
    assert value.isfinite() and losses.grad.isfinite().all()


def test_half_precision_gives_float32() -> None:
    value = robust_loss(torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True), CVaR(0.5))
    assert value.dtype == torch.float32 and value == 2.0


def test_evaluation_needs_no_gradient() -> None:
    with torch.no_grad():
        assert robust_loss(torch.tensor([1.0, 3.0]), TotalVariation(0.5)) == 3.0


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (torch.rand(2, 2), {}, r"\(n,\), got \(2, 2\).*one entry per sample"),
        (torch.arange(3), {}, "int64"),
        (torch.rand(0), {}, "n >= 1"),
        (torch.rand(3), {"groups": torch.rand(3)}, "integer ids"),
        (torch.rand(3), {"base": torch.rand(2)}, r"base must have the shape"),
    ],
)
def test_wrong_arguments(losses: torch.Tensor, options: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        robust_loss(losses, CVaR(0.5), **options)
