"""Direct preference losses: against TRL's trainers, by hand, by differences, and what they refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from trl_losses import dpo_losses, needs_trl, quiet, simpo_losses

from robustgrad.objectives import dpo, flip_corrected_dpo, hinge_dpo, ipo, log_ratios, simpo
from robustgrad.objectives.sequences import sequence_mean, sequence_sum

WITH_REFERENCE = [dpo, hinge_dpo, ipo, flip_corrected_dpo]
each_loss = pytest.mark.parametrize("loss", WITH_REFERENCE, ids=lambda f: f.__name__)


def responses(n: int = 6, tokens: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probabilities and mask (2, n, T), reference log-probabilities (2, n): chosen, rejected."""
    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(2, n, tokens, dtype=dtype, generator=generator) * 3
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (2, n, 1), generator=generator)
    reference = sequence_sum(log_probs, mask) + torch.randn(2, n, dtype=dtype, generator=generator)
    return log_probs, mask, reference


def pairs(dtype: torch.dtype = torch.float64, n: int = 6) -> list[Tensor]:
    """chosen, rejected, reference_chosen, reference_rejected, each (n,)."""
    log_probs, mask, reference = responses(n, dtype=dtype)
    return [*sequence_sum(log_probs, mask), *reference]


TRL = [
    ("sigmoid", 0.0, lambda rows, lengths, beta, eps: dpo(*rows, beta=beta)),
    ("hinge", 0.0, lambda rows, lengths, beta, eps: hinge_dpo(*rows, beta=beta)),
    ("robust", 0.2, lambda rows, lengths, beta, eps: flip_corrected_dpo(*rows, beta=beta, flip_rate=eps)),
    ("ipo", 0.0, lambda rows, lengths, beta, eps: ipo(*rows, beta=beta, chosen_length=lengths[0],
                                                       rejected_length=lengths[1])),
]  # fmt: skip


@needs_trl
@quiet
@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize(("name", "eps", "ours"), TRL, ids=[name for name, *_ in TRL])
def test_same_numbers_as_trl(name: str, eps: float, ours: Callable[..., Tensor], beta: float) -> None:
    log_probs, mask, reference = responses()
    theirs = dpo_losses(name, log_probs, mask, reference, beta=beta, eps=eps)
    rows = [*sequence_sum(log_probs, mask), *reference]
    assert_close(ours(rows, mask.sum(-1).float(), beta, eps), theirs, rtol=1e-6, atol=1e-6)


@needs_trl
@quiet
def test_conservative_dpo_is_the_smoothed_loss_of_trl() -> None:
    """TRL smooths the labels in its CPO trainer; with a log-ratio for a log-probability that is this loss."""
    rows = pairs(torch.float32)
    first, second = log_ratios(*rows)
    theirs = simpo_losses(first, second, beta=0.3, margin=0.0, eps=0.1)
    assert_close(dpo(*rows, beta=0.3, label_smoothing=0.1), theirs, rtol=1e-6, atol=1e-6)


@needs_trl
@quiet
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_simpo_is_that_of_trl(eps: float) -> None:
    log_probs, mask, _ = responses()
    chosen, rejected = sequence_mean(log_probs, mask)
    theirs = simpo_losses(chosen, rejected, beta=2.0, margin=0.7, eps=eps)
    assert_close(simpo(chosen, rejected, beta=2.0, margin=0.7, label_smoothing=eps), theirs, rtol=1e-6, atol=1e-6)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        (lambda *rows: dpo(*rows, beta=0.5), lambda h: -log_sigmoid(0.5 * h)),
        (
            lambda *rows: dpo(*rows, beta=0.5, label_smoothing=0.2),
            lambda h: -0.8 * log_sigmoid(0.5 * h) - 0.2 * log_sigmoid(-0.5 * h),
        ),
        (lambda *rows: hinge_dpo(*rows, beta=0.5), lambda h: max(0.0, 1 - 0.5 * h)),
        (lambda *rows: ipo(*rows, beta=0.5), lambda h: (h - 1) ** 2),
        (
            lambda *rows: flip_corrected_dpo(*rows, beta=0.5, flip_rate=0.2),
            lambda h: (-0.8 * log_sigmoid(0.5 * h) + 0.2 * log_sigmoid(-0.5 * h)) / 0.6,
        ),
    ],
)
def test_values_by_hand(loss: Callable[..., Tensor], by_hand: Callable[[float], float]) -> None:
    rows = pairs()
    chosen, rejected, reference_chosen, reference_rejected = (row.tolist() for row in rows)
    policy, reference = zip(chosen, rejected, strict=True), zip(reference_chosen, reference_rejected, strict=True)
    expected = [by_hand((a - b) - (c - d)) for (a, c), (b, d) in zip(policy, reference, strict=True)]
    assert_close(loss(*rows), torch.tensor(expected, dtype=torch.float64))


