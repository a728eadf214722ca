"""The memory pool: the formulas, any cut of a step, ties, units, gaps in the data, and resuming."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import memory_reference
import numpy as np
import pytest
import torch
from torch import Tensor

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, TotalVariation

SETS = [
    TotalVariation(0.2),
    TotalVariation(0.2, cap=4.0),
    TotalVariation(0.9, cap=2.0),
    TotalVariation(1.0),
    TotalVariation(penalty=0.3),
    ChiSquare(0.5),
    ChiSquare(10.0),
    ChiSquare(penalty=0.5),
    KL(0.3),
    KL(3.0),
    KL(temperature=0.2),
    CVaR(0.3),
    CVaR(0.01),
]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)


def ratios(reweighter: Reweighter, losses: Tensor, **companions: Tensor) -> Tensor:
    """What one call multiplies each gradient by."""
    leaf = losses.clone().requires_grad_()
    reweighter(leaf, **companions).sum().backward()
    return leaf.grad


def stream(steps: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Skewed losses that shrink and tighten, as in training."""
    noise = torch.randn(steps, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    level = torch.linspace(0, 1.5, steps, dtype=torch.float64)[:, None]
    return torch.nn.functional.softplus(noise - level).to(dtype)


def filled(ambiguity: AmbiguitySet, seed: int = 5, **options: object) -> Reweighter:
    """A reweighter that remembers 20 steps of 32."""
    reweighter = Reweighter(ambiguity, **options)
    for losses in stream(20, 32, seed):
        ratios(reweighter, losses)
        reweighter.step()
    return reweighter


@each_set
@pytest.mark.parametrize("size", [8, 32, 100])
def test_follows_the_formulas(ambiguity: AmbiguitySet, size: int) -> None:
    reweighter = Reweighter(ambiguity, memory=150)
    reweighter.expects_steps = True  # a first step of 100 must not be taken for two
    reference = memory_reference.Memory(ambiguity, 150)
    for t, losses in enumerate(stream(8, size, seed=size)):
        losses[1] = losses[0]  # ties within the step
        expected = reference.step(losses.numpy())
        found = torch.cat([ratios(reweighter, part) for part in losses.split(32)])  # below 64: no solve on itself
        reweighter.step()
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-7, err_msg=f"step {t}")


@each_set
def test_any_cut_of_a_step_gives_the_same(ambiguity: AmbiguitySet) -> None:
    whole, cuts = Reweighter(ambiguity), [Reweighter(ambiguity) for _ in range(3)]
    for t, losses in enumerate(stream(20, 32)):
        expected = ratios(whole, losses)
        order = torch.randperm(32, generator=torch.Generator().manual_seed(t))
        parts = (torch.arange(32).split(1), torch.arange(32).split(5), order.split([1, 13, 18]))
        for reweighter, cut in zip(cuts, parts, strict=True):
            found = torch.empty_like(expected)
            for part in cut:
                found[part] = ratios(reweighter, losses[part])
            reweighter.step()
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        whole.step()


def test_micro_batches_train_to_the_same_parameters() -> None:
    """Micro-batch 1 x 32 and 8 x 4, 800 steps of a logistic preference model, float32."""

    def train(micro: int) -> Tensor:
        torch.manual_seed(0)
        x, w = torch.randn(800, 32, 4), torch.zeros(4, requires_grad=True)
        reweighter = Reweighter(ChiSquare(0.5))
        for step in x:
            for part in step.split(micro):
                losses = torch.nn.functional.softplus(-(part @ w) + part[:, 0] * part[:, 1])
                (reweighter(losses).sum() / 32).backward()
            with torch.no_grad():
                w -= 0.05 * w.grad
            w.grad = None
            reweighter.step()
        return w.detach()

    torch.testing.assert_close(train(1), train(8), rtol=0, atol=1e-5)


@each_set
def test_all_losses_equal_gives_ratio_one(ambiguity: AmbiguitySet) -> None:
    """The first steps of DPO: every loss is log 2. A strict comparison would never move the model."""
    reweighter = Reweighter(ambiguity)
    for _ in range(12):
        found = ratios(reweighter, torch.full((32,), 2.0, dtype=torch.float64).log())
        torch.testing.assert_close(found, torch.ones_like(found))
        reweighter.step()
    assert reweighter.metrics()["plain"]


