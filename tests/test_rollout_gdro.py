"""Rollout-GDRO: the exact split of a budget, the bandits' scores, the shadow price."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from robustgrad.baselines import DifficultyBins, RolloutGDRO
from robustgrad.baselines._exact_budget import best_on_budget

# --- the exact split of a budget ---


def by_trying_all(gains: Tensor, costs: Tensor, budget: int) -> tuple[float, ...]:
    """The lexicographically greatest sums, (k,), of one option per choice on the budget."""
    options = itertools.product(range(costs.shape[1]), repeat=len(costs))
    rows = range(len(costs))
    met = [picked for picked in options if sum(int(costs[b, a]) for b, a in enumerate(picked)) == budget]
    return max(tuple(float(sum(gain[b, picked[b]] for b in rows)) for gain in gains) for picked in met)


@pytest.mark.parametrize("seed", range(30))
def test_no_other_split_is_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    choices = 1 + seed % 4
    prompts = torch.randint(1, 6, (choices, 1), generator=generator)
    costs = prompts * torch.arange(2, 7)
    # Whole gains of a small range: many sums are equal, and exactly so.
    gains = torch.randint(-2, 2, (2, choices, 5), generator=generator).double()
    if seed % 2:
        gains = torch.randn(gains.shape, generator=generator, dtype=torch.float64)
    budget = 4 * int(prompts.sum())
    best = best_on_budget(gains, costs, budget)
    rows = torch.arange(choices)
    assert int(costs[rows, best].sum()) == budget
    assert_close(gains[:, rows, best].sum(1).tolist(), list(by_trying_all(gains, costs, budget)))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_every_batch_spends_its_budget(form: str) -> None:
    generator = torch.Generator().manual_seed(3)
    gdro, different = RolloutGDRO(6, mean=4, low=1, high=9, form=form), set()
    for step in range(25):
        groups = torch.randint(0, 2 + step % 5, (1 + 3 * step % 17,), generator=generator)
        counts = gdro.counts(groups)
        assert counts.sum() == 4 * len(groups) and counts.min() >= 1 and counts.max() <= 9
        assert all(len(counts[groups == b].unique()) == 1 for b in groups.unique())
        different.add(tuple(counts.unique().tolist()))
        losses = 10 * torch.randn(int(counts.sum()), generator=generator)
        gdro.update(losses, groups.repeat_interleave(counts))
    assert len(different) > 5 and gdro.price == 0.0


def test_limits_are_the_mean_for_every_prompt() -> None:
    groups = torch.tensor([0, 0, 0, 1, 2])
    limits = (RolloutGDRO(3, step_size=0.0), RolloutGDRO(3, mixing=1.0), RolloutGDRO(3, mean=5, low=5, high=5))
    for gdro in limits:
        for _ in range(3):
            counts = gdro.counts(groups)
            assert counts.tolist() == [gdro.mean] * 5
            gdro.update(torch.linspace(-3.0, 40.0, 5 * gdro.mean), groups.repeat_interleave(counts))
    assert RolloutGDRO(3).counts(groups).tolist() == [4] * 5, "nothing learnt yet"


# --- scores, probabilities and price ---


def learnt(form: str, batches: list[dict[int, tuple[int, list[float]]]], prompts: int) -> tuple[dict, float]:
    """Scores by (bin, count) and the price, with loops: every batch has {bin: (count, losses)}."""
    scores: dict[tuple[int, int], float] = {}
    price = 0.0
    for batch in batches:
        for b, (n, losses) in batch.items():
            utility, old = -sum(losses) / len(losses), scores.get((b, n), 0.0)
            paper = 0.7 * old + 0.3 * (utility - price * n)
            scores[b, n] = paper if form == "paper" else old - utility - price * (n - 3)
        price += 0.1 * (sum(len(losses) for _, losses in batch.values()) / prompts - 3)
    return scores, price


@pytest.mark.parametrize("form", ["paper", "released"])
def test_against_its_definition(form: str) -> None:
    """Some responses never come back, so that the price moves too."""
    gdro = RolloutGDRO(4, mean=3, low=1, high=5, step_size=0.9, mixing=0.2, decay=0.3, price_step=0.1, form=form)
    generator, groups, batches = torch.Generator().manual_seed(1), torch.tensor([0, 0, 3, 2]), []
    for _ in range(6):
        counts = gdro.counts(groups)
        ids = groups.repeat_interleave(counts)[:-1]
        losses = 5 * torch.randn(len(ids), generator=generator)
        gdro.update(losses, ids)
        count = dict(zip(groups.tolist(), counts.tolist(), strict=True))
        batches.append({b: (count[b], losses[ids == b].tolist()) for b in ids.unique().tolist()})
    scores, price = learnt(form, batches, len(groups))
    expected = [[scores.get((b, n), 0.0) for n in range(1, 6)] for b in range(4)]
    assert len(scores) > 5 and price < -0.1
    assert_close(gdro.scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert gdro.price == pytest.approx(price)
    for row, found in zip(expected, gdro.log_probs.exp(), strict=True):
        total = sum(math.exp(0.9 * score) for score in row)
        p = torch.tensor([0.8 * math.exp(0.9 * score) / total + 0.2 / 5 for score in row], dtype=torch.float64)
        assert_close(found, p, rtol=1e-4, atol=1e-6)


def test_the_paper_finds_the_split_and_the_released_sign_does_not() -> None:
    """Losses v / n, the variance of a mean of n: all splits on the budget are tried for the best."""
    v, sizes = torch.tensor([0.2, 4.0, 16.0]), torch.tensor([10, 5, 2])
    groups = torch.arange(3).repeat_interleave(sizes)

    def variance(counts) -> float:
        return float((sizes * v / torch.as_tensor(counts)).sum())

    splits = [n for n in itertools.product(range(2, 13), repeat=3) if int((sizes * torch.tensor(n)).sum()) == 4 * 17]
    best = min(map(variance, splits))
    last = {}
    for form in ("paper", "released"):
        gdro = RolloutGDRO(3, form=form)
        for _ in range(60):
            counts = gdro.counts(groups)
            gdro.update((v[groups] / counts).repeat_interleave(counts), groups.repeat_interleave(counts))
        last[form] = variance([int(counts[groups == b][0]) for b in range(3)])
    assert best <= last["paper"] < 1.05 * best < 0.8 * variance([4, 4, 4])
    assert last["released"] == pytest.approx(variance([4, 4, 4]))


def test_large_losses_stay_finite() -> None:
    gdro, groups = RolloutGDRO(2, mixing=0.0), torch.tensor([0, 1])
    for sign in (1, -1, 1):
        counts = gdro.counts(groups)
        assert counts.sum() == 8
        gdro.update(torch.full((8,), sign * 1e30), groups.repeat_interleave(counts))
    assert gdro.log_probs.isfinite().all()


def test_it_resumes() -> None:
    groups = torch.tensor([0, 1, 1, 2])
    one, other = RolloutGDRO(3), RolloutGDRO(3)
    losses = torch.linspace(-1.0, 3.0, 16)
    for _ in range(3):
        one.update(losses, groups.repeat_interleave(one.counts(groups)))
    counts = one.counts(groups)
    other.load_state_dict(one.state_dict())  # between the choice and its responses
    for gdro in (one, other):
        gdro.update(losses[1:], groups.repeat_interleave(counts)[1:])
    assert torch.equal(one.scores, other.scores) and one.price == other.price != 0.0
    assert torch.equal(one.counts(groups), other.counts(groups))
    with pytest.raises(ValueError, match=re.escape("state must hold (2, 11) scores, got (3, 11)")):
        RolloutGDRO(2).load_state_dict(one.state_dict())


def test_bins_are_looked_up_without_a_visit() -> None:
    bins = DifficultyBins(4)
    placed = bins.update([7, 7, 9], [False, True, False])
    assert bins.look_up([9, 7, 1]).tolist() == [int(placed[2]), int(placed[0]), 0] == [0, 3, 0]
    assert bins.state_dict() == {"visits": {7: [True], 9: [False]}, "bin": {7: 3, 9: 0}}


IDS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RolloutGDRO(0), "bins must be an integer of at least 1, got 0"),
        (lambda: RolloutGDRO(2, low=0), "low must be an integer of at least 1, got 0"),
        (lambda: RolloutGDRO(2, mean=1), "mean must be an integer of at least 2, got 1"),
        (lambda: RolloutGDRO(2, mean=4.0), "mean must be an integer of at least 2, got 4.0"),
        (lambda: RolloutGDRO(2, high=3), "high must be an integer of at least 4, got 3"),
        (lambda: RolloutGDRO(2, decay=0.0), "decay must be in (0, 1], got 0.0"),
        (lambda: RolloutGDRO(2, form="code"), "form must be 'paper' or 'released', got 'code'"),
        (lambda: RolloutGDRO(2).counts(torch.tensor([0, 2])), "groups must be ids in 0 .. 1, got 0 .. 2"),
        (lambda: RolloutGDRO(2).counts(IDS[:0]), "groups must be (m,) ids, m > 0, got shape (0,)"),
        (lambda: RolloutGDRO(2).update(torch.ones(2), IDS), "counts() was asked about, got [0, 1]. Ask it first."),
        (lambda: RolloutGDRO(2).update(torch.tensor([1.0, torch.nan]), IDS), "losses must be finite, got NaN"),
    ],
)
def test_wrong_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
