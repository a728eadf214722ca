"""Multi-adversary group DRO: bins by difficulty, weights of bins, and the split of a rollout budget."""

from __future__ import annotations

import math
import re

import pytest
import torch
from test_ambiguity_sync import NoSync
from torch.testing import assert_close

from robustgrad.baselines import DifficultyBins, PromptGDRO, rollout_counts

# --- weights of bins ---


def by_hand(
    batches: list[tuple[list[float], list[int]]], bins: int, eta: float, decay: float, clip: float
) -> list[float]:
    """exp(eta clip(S)) of each bin, with loops."""
    scores = [0.0] * bins
    for losses, groups in batches:
        for b in range(bins):
            members = [loss for loss, group in zip(losses, groups, strict=True) if group == b]
            if members:
                scores[b] = (1 - decay) * scores[b] + decay * sum(members) / len(members)
    return [math.exp(eta * max(-clip, min(clip, score))) for score in scores]


BATCHES = [
    ([1.0, 3.0, 0.5, -4.0], [0, 0, 1, 3]),
    ([2.0, 2.0, 9.0], [1, 1, 2]),
    ([0.0, 30.0, 1.0, 1.0, 2.0], [0, 2, 1, 3, 3]),
]


@pytest.mark.parametrize("cap", [10.0, 2.0])
@pytest.mark.parametrize("form", ["normalised", "paper"])
def test_against_its_definition(form: str, cap: float) -> None:
    gdro = PromptGDRO(4, step_size=0.7, decay=0.3, clip=2.5, mixing=0.2, cap=cap, form=form)
    for i, (losses, groups) in enumerate(BATCHES):
        found = gdro.ratio(torch.tensor(losses), torch.tensor(groups))
        omega = by_hand(BATCHES[: i + 1], 4, 0.7, 0.3, 2.5)
        capped = torch.tensor([min(omega[group], cap) for group in groups])
        assert_close(found, capped / capped.mean() if form == "normalised" else capped)
        assert_close(gdro.weights, torch.tensor([0.8 * w / sum(omega) + 0.2 / 4 for w in omega]))


def test_limits() -> None:
    losses, groups = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 1, 1])
    assert_close(PromptGDRO(2, step_size=0.0).ratio(losses, groups), torch.ones(3))
    sharp = PromptGDRO(2, step_size=40.0, decay=1.0, cap=1e30)
    assert_close(sharp.ratio(losses, groups), torch.tensor([0.0, 1.5, 1.5]))
    assert_close(sharp.weights, torch.tensor([0.0, 1.0]))


def test_frequent_bins_have_no_lead() -> None:
    """Equal mean losses, 9 samples of one bin to 1 of the other: equal ratios."""
    gdro = PromptGDRO(2, step_size=1.0)
    groups = torch.tensor([0] * 9 + [1])
    for _ in range(5):
        assert_close(gdro.ratio(torch.full((10,), 2.0), groups), torch.ones(10))


def test_a_bad_batch_is_nan_and_does_not_stay() -> None:
    gdro, groups = PromptGDRO(2), torch.tensor([0, 1])
    before = gdro.ratio(torch.tensor([1.0, 2.0]), groups) * 0 + gdro.scores
    assert gdro.ratio(torch.tensor([torch.nan, 2.0]), groups).isnan().all()
    assert gdro.ratio(torch.tensor([torch.inf, 2.0]), groups).isnan().all()
    assert_close(gdro.scores, before)


def test_it_resumes_and_never_waits() -> None:
    one, other = PromptGDRO(3), PromptGDRO(3)
    losses, groups = torch.rand(8), torch.arange(8) % 3
    one.ratio(losses, groups)
    other.load_state_dict(one.state_dict())
    assert_close(other.ratio(losses, groups), one.ratio(losses, groups), rtol=0, atol=0)
    with pytest.raises(ValueError, match="state must hold 2 bins, got 3"):
        PromptGDRO(2).load_state_dict(one.state_dict())
    meta = {"device": "meta"}
    assert PromptGDRO(3).ratio(torch.empty(8, **meta), torch.empty(8, dtype=torch.long, **meta)).shape == (8,)


# --- bins by difficulty ---


