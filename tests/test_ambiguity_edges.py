"""What the sets are built from, on its edges, beside slow definitions: quantiles, shares, ranks, recipes, rules."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from robustgrad import Reweighter
from robustgrad.ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation, _problem
from robustgrad.ambiguity._problem import ABYSS, Problem
from robustgrad.ambiguity._sorted import Ranked, quantile, top_share
from robustgrad.ambiguity.groups import group_means, group_slots

SETS = [TotalVariation(0.3), ChiSquare(0.5), KL(0.3), CVaR(0.3)]
PENALISED = [TotalVariation(penalty=0.5), ChiSquare(penalty=0.5), KL(temperature=0.5)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_share(losses: list[float], weights: list[float], mass: float) -> tuple[float, list[float]]:
    """The quantile, and how much of each loss lies in the top `mass`, one loss after the other."""
    total, left = sum(weights), mass
    share = [0.0] * len(losses)
    for value in sorted({x for x, w in zip(losses, weights, strict=True) if w > 0}, reverse=True):
        tied = [i for i, x in enumerate(losses) if x == value and weights[i] > 0]
        here = sum(weights[i] for i in tied) / total
        for i in tied:
            share[i] = min(1.0, left / here)
        left -= here
        if left <= 1e-12:
            break
    return value, share


ROWS = {
    "ordinary": ([3.0, -1.0, 0.5, 2.0, 7.0], [0.1, 0.2, 0.1, 0.4, 0.2]),
    "ties": ([1.0, 2.0, 2.0, 2.0, 0.0], [0.3, 0.1, 0.2, 0.1, 0.3]),
    "of no weight": ([9.0, 1.0, 8.0, 2.0, -5.0], [0.0, 0.5, 0.0, 0.25, 0.25]),
    "small weights": ([1.0, 4.0, 3.0, 2.0, 0.0], [0.02, 0.01, 0.03, 0.02, 0.02]),
    "one that counts": ([1.0, 4.0, 3.0, 2.0, 0.0], [0.0, 0.0, 2.0, 0.0, 0.0]),
    "all of one value": ([2.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]),
}


@pytest.mark.parametrize("mass", [0.07, 0.31, 0.5, 0.77, 1.0])
def test_top_shares_of_weighted_rows(mass: float) -> None:
    """Each row alone and all at once."""
    want = [slow_share(*row, mass) for row in ROWS.values()]
    losses, base = (torch.tensor(column, dtype=torch.float64) for column in zip(*ROWS.values(), strict=True))
    whole = Problem.unchecked(losses, base)
    for i, (edge, share) in enumerate(want):
        alone = Problem.unchecked(losses[i], base[i])
        for found in (top_share(alone, mass), top_share(whole, mass)[i]):
            assert found.tolist() == pytest.approx(
                [s if w > 0 else f for s, w, f in zip(share, base[i], found.tolist(), strict=True)]
            )
        assert quantile(alone, mass).item() == quantile(whole, mass)[i].item() == edge


def test_a_row_without_weight_has_a_quantile_and_no_answer() -> None:
    """NaN, not an index out of range."""
    for n in (1, 2, 5):
        worst = CVaR(0.5).solve_unchecked(torch.arange(float(n)), torch.zeros(n))
        assert worst.weights.tolist() == [0.0] * n and worst.ess == 0


@pytest.mark.parametrize("ambiguity", [TotalVariation(0.0), TotalVariation(0.0, cap=2.0)], ids=str)
def test_nothing_moves_in_a_ball_without_radius(ambiguity: TotalVariation) -> None:
    rule = ambiguity.fit(normal(64), torch.ones(64), unit=1.0, step_size=torch.tensor(8.0))
    torch.testing.assert_close(rule.ratio(normal(5, seed=1), 1.0), torch.ones(5, dtype=torch.float64))
    assert ambiguity.memory_size(8) == 512 and ambiguity.saturating_size == 1.0


@pytest.mark.parametrize("weighted", [False, True])
def test_a_share_that_ends_between_two_losses(weighted: bool) -> None:
    """Not a hair less than nothing of the next loss, nor more than all of the last."""
    for n in range(2, 40):
        losses, base = torch.arange(float(n)), torch.ones(n) if weighted else None
        for k in range(1, n):
            ratio = CVaR(k / n).solve(losses, base=base).wide_ratio
            assert ratio.min() >= 0.0, (n, k)
            assert ratio.max() <= n / k * (1 + 1e-15), (n, k)
            assert ratio[-k:] == pytest.approx(n / k) and (ratio[: n - k] <= 1e-12 * n).all(), (n, k)


@pytest.mark.parametrize("weights", [[1.0] * 5, [0.3] * 5, *(list(w) for _, w in ROWS.values())], ids=str)
def test_a_new_loss_among_remembered_ones(weights: list[float]) -> None:
    """Its top share is that of the losses with it among them."""
    losses = [1.0, 2.0, 2.0, -3.0, 0.5]
    if weights[0] == 0.0:
        losses[0] = 50.0  # the largest, were it to count
    ranked = Ranked.of(torch.tensor(losses, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))
    for new in (5.0, 2.0, 1.5, -3.0, -9.0):
        for mass in (0.05, 0.4, 0.9, 1.0):
            for weight in (0.25, 1.0):
                _, share = slow_share([*losses, new], [*weights, weight], mass)
                found = ranked.place(torch.tensor([new], dtype=torch.float64), weight).top_share(mass)
                assert found.item() == pytest.approx(share[-1]), (new, mass, weight)


def test_one_remembered_loss() -> None:
    ranked = Ranked.of(torch.tensor([1.0]), torch.tensor([2.0]))
    assert ranked.place(torch.tensor([0.0, 1.0, 2.0]), 2.0).top_share(0.5).tolist() == [0.0, 0.5, 1.0]


def test_the_price_of_remembered_losses_of_unequal_weight() -> None:
    """Mass leaves what lies `penalty` below the mean of the top share, and goes there."""
    losses, weights, unit = normal(80), normal(80, seed=1).abs() / 3, 2.0
    weights[::9] = 0.0
    rule = TotalVariation(penalty=1.5).fit(losses, weights, unit=unit, step_size=torch.tensor(20.0))
    _, top = slow_share(losses.tolist(), weights.tolist(), 1 / 20)
    received = [w * s for w, s in zip(weights.tolist(), top, strict=True)]
    edge = sum(r * x for r, x in zip(received, losses.tolist(), strict=True)) / sum(received) - 1.5 / unit
    kept = float(weights[losses >= edge].sum() / weights.sum())
    assert rule.masses.flatten().tolist() == pytest.approx([kept, 1 / 20])
    assert rule.gains.flatten().tolist() == pytest.approx([1.0, (1 - kept) * 20])


RECIPES = {
    TotalVariation(0.0): ("plain", ()),
    TotalVariation(1.0): ("top", (0.0, 1.0, 0.0, 0.0, 1.0)),
    TotalVariation(0.3): ("top", (0.7, 1.0, 0.0, 0.0, 0.3)),
    TotalVariation(0.3, cap=3.0): ("top", (0.7, 1.0, 0.15, 2.0)),
    TotalVariation(0.9, cap=4.0): ("top", (0.25, 1.0, 0.25, 3.0)),
    TotalVariation(penalty=0.4): ("near", (0.4,)),
    ChiSquare(0.0): ("plain", ()),
    ChiSquare(0.5): ("ball", (0.5,)),
    ChiSquare(1e200): ("ball", (1e100,)),
    ChiSquare(penalty=0.4): ("price", (0.4,)),
    KL(0.0): ("plain", ()),
    KL(0.5): ("tilt", (0.5,)),
    KL(temperature=0.4): ("softmax", (0.4,)),
    CVaR(1.0): ("plain", ()),
    CVaR(0.4): ("top", (0.4, 2.5)),
}


@pytest.mark.parametrize("ambiguity", RECIPES, ids=str)
def test_what_a_kernel_is_told(ambiguity: AmbiguitySet) -> None:
    kind, numbers = RECIPES[ambiguity]
    recipe = ambiguity._recipe()
    assert recipe is not None and recipe.kind == kind and recipe.numbers == pytest.approx(numbers)


@pytest.mark.parametrize("ambiguity", [*SETS, *PENALISED], ids=str)
def test_sets_and_what_they_find_are_frozen_and_alike_only_to_themselves(ambiguity: AmbiguitySet) -> None:
    """Two answers are not compared by their tensors, which has no truth."""
    one, losses = torch.ones((), dtype=torch.float64), normal(64)
    reweighter = Reweighter(ambiguity)
    for _ in range(2):
        reweighter.ratio(losses)
        reweighter.step()
    worst, rule = ambiguity.solve(losses), ambiguity.fit(losses, torch.ones_like(losses), unit=one, step_size=one)
    found: list[Any] = [worst, rule, reweighter._pool._memory, Ranked.of(losses, torch.ones_like(losses))]
    for frozen in (ambiguity, *found):
        with pytest.raises(FrozenInstanceError):
            frozen.anything = 1
    for one_of_them in found:
        assert one_of_them == one_of_them and one_of_them != replace(one_of_them) and hash(one_of_them)


@pytest.mark.parametrize("ambiguity", [*SETS, *PENALISED], ids=str)
def test_a_rule_gives_remembered_losses_what_the_solver_gives(ambiguity: AmbiguitySet) -> None:
    """Except where it stands in for the maximum; in units, a price is worth more or less."""
    losses, unit = normal(200), 0.5
    rule = ambiguity.fit(losses, torch.ones_like(losses), unit=unit, step_size=torch.ones((), dtype=torch.float64))
    assert torch.equal(rule.ratio(losses), rule.ratio(losses, 1.0))  # a new loss weighs as much as a remembered one
    if not isinstance(ambiguity, TotalVariation | CVaR):
        torch.testing.assert_close(rule.ratio(losses, 1.0), ambiguity.solve(unit * losses).wide_ratio)
        beyond = torch.cat((losses, losses.max() + torch.tensor([1.0, 1e6])))
        assert (rule.ratio(beyond, 1.0)[-2:] == rule.ratio(losses, 1.0).max()).all()  # as the largest remembered


def test_no_new_loss_gets_more_than_a_hundredfold() -> None:
    rule = KL(20.0).fit(normal(512), torch.ones(512), unit=1.0, step_size=torch.ones(()))
    assert rule.ratio(torch.tensor([99.0], dtype=torch.float64), 1.0).item() == 100.0


def test_a_pool_that_saturates_any_radius() -> None:
    assert KL(1e4).saturating_size == math.exp(700)
    assert TotalVariation(1.0, cap=1e18).saturating_size == math.inf


def test_where_minus_infinity_stands_there_is_room_for_sums_of_squares() -> None:
    """In float32 over the longest row that a kernel takes; and finite losses look tied from there."""
    assert (torch.full((4096,), ABYSS, dtype=torch.float32).square().sum()).isfinite()
    assert 1 / torch.finfo(torch.float32).eps ** 1.5 < ABYSS


@pytest.mark.parametrize("ambiguity", PENALISED, ids=str)
def test_a_price_over_losses_as_far_apart_as_numbers_go(ambiguity: AmbiguitySet) -> None:
    """A thousand of the lowest and one of the highest: their sums overflow nowhere."""
    largest = torch.finfo(torch.float64).max
    losses = torch.full((1001,), -largest, dtype=torch.float64)
    losses[7] = largest
    for base in (None, torch.ones(1001, dtype=torch.float64)):
        worst = ambiguity.solve(losses, base=base)
        assert worst.wide_ratio[7] == pytest.approx(1001) and worst.wide_ratio.sum() == pytest.approx(1001)


@pytest.mark.parametrize("ambiguity", [*SETS, *PENALISED], ids=str)
def test_what_is_left_out_has_ratio_zero_in_every_row_and_dimension(ambiguity: AmbiguitySet) -> None:
    losses, mask = normal(2, 3, 5), torch.arange(5) != 2
    worst = ambiguity.solve(losses, mask=mask)
    assert (worst.ratio[..., 2] == 0).all() and worst.mean.shape == worst.value.shape == worst.ess.shape == (2, 3)
    alone = ambiguity.solve(losses[..., mask])
    for name in ("value", "mean", "divergence", "ess", "max_ratio", "threshold"):
        torch.testing.assert_close(getattr(worst, name), getattr(alone, name))


REFUSED = {
    "radius": [lambda: TotalVariation(-0.5), lambda: TotalVariation(1.5), lambda: ChiSquare(-0.5), lambda: KL(-0.5),
               lambda: TotalVariation.from_l1(-0.5), lambda: TotalVariation.from_l1(2.5),
               lambda: ChiSquare.from_unhalved(-0.5)],
    "penalty": [lambda: TotalVariation(penalty=0.0), lambda: TotalVariation(penalty=-0.5),
                lambda: ChiSquare(penalty=0.0), lambda: ChiSquare(penalty=-0.5)],
    "temperature": [lambda: KL(temperature=0.0), lambda: KL(temperature=-0.5)],
    "cap": [lambda: TotalVariation(0.1, cap=1.0), lambda: TotalVariation(0.1, cap=0.5)],
    "alpha": [lambda: CVaR(0.0), lambda: CVaR(-0.5), lambda: CVaR(1.5)],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_beyond_their_range_are_refused(name: str) -> None:
    for made in REFUSED[name]:
        with pytest.raises(ValueError, match=f"{name} must be"):
            made()


def test_numbers_at_the_end_of_their_range_are_taken() -> None:
    for made in (TotalVariation(0.0), TotalVariation(1.0), TotalVariation(0.5, cap=1.01), CVaR(1.0), ChiSquare(0.0)):
        assert made.solve(torch.tensor([1.0, 2.0])).ratio.mean() == pytest.approx(1.0)
    assert TotalVariation.from_l1(0.0) == TotalVariation(0.0)
    assert ChiSquare(penalty=0.01).solve(torch.tensor([1.0, 2.0])).ratio.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("ambiguity", [*SETS, *PENALISED], ids=str)
def test_what_was_given_is_left_as_it_was(ambiguity: AmbiguitySet) -> None:
    losses, base = normal(9), normal(9, seed=1).abs()
    losses[3] = -torch.inf
    kept = losses.clone(), base.clone()
    ambiguity.solve(losses)
    ambiguity.solve(losses, base=base, mask=torch.arange(9) > 1)
    ambiguity.fit(losses[:3], base[:3], unit=1.0, step_size=torch.ones(()))
    assert torch.equal(losses, kept[0]) and torch.equal(base, kept[1])


@pytest.mark.parametrize("ambiguity", [*SETS, *PENALISED], ids=str)
def test_a_base_that_is_no_distribution_spoils_its_row_alone(ambiguity: AmbiguitySet) -> None:
    base = torch.tensor([[1.0, -0.5, 1.0], [1.0, torch.inf, 1.0], [1.0, torch.nan, 1.0], [0.5, 0.25, 0.125]])
    ratio = ambiguity.solve_unchecked(normal(3).expand(4, 3), base).ratio
    assert ratio[:3].isnan().all() and ratio[3].isfinite().all()
    torch.testing.assert_close(ratio[3], ambiguity.solve(normal(3), base=base[3]).ratio)


@pytest.mark.parametrize("weighted", [False, True])
def test_means_of_groups(weighted: bool) -> None:
    """Of any ids in any order; what has no weight counts for nothing, whatever it is."""
    losses, groups = normal(40), torch.randint(-4, 9, (40,), generator=torch.Generator().manual_seed(5)) * 1000
    groups[7], weight = 123, normal(40, seed=2).abs() / 2
    weight[7], weight[::6], losses[6] = 0.0, 0.0, torch.nan
    losses[6] = 1e9 if not weighted else torch.nan
    found = group_means(losses, groups, weight if weighted else None)
    counted = weight if weighted else torch.ones(40)
    for i, group in enumerate(groups.tolist()):
        mine = [j for j in range(40) if groups[j] == group and counted[j] > 0]
        total = sum(float(counted[j]) for j in mine)
        want = sum(float(counted[j] * losses[j]) for j in mine) / total if mine else 0.0
        assert found[i].item() == pytest.approx(want), group
    assert group_slots(groups).tolist() == [sorted(set(groups.tolist())).index(g) for g in groups.tolist()]


@pytest.mark.parametrize("ambiguity", [*SETS, *PENALISED], ids=str)
def test_weights_that_may_not_be_looked_at_are_not_taken_for_equal(
    ambiguity: AmbiguitySet, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, weights, new = normal(80), normal(80, seed=1).abs(), normal(9, seed=2)

    def ratio() -> Tensor:
        step_size = torch.tensor(8.0, dtype=torch.float64)
        return ambiguity.fit(losses, weights, unit=1.0, step_size=step_size).ratio(new, 1.0)

    looked = ratio()
    monkeypatch.setattr(_problem, "readable", lambda tensor: False)
    torch.testing.assert_close(ratio(), looked)