@each_set
def test_a_memory_of_equal_losses_says_nothing_about_others(ambiguity: AmbiguitySet) -> None:
    """The second step of DPO: half of its losses are above log 2, and none is known to be hard."""
    for raw in (2.0, 0.1, -3e5, 0.0):
        reweighter = Reweighter(ambiguity)
        for _ in range(40):
            ratios(reweighter, torch.full((32,), raw, dtype=torch.float64))
            reweighter.step()
        assert (ratios(reweighter, raw + 0.01 * torch.randn(32, dtype=torch.float64)) == 1).all()
        assert reweighter.metrics()["plain"]
        reweighter.step()
        ratios(reweighter, raw + 0.01 * torch.randn(32, dtype=torch.float64))
        assert not reweighter.metrics()["plain"]


@pytest.mark.parametrize(
    "ambiguity", [s for s in SETS if s not in (ChiSquare(10.0), KL(3.0), KL(temperature=0.2))], ids=repr
)
def test_mean_ratio_is_about_one_without_normalising(ambiguity: AmbiguitySet) -> None:
    """(Three of the sets rest on too few losses for a mean over 160 steps to say anything.)"""
    reweighter = Reweighter(ambiguity)
    noise = torch.randn(200, 32, generator=torch.Generator().manual_seed(3)).exp()
    found = torch.stack([(ratios(reweighter, losses), reweighter.step())[0] for losses in noise])
    assert 0.8 < float(found[40:].mean()) < 1.25
    if ambiguity != TotalVariation(penalty=0.3):
        assert not torch.allclose(found[40:].mean(1), torch.ones(160), atol=0.02)


@each_set
def test_an_outlier_gets_no_more_than_the_largest_remembered_loss(ambiguity: AmbiguitySet) -> None:
    reweighter = filled(ambiguity)
    largest = float(stream(20, 32, 5).max())
    found = ratios(reweighter, torch.tensor([1e6, 1e9, largest * 50], dtype=torch.float64))
    assert (found == found[0]).all() and found[0] <= float(reweighter.metrics()["cap"]) * 1.2


@each_set
def test_ratio_is_monotone_and_not_negative(ambiguity: AmbiguitySet) -> None:
    found = ratios(filled(ambiguity), torch.linspace(-2, 6, 400, dtype=torch.float64))
    assert (found.diff() >= -1e-12).all() and (found >= 0).all() and found.isfinite().all()


@pytest.mark.parametrize("ambiguity", [TotalVariation(0.2), ChiSquare(0.5), KL(0.3), CVaR(0.3)], ids=repr)
def test_balls_see_neither_level_nor_scale(ambiguity: AmbiguitySet) -> None:
    plain, moved = Reweighter(ambiguity), Reweighter(ambiguity)
    for losses in stream(12, 32):
        torch.testing.assert_close(ratios(plain, losses), ratios(moved, 256 * losses - 1024), rtol=1e-7, atol=1e-7)
        plain.step(), moved.step()


def test_a_penalty_keeps_the_units_of_the_loss() -> None:
    """A penalty of 0.5 on losses is one of 50 on losses in cents."""
    small, large = Reweighter(KL(temperature=0.5)), Reweighter(KL(temperature=50.0))
    for losses in stream(12, 32):
        torch.testing.assert_close(ratios(small, losses), ratios(large, 100 * losses), rtol=1e-7, atol=1e-7)
        small.step(), large.step()


def test_units_are_held_so_that_equal_losses_stay_equal() -> None:
    """0/1 losses whose share of ones wanders a little: each value keeps one ratio within a step and a mean of 1."""
    reweighter, generator = Reweighter(CVaR(0.2)), torch.Generator().manual_seed(0)
    means = []
    for t in range(150):
        losses = (torch.rand(32, generator=generator, dtype=torch.float64) < 0.3 + 0.03 * (t % 3)).double()
        means.append(float(ratios(reweighter, losses).mean()))
        reweighter.step()
    assert 0.9 < np.mean(means[60:]) < 1.1