def test_moving_pass_at_k() -> None:
    bins = DifficultyBins(4, window=3)
    visits = [True, False, False, False, True, True]  # of prompt 5, two answers each, the second always wrong
    shares = [1.0, 1 / 2, 1 / 3, 0.0, 1 / 3, 2 / 3]
    for right, share in zip(visits, shares, strict=True):
        found = bins.update([5, 5, 8], torch.tensor([right, False, True]))
        assert found.tolist() == [min(3, int(4 * share))] * 2 + [3]


def test_margin_keeps_a_prompt_in_its_bin() -> None:
    loose, strict = DifficultyBins(2, window=4, margin=0.3), DifficultyBins(2, window=4)
    places = []
    for right in (False, False, True, True, True, True):  # shares 0, 0, 1/3, 1/2, 3/4, 1
        places.append([int(bins.update([1], [right])) for bins in (loose, strict)])
    assert [place[1] for place in places] == [0, 0, 0, 1, 1, 1]
    assert [place[0] for place in places] == [0, 0, 0, 0, 0, 1]


def test_bins_resume() -> None:
    one, other = DifficultyBins(window=3), DifficultyBins(window=3)
    for _ in range(4):
        one.update([1, 2], [True, False])
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.update([1, 2], [False, True]), other.update([1, 2], [False, True]))
    with pytest.raises(ValueError, match=re.escape("got (2,) torch.int64 and (2,) torch.int64")):
        one.update([1, 2], [1, 0])


# --- the budget ---


@pytest.mark.parametrize(("low", "high"), [(1.0, math.inf), (3.0, 8.0), (0.5, 5.0)])
@pytest.mark.parametrize("seed", range(4))
def test_budget_is_spent_and_no_transfer_helps(low: float, high: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    variances = torch.rand(6, generator=generator, dtype=torch.float64) ** 4
    shares = torch.rand(6, generator=generator, dtype=torch.float64)
    p = shares / shares.sum()
    counts = rollout_counts(variances, shares, mean=4.0, low=low, high=high)
    assert_close((p * counts).sum(), torch.tensor(4.0, dtype=torch.float64))
    assert low <= counts.min() and counts.max() <= high

    def variance(n: torch.Tensor) -> torch.Tensor:
        return (p * variances / n).sum()

    for giver in range(6):
        for taker in range(6):
            moved = counts.clone()
            moved[giver] -= 1e-4 / p[giver]
            moved[taker] += 1e-4 / p[taker]
            if giver != taker and moved[giver] >= low and moved[taker] <= high:
                assert variance(moved) >= variance(counts) - 1e-12


def test_square_root_law() -> None:
    variances = torch.tensor([1.0, 9.0, 16.0])
    counts = rollout_counts(variances, torch.tensor([0.2, 0.3, 0.5]), mean=100.0, low=1e-6)
    assert_close(counts / counts[0], torch.tensor([1.0, 3.0, 4.0]))
    assert_close(rollout_counts(torch.zeros(3), torch.ones(3), mean=4.0), torch.full((3,), 4.0))
    with NoSync():
        poisoned = rollout_counts(torch.tensor([1.0, torch.nan]), torch.ones(2), mean=4.0)
    assert poisoned.isnan().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PromptGDRO(0), "bins must be an integer of at least 1, got 0"),
        (lambda: PromptGDRO(2, decay=0.0), "decay must be in (0, 1], got 0.0"),
        (lambda: PromptGDRO(2, form="code"), "form must be 'normalised' or 'paper', got 'code'"),
        (lambda: PromptGDRO(2).ratio(torch.rand(2), torch.tensor([0, 2])), "groups must be ids in 0 .. 1, got 0 .. 2"),
        (lambda: DifficultyBins(window=0), "window must be an integer of at least 1"),
        (lambda: DifficultyBins(margin=2.0), "margin must be in [0, 1], got 2.0"),
        (lambda: rollout_counts(torch.ones(2), torch.ones(2), mean=0.5), "mean must be in [1, inf), got 0.5"),
        (lambda: rollout_counts(torch.ones(2), torch.ones(3), mean=4.0), "shares must have the shape of variances"),
    ],
)
def test_wrong_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
