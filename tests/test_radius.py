"""Choosing a radius, each way on data whose answer is known."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import oracle
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation
from robustgrad._balls import largest, resized, size
from robustgrad.radius import (
    against_noise,
    equal_reach,
    leave_one_domain_out,
    may_change,
    prompt_shift,
    within_ess,
    within_loss,
)

KINDS = [TotalVariation, ChiSquare, KL, CVaR]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def skewed(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


# --- from a sentence, and from set to set ---


def test_sentences() -> None:
    assert may_change(0.1) == TotalVariation(0.1)
    assert may_change(times=5) == CVaR(0.2)
    assert may_change(0.1, times=5) == TotalVariation(0.1, cap=5)


@pytest.mark.parametrize("times", [2.0, 8.0])
def test_no_prompt_gets_more_frequent_than_said(times: float) -> None:
    assert may_change(times=times).solve(skewed(1000)).max_ratio <= times * (1 + 1e-12)


def ratio_like(kind: type[AmbiguitySet], x: float, losses: np.ndarray) -> float:
    return oracle.solve(kind(1 / (1 + x) if kind is CVaR else x), losses)[1]


@each_kind
@pytest.mark.parametrize(
    "given", [ChiSquare(0.3), CVaR(0.4), TotalVariation(0.2, cap=4.0), KL(temperature=2.0)], ids=repr
)
def test_equal_reach_against_the_oracle(kind: type[AmbiguitySet], given: AmbiguitySet) -> None:
    losses = skewed(60)
    target = float((given.solve(losses).weights * losses).sum())
    expected = brentq(
        lambda x: ratio_like(kind, x, losses.numpy()) - target, 0.0, 1.0 if kind is TotalVariation else 9.0
    )
    assert size(equal_reach(given, kind, losses)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("one", [ChiSquare(0.3), KL(0.2), CVaR(0.4), TotalVariation(0.2)], ids=repr)
def test_equal_reach_of_the_same_kind_is_the_set_itself(one: AmbiguitySet) -> None:
    assert size(equal_reach(one, type(one), skewed(500))) == pytest.approx(size(one), rel=1e-6)


@each_kind
def test_equal_reach_at_the_ends(kind: type[AmbiguitySet]) -> None:
    losses = skewed(50)
    assert size(equal_reach(KL(0.0), kind, losses)) == pytest.approx(0.0, abs=1e-9)
    found = equal_reach(KL(50.0), kind, losses).solve(losses)  # the maximum, by the smallest set that reaches it
    assert found.value.item() == pytest.approx(losses.max().item(), rel=1e-9)
    assert size(equal_reach(KL(0.5), kind, torch.ones(4))) == 0.0


def test_equal_reach_uses_the_base() -> None:
    losses, base = skewed(50), skewed(50, seed=1)
    assert equal_reach(ChiSquare(0.3), KL, losses) != equal_reach(ChiSquare(0.3), KL, losses, base=base)
    twice = equal_reach(ChiSquare(0.3), KL, torch.cat([losses, losses[:1]]))
    doubled = equal_reach(ChiSquare(0.3), KL, losses, base=torch.tensor([2.0] + [1.0] * 49))
    assert size(twice) == pytest.approx(size(doubled), rel=1e-6)


# --- from a budget ---


def test_within_ess_of_chi_square_is_the_formula() -> None:
    losses = 10 + torch.randn(400, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert within_ess(ChiSquare, losses, ess=380).radius == pytest.approx((400 / 380 - 1) / 2, rel=1e-6)
    assert within_ess(CVaR, torch.arange(100.0), ess=40).alpha == pytest.approx(0.4, rel=1e-6)


@each_kind
@pytest.mark.parametrize("ess", [1.0, 37.5, 199.0, 200.0])
def test_within_ess_is_within_and_largest(kind: type[AmbiguitySet], ess: float) -> None:
    losses = skewed(200)
    found = within_ess(kind, losses, ess=ess)
    assert found.solve(losses).ess >= ess * (1 - 1e-6)
    if ess > 1 and size(found) < 1e6:
        larger = resized(
            found, min(1.0, size(found) * 1.01 + 1e-6) if kind is TotalVariation else size(found) * 1.01 + 1e-6
        )
        assert larger.solve(losses).ess < ess


def test_ess_of_the_base_is_the_most() -> None:
    with pytest.raises(ValueError, match=r"ess must be at most 3, that of the base weights, got 3\.5"):
        within_ess(KL, skewed(4), ess=3.5, base=torch.tensor([1.0, 1.0, 1.0, 0.0]))


def test_within_loss_stops_before_the_first_that_is_too_dear() -> None:
    measured = {0.2: 0.60, 0.0: 0.60, 0.1: 0.70, 0.05: 0.605}
    assert within_loss(measured, tolerance=0.01) == 0.05  # 0.2 came out well, by luck or not: 0.1 did not
    assert within_loss(measured, tolerance=0.2) == 0.2
    assert within_loss(measured, tolerance=0.0) == 0.0
    assert within_loss({0.0: -2.0, 0.1: -1.9}, tolerance=0.1) == 0.1  # of losses below zero


def test_within_loss_counts_the_noise_of_seeds() -> None:
    plain = [0.60, 0.80, 0.70]
    steady = [loss + 0.005 for loss in plain]  # paired: the spread between seeds does not matter
    noisy = [0.605, 0.83, 0.68]
    assert within_loss({0.0: plain, 0.1: steady}, tolerance=0.01) == 0.1
    assert within_loss({0.0: plain, 0.1: noisy}, tolerance=0.01) == 0.0


# --- against sampling noise ---


@pytest.mark.parametrize("kind", [ChiSquare, KL])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_against_noise_covers_the_mean_as_often_as_it_says(kind: type[AmbiguitySet], level: float) -> None:
    n, trials = 400, 4000
    losses = torch.rand(trials, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covered = (against_noise(kind, n, level=level).solve(losses).value >= 0.5).double().mean().item()
    error = math.sqrt(level * (1 - level) / trials)
    assert abs(covered - level) < 4 * error + 0.01  # asymptotic: a hundredth for n = 400


# --- from unlabeled target prompts ---


def two_normals(apart: float, n: int, seed: int, d: int = 4) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    drawn[1, :, 0] += apart
    return drawn[0], drawn[1]


@pytest.mark.parametrize("apart", [0.25, 0.5, 1.0])
def test_prompt_shift_of_two_normals(apart: float) -> None:
    """Normals of unit variance: TV = 2 Phi(d/2) - 1, KL = d^2 / 2, chi-square = (exp d^2 - 1) / 2."""
    found = prompt_shift(*two_normals(apart, 4000, seed=3), level=0.999)
    truth = {
        "total_variation": 2 * NormalDist().cdf(apart / 2) - 1,
        "kl": apart**2 / 2,
        "chi_square": math.expm1(apart**2) / 2,
    }
    for name, true in truth.items():
        value, low, high = getattr(found, name)
        assert low < true < high, (name, true, (value, low, high))
        assert low <= value <= high and high - low < true + 0.1


def test_many_features_for_few_prompts_still_bound_every_divergence() -> None:
    """384 features, one of which shifts: an unregularised classifier is sure of everything, and bounds nothing."""
    found = prompt_shift(*two_normals(2.0, 300, seed=4, d=384))
    assert 0.2 < found.total_variation.value < 2 * NormalDist().cdf(1.0) - 1
    assert 0.1 < found.kl.low < found.kl.high < 2.0
    assert 0.1 < found.chi_square.value < math.expm1(4.0) / 2


def test_no_shift_is_found_where_there_is_none() -> None:
    found = prompt_shift(*two_normals(0.0, 1000, seed=5))
    for name in ("total_variation", "kl", "chi_square"):
        value, low, high = getattr(found, name)
        assert low == 0.0 and value <= high < 0.06, name


def test_prompts_of_another_kind_are_told_apart() -> None:
    found = prompt_shift(*two_normals(12.0, 200, seed=1))
    assert found.total_variation.value > 0.98


def test_prompt_shift_is_reproducible_and_every_argument_acts() -> None:
    sides = two_normals(0.5, 100, seed=2)
    first = prompt_shift(*sides)
    assert prompt_shift(*sides) == first
    for change in ({"seed": 1}, {"folds": 3}, {"resamples": 200}, {"level": 0.5}):
        assert prompt_shift(*sides, **change) != first, change


# --- from held-out domains ---


def location(domains: dict[str, tuple[float, int]], radius: float, left_out: str) -> float:
    """Squared error on the domain left out, of the location that is best for the worst case on the others."""
    spots = torch.linspace(-1, 2, 301, dtype=torch.float64)[:, None]
    seen = torch.cat(
        [torch.full((n,), at, dtype=torch.float64) for name, (at, n) in domains.items() if name != left_out]
    )
    best = spots[ChiSquare(radius).solve((spots - seen).square()).value.argmin()]
    return (best - domains[left_out][0]).square().item()


def test_domains_that_differ_ask_for_a_radius_and_alike_ones_do_not() -> None:
    # One large domain at 0 and small ones near 1: each small one is served by heeding the other.
    apart = {"large": (0.0, 90), "small": (1.0, 10), "another": (1.0, 10)}
    radii = [0.0, 0.1, 1.0]
    found = leave_one_domain_out(lambda radius, out: location(apart, radius, out), radii, ["small", "another"])
    assert found.by_mean == found.by_worst == 1.0
    assert found.gain(1.0)[0] > 0.1 and found.gain(0.0) == (0.0, 0.0)
    # A lone outlier domain among equals: heeding it harms the others.
    alike = {"a": (0.0, 30), "b": (0.0, 30), "c": (0.0, 30), "odd": (1.0, 3)}
    found = leave_one_domain_out(lambda radius, out: location(alike, radius, out), radii, ["a", "b", "c"])
    assert found.by_mean == found.by_worst == 0.0


def test_mean_and_worst_domain_may_disagree() -> None:
    table = {(0.0, "a"): 0.0, (0.0, "b"): 1.0, (0.1, "a"): 0.6, (0.1, "b"): 0.7}
    found = leave_one_domain_out(lambda *at: table[at], [0.0, 0.1], ["a", "b"])
    assert (found.by_mean, found.by_worst) == (0.0, 0.1)
    assert found.losses.tolist() == [[0.0, 1.0], [0.6, 0.7]]
    mean, error = found.gain(0.1)
    assert mean == pytest.approx(-0.15) and error == pytest.approx(0.45)


# --- the size of a set ---


def test_sizes() -> None:
    assert [size(s) for s in (TotalVariation(0.1), ChiSquare(2.0), KL(0.5), CVaR(0.2))] == [0.1, 2.0, 0.5, 4.0]
    assert resized(CVaR(0.2), 1.0) == CVaR(0.5)
    assert resized(TotalVariation(0.1, cap=3.0), 0.2) == TotalVariation(0.2, cap=3.0)


@each_kind
@pytest.mark.parametrize("edge", [1e-9, 1e-3, 0.7])
def test_largest_finds_the_edge(kind: type[AmbiguitySet], edge: float) -> None:
    start = CVaR(1.0) if kind is CVaR else kind(0.0)
    assert size(largest(start, lambda one: size(one) <= edge)) == pytest.approx(edge, rel=1e-6)


# --- errors ---

NAN = torch.tensor([1.0, math.nan])
A, B = two_normals(0.5, 20, seed=0)
WRONG = [
    (lambda: may_change(), ValueError, "takes share= or times= or both, got neither"),
    (lambda: may_change(10), ValueError, r"share must be in \[0, 1\], got 10. 10% is 0.1"),
    (lambda: may_change(times=1), ValueError, r"times must be in \(1, inf\), got 1"),
    (lambda: equal_reach(KL(0.1), KL, NAN), ValueError, r"losses must be finite, got NaN or infinity at \[1\] of 2"),
    (lambda: equal_reach(KL(0.1), KL, torch.ones(0)), ValueError, "losses must be finite, got none at all"),
    (lambda: equal_reach(KL(0.1), KL(0.1), torch.ones(2)), TypeError, "kind must be TotalVariation, .* Pass the class"),
    (lambda: within_ess(KL, torch.ones(3), ess=4), ValueError, r"ess must be in \[1, 3\], got 4"),
    (lambda: within_loss({0.1: 0.6}, tolerance=0.1), ValueError, r"measured must hold 0.0.* got radii \[0.1\]"),
    (lambda: within_loss({0.0: [1.0], 0.1: [1.0, 2.0]}, tolerance=0.1), ValueError, "got 2 at 0.1 and 1 at 0"),
    (lambda: within_loss({0.0: math.nan}, tolerance=0.1), ValueError, "loss must be .* got nan. Measured at radius 0"),
    (lambda: against_noise(TotalVariation, 100), ValueError, "kind must be ChiSquare or KL"),
    (lambda: against_noise(KL, 100, level=0.2), ValueError, r"level must be in \[0.5, 1\), got 0.2"),
    (lambda: prompt_shift(A, B[:, :2]), ValueError, r"target must have shape \(n, 4\) with n >= 10, got \(20, 2\)"),
    (lambda: prompt_shift(A[:4], B), ValueError, r"training must have shape \(n, 4\) with n >= 10, got \(4, 4\)"),
    (lambda: prompt_shift(A, torch.where(B > 2, math.nan, B)), ValueError, r"target must be finite, .* in rows \["),
    (lambda: leave_one_domain_out(lambda r, d: 1.0, [0.0], ["a"]), ValueError, r"domains must be two or more"),
    (lambda: leave_one_domain_out(lambda r, d: 1.0, [0.1, 0.0], "ab"), ValueError, "radii must ascend"),
    (lambda: leave_one_domain_out(lambda r, d: math.inf, [0.0], "ab"), ValueError, r"loss_without\(0, 'a'\) gave it"),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_errors(call, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