def test_memory_is_frozen_within_a_step_and_learns_at_its_end() -> None:
    reweighter, probe = filled(ChiSquare(0.5)), torch.linspace(0, 3, 20, dtype=torch.float64)
    before = ratios(reweighter, probe)
    ratios(reweighter, probe + 5)
    assert torch.equal(ratios(reweighter, probe), before)
    reweighter.step()
    reweighter.step()  # once more is the same as once
    assert not torch.equal(ratios(reweighter, probe), before)


def test_a_mark_without_a_call_is_no_step() -> None:
    reweighter = Reweighter(CVaR(0.5))
    reweighter.step()
    ratios(reweighter, torch.rand(40))
    ratios(reweighter, torch.rand(40))
    assert reweighter.metrics()["pool_size"] == 40


def test_without_marks_a_step_ends_after_a_quarter_of_the_memory() -> None:
    reweighter = Reweighter(CVaR(0.5), memory=256)
    for calls in range(1, 6):
        ratios(reweighter, torch.rand(20))
        assert bool(reweighter.metrics()["plain"]) == (calls <= 4)  # 80 losses wait at the fifth call


def test_forgotten_steps_are_reported_and_do_not_pile_up() -> None:
    reweighter = Reweighter(CVaR(0.5))
    reweighter.expects_steps = True
    ratios(reweighter, torch.rand(40_000))
    with pytest.warns(UserWarning, match=r"40000 losses came without an optimizer step.*reweighter.step\(\)"):
        ratios(reweighter, torch.rand(4))
    assert (
        reweighter.metrics()["pool_size"] == 40_000 and len(reweighter.state_dict()["pool"]["waiting"]["scores"]) == 4
    )


def test_a_small_memory_waits_as_long_for_a_step() -> None:
    reweighter = Reweighter(CVaR(0.5), memory=64)
    reweighter.expects_steps = True
    ratios(reweighter, torch.rand(2**15 - 1))
    ratios(reweighter, torch.rand(1))  # no warning, which would be an error
    with pytest.warns(UserWarning, match="32768 losses came without an optimizer step"):
        ratios(reweighter, torch.rand(1))


def test_below_64_remembered_losses_there_is_no_rule() -> None:
    reweighter = Reweighter(CVaR(0.5))
    for _ in range(2):
        assert torch.equal(ratios(reweighter, torch.rand(31)), torch.ones(31))
        assert reweighter.metrics()["plain"]
        reweighter.step()
    losses = torch.rand(70)
    torch.testing.assert_close(ratios(reweighter, losses), CVaR(0.5).solve(losses).ratio)
    assert not reweighter.metrics()["plain"]


def test_radius_zero_and_alpha_one_are_plain() -> None:
    for ambiguity in (TotalVariation(0.0), TotalVariation(0.0, cap=2.0), ChiSquare(0.0), KL(0.0), CVaR(1.0)):
        found = ratios(filled(ambiguity), torch.tensor([-torch.inf, -1.0, *range(5)], dtype=torch.float64))
        torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-12, atol=1e-12)


@each_set
def test_nonfinite_losses_never_enter_the_memory(ambiguity: AmbiguitySet) -> None:
    clean, dirty = Reweighter(ambiguity), Reweighter(ambiguity)
    for t, losses in enumerate(stream(10, 32)):
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
        found = ratios(dirty, torch.cat([losses, bad]))
        torch.testing.assert_close(found[:-3], ratios(clean, losses), rtol=1e-12, atol=1e-12)
        assert found[-3:-1].isnan().all() and (t < 2 or found[-1] < 0.5)
        clean.step(), dirty.step()
    assert dirty.metrics()["nonfinite"] == 20


def test_a_memory_of_nothing_but_nan_stays_plain() -> None:
    reweighter = Reweighter(ChiSquare(0.5))
    for _ in range(4):
        assert ratios(reweighter, torch.full((40,), torch.nan)).isnan().all()
        reweighter.step()
    assert torch.equal(ratios(reweighter, torch.rand(10)), torch.ones(10))
    assert reweighter.metrics()["plain"] and reweighter.metrics()["pool_size"] == 0


