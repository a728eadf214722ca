"""The Bradley-Terry objective: values by hand, gradients by differences, and inputs it must refuse."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.testing import assert_close

from robustgrad.objectives import bradley_terry

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def by_hand(chosen: float, rejected: float, margin: float = 0.0, eps: float = 0.0) -> float:
    """The definition in plain Python floats."""
    p = 1 / (1 + math.exp(-(chosen - rejected - margin)))
    return -(1 - eps) * math.log(p) - eps * math.log(1 - p)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("margin", [None, 0.75, -2, torch.tensor([0.5, -1.0, 0.0])])
def test_values_by_hand(margin: torch.Tensor | float | None, eps: float) -> None:
    chosen, rejected = torch.tensor([1.5, -0.25, 0.0]), torch.tensor([0.5, 2.0, 0.0])
    margins = [0.0] * 3 if margin is None else torch.as_tensor(margin, dtype=torch.float64).expand(3).tolist()
    rows = zip(chosen.tolist(), rejected.tolist(), margins, strict=True)
    expected = torch.tensor([by_hand(*row, eps) for row in rows])
    assert_close(bradley_terry(chosen, rejected, margin=margin, label_smoothing=eps), expected)


def test_undecided_pair_costs_log_two() -> None:
    zeros = torch.zeros(4)
    assert_close(bradley_terry(zeros, zeros), torch.full((4,), math.log(2)))


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_gradients_against_differences(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = [3 * torch.randn(7, dtype=torch.float64, generator=generator) for _ in range(3)]
    inputs = [r.requires_grad_() for r in rewards]

    def losses(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
        return bradley_terry(chosen, rejected, margin=margin, label_smoothing=eps)

    assert torch.autograd.gradcheck(losses, inputs)
    assert torch.autograd.gradgradcheck(losses, inputs)


@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("lead", [1e4, -1e4])
@pytest.mark.parametrize("through", ["rewards", "margin"])
def test_extreme_leads_stay_finite(lead: float, eps: float, through: str) -> None:
    chosen = torch.tensor([lead if through == "rewards" else 0.0], requires_grad=True)
    margin = None if through == "rewards" else -lead
    losses = bradley_terry(chosen, torch.zeros(1), margin=margin, label_smoothing=eps)
    losses.sum().backward()
    assert_close(losses, torch.tensor([(1 - eps if lead < 0 else eps) * 1e4]))
    assert_close(chosen.grad, torch.tensor([-(1 - eps) if lead < 0 else eps]))


def test_infinite_and_nan_rewards_stay_in_their_pair() -> None:
    losses = bradley_terry(torch.tensor([math.inf, -math.inf, math.nan, 0.0]), torch.zeros(4))
    assert_close(losses, torch.tensor([0.0, math.inf, math.nan, math.log(2)]), equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_computed_in_float32_or_wider(dtype: torch.dtype) -> None:
    # All exact one by one; their differences are not in either half precision.
    leads = [(4.0, 2.0**-12), (2.0**-12, 4.0)]
    chosen, rejected = torch.tensor(leads, dtype=dtype).unbind(1)
    chosen.requires_grad_()
    losses = bradley_terry(chosen, rejected)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = torch.tensor([by_hand(*lead) for lead in leads], dtype=wide)
    assert_close(losses, exact, rtol=1e-6, atol=0)
    losses.sum().backward()
    assert chosen.grad is not None and chosen.grad.dtype == dtype


def test_float64_rejected_or_margin_widens() -> None:
    narrow, wide = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    assert bradley_terry(narrow, wide).dtype == torch.float64
    assert bradley_terry(narrow, narrow, margin=wide).dtype == torch.float64


def test_each_argument_has_an_effect() -> None:
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.5])
    plain = bradley_terry(chosen, rejected)
    assert bradley_terry(chosen + 1, rejected) < plain < bradley_terry(chosen, rejected + 1)
    assert bradley_terry(chosen, rejected, margin=0.3) > plain
    assert bradley_terry(chosen, rejected, label_smoothing=0.1) > plain


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (
            torch.zeros(3, 1),
            torch.zeros(3, 1),
            "chosen must have shape (n,), got (3, 1). Use chosen.squeeze(-1).",
        ),
        (
            torch.zeros(3),
            torch.zeros(3, 1),
            "rejected must have shape (n,), got (3, 1). Use rejected.squeeze(-1).",
        ),
        (
            torch.zeros(3, 3),
            torch.zeros(3),
            "chosen must have shape (n,), got (3, 3). Give one entry per sample.",
        ),
        (torch.zeros(()), torch.zeros(()), "chosen must have shape (n,), got (). Give one entry per sample."),
        (torch.zeros(3), torch.zeros(1), "rejected must have the shape of chosen (3,), got (1,)."),
        (torch.zeros(3), torch.zeros(4), "rejected must have the shape of chosen (3,), got (4,)."),
        (
            torch.zeros(3),
            torch.zeros(3, device="meta"),
            "rejected must be on the device of chosen (cpu), got meta.",
        ),
    ],
)
def test_broadcasting_traps(chosen: torch.Tensor, rejected: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bradley_terry(chosen, rejected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"margin": torch.zeros(2, 1)}, ValueError, "margin must have shape (n,), got (2, 1)."),
        ({"margin": torch.zeros(3)}, ValueError, "margin must have the shape of chosen (2,), got (3,)."),
        (
            {"margin": torch.zeros(2).long()},
            TypeError,
            "margin must be float16, bfloat16, float32 or float64",
        ),
        ({"margin": math.nan}, ValueError, "margin must be in (-inf, inf), got nan."),
        ({"margin": -math.inf}, ValueError, "margin must be in (-inf, inf), got -inf."),
        ({"margin": "1"}, TypeError, "margin must be a number in (-inf, inf), got str '1'."),
        ({"label_smoothing": 0.5}, ValueError, "label_smoothing must be in [0, 0.5), got 0.5."),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in [0, 0.5), got -0.1."),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be in [0, 0.5), got nan."),
        (
            {"label_smoothing": True},
            TypeError,
            "label_smoothing must be a number in [0, 0.5), got bool True.",
        ),
    ],
)
def test_options_out_of_range(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        bradley_terry(torch.zeros(2), torch.zeros(2), **arguments)


def test_integer_rewards_are_refused() -> None:
    with pytest.raises(TypeError, match=re.escape("chosen must be float16")):
        bradley_terry(torch.zeros(2, dtype=torch.long), torch.zeros(2))