@each_loss
def test_gradients_against_differences(loss: Callable[..., Tensor]) -> None:
    rows = [row.requires_grad_() for row in pairs()]
    assert torch.autograd.gradcheck(loss, rows)
    assert torch.autograd.gradgradcheck(loss, rows)


def test_where_the_policy_is_the_reference() -> None:
    chosen, rejected = pairs()[:2]
    start = [chosen, rejected, chosen, rejected]
    assert_close(dpo(*start), torch.full_like(chosen, math.log(2)))
    assert_close(ipo(*start, beta=0.1), torch.full_like(chosen, 25.0))
    assert_close(hinge_dpo(*start), torch.ones_like(chosen))


def test_flip_correction_is_unbiased() -> None:
    """The mean over flipped and unflipped labels, at the flip rate, is the loss of the clean label."""
    chosen, rejected, reference_chosen, reference_rejected = pairs()
    right = flip_corrected_dpo(chosen, rejected, reference_chosen, reference_rejected, flip_rate=0.3)
    wrong = flip_corrected_dpo(rejected, chosen, reference_rejected, reference_chosen, flip_rate=0.3)
    assert_close(0.7 * right + 0.3 * wrong, dpo(chosen, rejected, reference_chosen, reference_rejected))


def test_each_argument_has_an_effect() -> None:
    rows = pairs()
    lengths = {"chosen_length": torch.full((6,), 2.0), "rejected_length": torch.full((6,), 3.0)}
    for loss, options in [(dpo, {"label_smoothing": 0.1}), (flip_corrected_dpo, {"flip_rate": 0.3}), (ipo, lengths)]:
        assert not torch.equal(loss(*rows), loss(*rows, **options))
    for loss in WITH_REFERENCE:
        assert not torch.equal(loss(*rows), loss(*rows, beta=0.7))
        for i in range(4):
            moved = [row + (place == i) * 0.3 for place, row in enumerate(rows)]
            assert not torch.equal(loss(*rows), loss(*moved))
    assert not torch.equal(simpo(*rows[:2]), simpo(*rows[:2], margin=0.1))


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computed_in_float32_or_wider(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    rows = [row.to(dtype) for row in pairs()]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    got = loss(*rows)
    assert got.dtype == wide
    assert_close(got.double(), loss(*(row.double() for row in rows)), rtol=1e-5, atol=1e-5)


@each_loss
def test_nan_stays_in_its_pair(loss: Callable[..., Tensor]) -> None:
    rows = pairs()
    clean = loss(*rows)
    rows[2] = rows[2].clone()
    rows[2][1] = torch.nan
    got = loss(*rows)
    assert got[1].isnan()
    assert torch.equal(got[[0, 2, 3, 4, 5]], clean[[0, 2, 3, 4, 5]])


@each_loss
@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_beta_must_be_positive(loss: Callable[..., Tensor], beta: float) -> None:
    with pytest.raises(ValueError, match=re.escape("beta must be in (0, inf)")):
        loss(*pairs(), beta=beta)


@each_loss
def test_missing_reference_is_named(loss: Callable[..., Tensor]) -> None:
    chosen, rejected, reference, _ = pairs()
    with pytest.raises(ValueError, match=r"reference_chosen must be .* got None.*no_grad.*simpo"):
        loss(chosen, rejected, None, None)
    with pytest.raises(ValueError, match="reference_rejected must be"):
        loss(chosen, rejected, reference, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip_rate": 0.5}, "flip_rate must be in [0, 0.5), got 0.5. It is the share"),
        ({"flip_rate": -0.1}, "flip_rate must be in [0, 0.5), got -0.1."),
    ],
)
def test_flip_rate_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        flip_corrected_dpo(*pairs(), **options)


def test_shapes_and_options_that_are_refused() -> None:
    chosen, rejected, *reference = pairs()
    with pytest.raises(ValueError, match=re.escape("rejected must have the shape of chosen (6,), got (5,)")):
        dpo(chosen, rejected[:5], *reference)
    with pytest.raises(ValueError, match=re.escape("chosen must have shape (n,), got (6, 1). Use chosen.squeeze(-1).")):
        dpo(chosen[:, None], rejected, *reference)
    with pytest.raises(ValueError, match="chosen_length must come with rejected_length"):
        ipo(chosen, rejected, *reference, chosen_length=torch.ones(6))
    with pytest.raises(ValueError, match=re.escape("margin must be in [0, inf), got -1")):
        simpo(chosen, rejected, margin=-1)