def test_masked_samples_are_not_there() -> None:
    padded, plain = Reweighter(TotalVariation(0.2)), Reweighter(TotalVariation(0.2))
    for losses in stream(10, 24):
        mask = torch.arange(32) < 24
        filler = torch.full((8,), torch.nan, dtype=torch.float64)
        found = ratios(padded, torch.cat([losses, filler]), mask=mask)
        torch.testing.assert_close(found[:24], ratios(plain, losses), rtol=1e-12, atol=1e-12)
        assert (found[24:] == 0).all()
        padded.step(), plain.step()


@each_set
def test_a_base_weight_of_two_stands_for_two_samples(ambiguity: AmbiguitySet) -> None:
    twice, once, losses = Reweighter(ambiguity), Reweighter(ambiguity), stream(1, 64, seed=9)[0]
    for part in losses.split(16):
        ratios(twice, part.repeat(2))
        ratios(once, part, base=torch.full((16,), 2.0))
    twice.step(), once.step()
    probe = torch.cat([losses, torch.linspace(0, 3, 20, dtype=torch.float64)]).unique()[::3]
    torch.testing.assert_close(ratios(once, probe), ratios(twice, probe), rtol=1e-7, atol=1e-7)


def test_groups_are_remembered_by_their_means() -> None:
    """Domains over many calls: every sample of a domain has the ratio of its remembered mean."""
    reweighter, generator = Reweighter(ChiSquare(0.2)), torch.Generator().manual_seed(0)
    level = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    for _ in range(12):
        groups = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 32, replacement=True, generator=generator)
        losses = level[groups] + torch.randn(32, generator=generator, dtype=torch.float64)
        found = torch.cat([ratios(reweighter, losses[i : i + 1], groups=groups[i : i + 1]) for i in range(32)])
        reweighter.step()
    by_group = [found[groups == g] for g in range(3)]
    assert all(torch.equal(r, r[:1].expand_as(r)) for r in by_group)
    assert by_group[0][0] < by_group[1][0] < by_group[2][0]
    unseen = ratios(reweighter, torch.tensor([9.0, 9.0, -9.0, -9.0]).double(), groups=torch.tensor([8, 8, 9, 9]))
    assert unseen[0] == unseen[1] >= by_group[2][0] and unseen[2] == unseen[3] <= by_group[0][0]


def test_groups_in_some_calls_only_are_refused() -> None:
    reweighter = Reweighter(CVaR(0.5))
    ratios(reweighter, torch.rand(4))
    with pytest.raises(ValueError, match=r"groups must be given in every call or in none"):
        ratios(reweighter, torch.rand(4), groups=torch.arange(4))


@pytest.mark.parametrize(
    ("ambiguity", "step_size", "size"),
    [
        (ChiSquare(0.5), 32, 512),
        (ChiSquare(0.5), 200, 800),
        (CVaR(0.05), 32, 1000),
        (TotalVariation(0.1), 32, 512),
        (TotalVariation(0.1), 100, 1024),
        (TotalVariation(0.1, cap=11.0), 32, 1600),
    ],
)
def test_memory_sizes(ambiguity: AmbiguitySet, step_size: int, size: int) -> None:
    reweighter = Reweighter(ambiguity)
    for _ in range(2 + 2 * size // step_size):
        for part in torch.rand(step_size).split(32):
            ratios(reweighter, part)
        reweighter.step()
    ratios(reweighter, torch.rand(1))
    assert reweighter.metrics()["pool_size"] == size


def test_metrics_are_about_the_pool_and_the_step() -> None:
    reweighter = filled(CVaR(0.25))
    losses = stream(1, 32, 8)[0]
    found = ratios(reweighter, losses)
    metrics = reweighter.metrics()
    torch.testing.assert_close(metrics["ess"], found.sum() ** 2 / found.square().sum())
    torch.testing.assert_close(metrics["max_ratio"], found.max())
    assert metrics["pool_size"] == 512 and metrics["value"] > metrics["mean"] > 0
    torch.testing.assert_close(metrics["gap"], metrics["value"] - metrics["mean"])
    torch.testing.assert_close(metrics["cap"], torch.tensor(4.0, dtype=torch.float64), rtol=0.01, atol=0)


def test_uncapped_total_variation_says_what_it_solves() -> None:
    reweighter = filled(TotalVariation(0.2))
    ratios(reweighter, torch.rand(32))
    assert "TotalVariation(radius=0.2, cap=1 + 0.2 * min(B, 64))" in repr(reweighter)
    assert 7.0 < reweighter.metrics()["cap"] < 7.8  # 1 + 0.2 * 32
    assert repr(Reweighter(TotalVariation(0.2), memory=0)) == "Reweighter(TotalVariation(radius=0.2), pool='batch')"


# Checkpoints.


def through_disk(state: dict[str, object]) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_set
@pytest.mark.parametrize("when", ["after the step", "within a step", "before the first call"])
def test_resume_is_exact_to_the_bit(ambiguity: AmbiguitySet, when: str) -> None:
    data = stream(30, 16, seed=2)
    original = Reweighter(ambiguity)
    for losses in data[: 0 if when == "before the first call" else 14]:
        ratios(original, losses)
        original.step()
    if when == "within a step":
        ratios(original, data[14][:7])
    resumed = Reweighter(ambiguity)
    ratios(resumed, torch.rand(100))  # whatever it knew is replaced
    resumed.load_state_dict(through_disk(original.state_dict()))
    assert resumed.metrics() == original.metrics()
    for losses in data[15:]:
        assert torch.equal(ratios(resumed, losses), ratios(original, losses))
        original.step(), resumed.step()


def test_resume_with_groups_base_and_counters() -> None:
    original, groups = Reweighter(KL(0.3)), torch.arange(16) % 3
    for losses in stream(10, 16):
        losses[0] = torch.nan
        ratios(original, losses, groups=groups, base=torch.linspace(1, 2, 16))
        original.step()
    resumed = Reweighter(KL(0.3))
    resumed.load_state_dict(through_disk(original.state_dict()))
    losses = stream(1, 16, 4)[0]
    assert torch.equal(ratios(resumed, losses, groups=groups), ratios(original, losses, groups=groups))
    assert resumed.metrics()["nonfinite"] == 10


def test_a_saved_state_does_not_move_on() -> None:
    reweighter = filled(CVaR(0.5))
    state = reweighter.state_dict()
    kept = copy.deepcopy(state)
    for losses in stream(5, 32):
        ratios(reweighter, losses)
        reweighter.step()
    assert torch.equal(state["pool"]["memory"]["samples"]["scores"], kept["pool"]["memory"]["samples"]["scores"])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["deepcopy", "pickle"])
def test_copies_go_their_own_way(copier: object) -> None:
    original, losses = filled(KL(0.3)), torch.linspace(0, 2, 9, dtype=torch.float64)
    twin = copier(original)
    assert torch.equal(ratios(twin, losses), ratios(original, losses))
    for _ in range(3):
        twin.step()
        ratios(twin, losses + 9)
    twin.step()
    assert not torch.equal(ratios(twin, losses), ratios(original, losses))


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (Reweighter(CVaR(0.4)), "ambiguity=CVaR"),
        (Reweighter(CVaR(0.5), memory=128), "memory=128"),
        (Reweighter(CVaR(0.5), pool="batch"), "pool=batch"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(other: Reweighter, name: str) -> None:
    with pytest.raises(ValueError, match=f"state must have {name}"):
        other.load_state_dict(filled(CVaR(0.5)).state_dict())


@pytest.mark.parametrize("state", [{}, {"state": {}, "param_groups": []}, None])
def test_a_foreign_checkpoint_is_refused(state: object) -> None:
    with pytest.raises(ValueError, match=r"must come from Reweighter.state_dict\(\)"):
        Reweighter(CVaR(0.5)).load_state_dict(state)


def test_an_unknown_version_is_refused() -> None:
    state = Reweighter(CVaR(0.5)).state_dict() | {"version": 99}
    with pytest.raises(ValueError, match="version 1, got 99"):
        Reweighter(CVaR(0.5)).load_state_dict(state)


def test_no_warning_and_constant_memory_over_many_steps() -> None:
    reweighter = Reweighter(CVaR(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            ratios(reweighter, torch.rand(16))
            reweighter.step()
    state = reweighter.state_dict()["pool"]
    assert len(state["memory"]["samples"]["scores"]) == 512 and len(state["waiting"]["scores"]) == 16
