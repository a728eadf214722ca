"""Baselines: each pinned by the limits and laws that define it, and by an oracle where it has an optimum."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation
from robustgrad.baselines import (
    GroupDRO,
    doro_ratio,
    dpo_pro,
    dr_dpo_loss,
    hardest_fraction_ratio,
    inverse_frequency_ratio,
    kldpo_ratio,
    pessimistic_rewards,
    worst_regret,
)
from robustgrad.objectives import dpo

SETS = [TotalVariation(0.3), ChiSquare(0.5), ChiSquare(0.01), KL(0.3), CVaR(0.4), KL(temperature=0.5)]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)


def some_losses(n: int = 64) -> Tensor:
    """softplus of normals, as DPO losses look."""
    z = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return torch.nn.functional.softplus(z)


RATIOS = {
    "kldpo": lambda losses: kldpo_ratio(losses, temperature=0.5),
    "doro": lambda losses: doro_ratio(losses, ChiSquare(0.5), trimmed=0.1),
    "hardest fraction": lambda losses: hardest_fraction_ratio(losses, fraction=0.3, factor=2.0),
}


@pytest.mark.parametrize("ratio", RATIOS.values(), ids=RATIOS)
@pytest.mark.parametrize("n", [1, 2, 64, 4096])
def test_mean_one_and_the_order_of_samples_does_not_matter(ratio, n: int) -> None:
    losses = some_losses(n)
    got = ratio(losses)
    assert got.shape == (n,) and not got.requires_grad
    assert_close(got.mean(), torch.ones((), dtype=torch.float64))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    assert_close(ratio(losses[order]), got[order])


@pytest.mark.parametrize("ratio", RATIOS.values(), ids=RATIOS)
def test_nan_never_becomes_weights_and_ties_share(ratio) -> None:
    losses = some_losses(8)
    losses[3] = torch.nan
    assert ratio(losses).isnan().all()
    assert_close(ratio(torch.full((8,), math.log(2))), torch.ones(8))
    assert ratio(some_losses(8).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("ratio", RATIOS.values(), ids=RATIOS)
def test_losses_must_be_per_sample(ratio) -> None:
    with pytest.raises(ValueError, match=re.escape("losses must have shape (n,), got (4, 1). Use losses.squeeze(-1)")):
        ratio(torch.zeros(4, 1))


# --- KLDPO ---


def test_kldpo_between_the_mean_and_the_maximum() -> None:
    losses = some_losses()
    assert_close(kldpo_ratio(losses, temperature=1e9), torch.ones_like(losses))
    worst = torch.zeros_like(losses)
    worst[losses.argmax()] = 64
    assert_close(kldpo_ratio(losses, temperature=1e-6), worst)
    weights = ((losses - losses.mean()) / 0.3).exp()
    assert_close(kldpo_ratio(losses, temperature=0.3), 64 * weights / weights.sum())


def test_kldpo_as_released_is_not_normalised() -> None:
    """exp((l - mean) / tau), cut off at 10: above 1 in the mean (Jensen), a hidden learning rate."""
    losses = some_losses(4096)
    released = {tau: kldpo_ratio(losses, temperature=tau, form="released") for tau in (0.05, 0.5, 5.0)}
    assert_close(released[0.5], ((losses - losses.mean()) / 0.5).exp().clamp(max=10))
    means = [released[tau].mean() for tau in (5.0, 0.5, 0.05)]
    assert 1 < means[0] < means[1] < means[2]
    assert released[0.05].max() == 10
    # Where it is not cut off, it is the normalised one times that multiplier.
    assert_close(released[5.0] / released[5.0].mean(), kldpo_ratio(losses, temperature=5.0))


@pytest.mark.parametrize("form", ["normalised", "released"])
def test_kldpo_never_overflows(form: str) -> None:
    losses = torch.tensor([0.0, 1e4, 2e4, -1e4])
    got = kldpo_ratio(losses, temperature=1e-3, form=form)
    assert got.isfinite().all()


# --- the known errors of released code ---


@pytest.mark.parametrize("radius", [0.001, 0.01, 0.1, 0.49])
def test_chi_square_weights_sum_to_one_below_one_half(radius: float) -> None:
    """With sqrt(2 rho) for sqrt(1 + 2 rho) the dual is unbounded there, and weights summed to 6 and more."""
    losses = some_losses(128)
    worst = ChiSquare(radius).solve(losses)
    assert_close(worst.weights.sum(), torch.ones((), dtype=torch.float64))

    def dual(eta: float, factor: float) -> float:
        return eta + factor * (losses - eta).clamp_min(0).square().mean().sqrt().item()

    etas = np.linspace(-60, float(losses.max()), 20001)
    assert min(dual(eta, math.sqrt(1 + 2 * radius)) for eta in etas) == pytest.approx(worst.value.item(), rel=1e-4)
    # The released factor keeps falling as eta does.
    assert dual(-1e4, math.sqrt(2 * radius)) < dual(-1e2, math.sqrt(2 * radius)) < worst.mean.item()


def test_chi_square_dual_is_not_minimised_at_a_loss() -> None:
    """The released code tries the losses themselves as eta; the minimiser lies between, or below, them."""
    losses = some_losses(128)
    worst = ChiSquare(0.01).solve(losses)
    excess = (losses - losses[:, None]).clamp_min(0).square().mean(1).sqrt()
    on_losses = (losses + math.sqrt(1.02) * excess).min().item()
    assert on_losses > worst.value.item() * 1.01
    assert worst.threshold < losses.min()


@each_set
def test_weights_are_detached_and_follow_no_local_mean(ambiguity: AmbiguitySet) -> None:
    losses = some_losses().requires_grad_()
    assert not ambiguity.solve(losses).weights.requires_grad
    # Normalising each half on its own would take the difference between the halves out.
    halves = torch.cat([ambiguity.solve(half).ratio for half in torch.sort(losses.detach()).values.split(32)])
    assert not torch.allclose(halves, ambiguity.solve(torch.sort(losses.detach()).values).ratio, atol=1e-2)


# --- Dr. DPO ---


def test_dr_dpo_is_optimistic() -> None:
    losses = some_losses().requires_grad_()
    value = dr_dpo_loss(losses, temperature=0.7)
    assert_close(value, -0.7 * (-losses / 0.7).exp().mean().log())
    value.backward()
    assert_close(losses.grad, (-losses.detach() / 0.7).softmax(0))
    assert value < losses.mean()
    assert losses.grad[losses.argmax()] < 1 / 64 < losses.grad[losses.argmin()]


def test_dr_dpo_between_the_minimum_and_the_mean() -> None:
    losses = some_losses()
    assert_close(dr_dpo_loss(losses, temperature=1e7), losses.mean(), rtol=1e-6, atol=0)
    assert_close(dr_dpo_loss(losses, temperature=1e-4), losses.min(), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=re.escape("temperature must be in (0, inf), got 0.0")):
        dr_dpo_loss(losses, temperature=0.0)


# --- group DRO ---

COUNTS = [60, 30, 10]


def grouped(n: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, generator=generator), torch.randint(3, (n,), generator=generator)


@pytest.mark.parametrize("form", ["mean", "scaled"])
def test_group_dro_against_its_definition(form: str) -> None:
    losses, groups = grouped()
    group_dro = GroupDRO(COUNTS, step_size=0.5, adjustment=2.0, group_loss=form)
    alpha = np.full(3, 1 / 3)
    for _ in range(3):
        got = group_dro.ratio(losses, groups)
        loss, scale = np.zeros(3), np.zeros(3)
        for g in range(3):
            own = losses[groups == g].double().numpy()
            loss[g] = own.mean() if form == "mean" else 100 / COUNTS[g] * own.sum() / 50
            scale[g] = 50 / len(own) if form == "mean" else 100 / COUNTS[g]
        alpha = alpha * np.exp(0.5 * (loss + 2.0 / np.sqrt(COUNTS)))
        alpha = alpha / alpha.sum()
        assert_close(group_dro.weights.double(), torch.from_numpy(alpha), rtol=1e-5, atol=1e-6)
        expected = torch.from_numpy(alpha * scale)[groups]
        assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    # What is descended is the weighted sum of the groups' losses.
    assert_close((got * losses).mean().item(), float(alpha @ loss), rtol=1e-5, atol=0)


def test_scaled_group_loss_is_unbiased_and_the_mean_of_absent_groups_is_not() -> None:
    """Over all batches of two from a training set of three."""
    losses, groups = torch.tensor([1.0, 1.0, 4.0]), torch.tensor([0, 0, 1])
    totals = {"mean": 0.0, "scaled": 0.0}
    for form in totals:
        for batch in itertools.product(range(3), repeat=2):
            group_dro = GroupDRO([2, 1], step_size=0.0, group_loss=form)
            picked = torch.tensor(batch)
            totals[form] += (group_dro.ratio(losses[picked], groups[picked]) * losses[picked]).mean().item() / 9
    assert totals["scaled"] == pytest.approx((1 + 4) / 2)
    assert totals["mean"] < 2.4


def test_group_dro_without_steps_weighs_groups_equally_and_with_steps_finds_the_worst() -> None:
    losses, groups = torch.tensor([0.1, 0.2, 0.3, 2.0]), torch.tensor([0, 0, 1, 2])
    still = GroupDRO(COUNTS, step_size=0.0)
    assert_close(still.ratio(losses, groups), inverse_frequency_ratio(groups))
    moving = GroupDRO(COUNTS, step_size=1.0)
    for _ in range(50):
        ratio = moving.ratio(losses, groups)
    assert_close((ratio * losses).mean(), torch.tensor(2.0))


def test_adjustment_favours_the_small_group() -> None:
    losses, groups = torch.ones(6), torch.tensor([0, 0, 1, 1, 2, 2])
    plain, adjusted = GroupDRO(COUNTS, step_size=1.0), GroupDRO(COUNTS, step_size=1.0, adjustment=1.0)
    plain.ratio(losses, groups), adjusted.ratio(losses, groups)
    assert_close(plain.weights, torch.full((3,), 1 / 3))
    assert adjusted.weights[2] > adjusted.weights[1] > adjusted.weights[0]


def test_a_bad_batch_does_not_stay_in_the_group_weights() -> None:
    losses, groups = grouped()
    group_dro = GroupDRO(COUNTS)
    group_dro.ratio(losses, groups)
    before = group_dro.weights
    assert group_dro.ratio(torch.where(groups == 1, torch.nan, losses), groups).isnan().all()
    assert_close(group_dro.weights, before)


def test_group_dro_resumes() -> None:
    losses, groups = grouped()
    first, second = GroupDRO(COUNTS, step_size=0.3), GroupDRO(COUNTS, step_size=0.3)
    first.ratio(losses, groups)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.ratio(losses, groups), second.ratio(losses, groups))
    with pytest.raises(ValueError, match="state must hold 2 groups, got 3"):
        GroupDRO([1, 2]).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: GroupDRO([3, 0]), ValueError, "counts must be (G,) numbers above 0, got [3.0, 0.0]"),
        (lambda: GroupDRO([]), ValueError, "counts must be (G,)"),
        (lambda: GroupDRO([1], step_size=-1), ValueError, "step_size must be in [0, inf), got -1"),
        (lambda: GroupDRO([1], adjustment=-1), ValueError, "adjustment must be in [0, inf), got -1"),
        (lambda: GroupDRO([1], group_loss="sum"), ValueError, "group_loss must be 'mean' or 'scaled', got 'sum'"),
        (lambda: GroupDRO([1]).ratio(torch.ones(2), torch.tensor([0, 1])), ValueError,
         "groups must be ids in 0 .. 0, got 0 .. 1"),
        (lambda: GroupDRO([1]).ratio(torch.ones(2), torch.zeros(2)), TypeError, "groups must be integer ids"),
        (lambda: GroupDRO([1]).ratio(torch.ones(2), None), TypeError, "groups must be a torch.Tensor"),
    ],
)  # fmt: skip
def test_group_dro_refuses(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build()


# --- inverse frequency ---


def test_inverse_frequency_is_the_mean_of_group_means() -> None:
    losses, groups = grouped()
    means = torch.stack([losses[groups == g].mean() for g in range(3)])
    assert_close((inverse_frequency_ratio(groups) * losses).mean(), means.mean())
    assert_close(inverse_frequency_ratio(groups * 7 - 3), inverse_frequency_ratio(groups))
    whole = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    assert_close(inverse_frequency_ratio(whole, counts=COUNTS), inverse_frequency_ratio(whole))
    assert_close(inverse_frequency_ratio(torch.tensor([2]), counts=COUNTS), torch.tensor([100 / 30]))
    assert_close(inverse_frequency_ratio(torch.tensor([5, 5])), torch.ones(2))


def test_inverse_frequency_refuses() -> None:
    with pytest.raises(TypeError, match="groups must be integer ids"):
        inverse_frequency_ratio(torch.zeros(3))
    with pytest.raises(ValueError, match=re.escape("groups must be ids in 0 .. 1, got 0 .. 2")):
        inverse_frequency_ratio(torch.arange(3), counts=[1, 2])


# --- DPO-PRO ---


def pairs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(40, dtype=torch.float64, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("radius", [0.0, 0.1, 1.0, 9.0])
def test_dpo_pro_against_every_label_probability(radius: float) -> None:
    rows, q = pairs(), torch.linspace(0, 1, 40, dtype=torch.float64)
    right, wrong = dpo(*rows, beta=0.8), dpo(rows[1], rows[0], rows[3], rows[2], beta=0.8)
    p = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None]
    inside = (p - q).square() <= radius * q * (1 - q) + 1e-12
    grid = torch.where(inside, p * right + (1 - p) * wrong, -torch.inf).amax(0)
    plain = q * right + (1 - q) * wrong
    assert_close(dpo_pro(*rows, q, radius=radius, beta=0.8), torch.maximum(grid, plain), rtol=0, atol=2e-4)


def test_dpo_pro_unclipped_is_a_penalty_on_the_log_ratio() -> None:
    rows, q = pairs(), torch.linspace(0.3, 0.7, 40, dtype=torch.float64)
    first, second = rows[0] - rows[2], rows[1] - rows[3]
    soft = q * dpo(*rows, beta=0.8) + (1 - q) * dpo(rows[1], rows[0], rows[3], rows[2], beta=0.8)
    penalty = (0.1 * q * (1 - q)).sqrt() * 0.8 * (first - second).abs()
    assert_close(dpo_pro(*rows, q, radius=0.1, beta=0.8), soft + penalty)


def test_dpo_pro_leaves_hard_labels_alone_and_radius_zero_is_dpo() -> None:
    rows, ones = pairs(), torch.ones(40, dtype=torch.float64)
    assert_close(dpo_pro(*rows, ones, radius=5.0), dpo(*rows))
    assert_close(dpo_pro(*rows, 0.9 * ones, radius=0.0), dpo(*rows, label_smoothing=0.1))


def test_dpo_pro_gradient_and_bad_probabilities() -> None:
    rows, q = [row.requires_grad_() for row in pairs()], torch.full((40,), 0.6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *r: dpo_pro(*r, q, radius=0.2), rows)
    for radius in (0.0, 0.2):
        got = dpo_pro(*rows, torch.linspace(-0.1, 0.9, 40, dtype=torch.float64), radius=radius)
        assert got[0].isnan() and got[10:].isfinite().all()
    with pytest.raises(ValueError, match=re.escape("radius must be in [0, inf), got -1")):
        dpo_pro(*rows, q, radius=-1)
    with pytest.raises(ValueError, match="preference must have the shape of chosen"):
        dpo_pro(*rows, q[:3], radius=0.1)


# --- DORO ---


@each_set
@pytest.mark.parametrize("cut", [0, 1, 8, 32, 63])
def test_doro_is_the_set_on_the_losses_left(ambiguity: AmbiguitySet, cut: int) -> None:
    losses = some_losses().sort().values
    got = doro_ratio(losses, ambiguity, trimmed=cut / 64)
    assert (got[64 - cut :] == 0).all()
    left = ambiguity.solve(losses[: 64 - cut]).weights
    assert_close(got[: 64 - cut] / 64, left, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n", [7, 49, 100])
def test_rounding_leaves_no_mass_on_what_was_trimmed(n: int) -> None:
    """The largest ball follows any mass, however small, at the maximum."""
    losses = some_losses(n).sort().values
    for cut in range(1, n):
        got = doro_ratio(losses, TotalVariation(1.0), trimmed=cut / n)
        assert_close(got[n - cut - 1].item(), float(n))


def test_doro_as_its_authors_write_it() -> None:
    """CVaR-DORO: the mean of the losses of rank eps n to (eps + alpha (1 - eps)) n, from the top."""
    losses = some_losses(100)
    top = losses.sort(descending=True).values
    expected = top[10:37].mean()
    assert_close((doro_ratio(losses, CVaR(0.3), trimmed=0.1) * losses).mean(), expected, rtol=1e-6, atol=0)


def test_doro_ignores_an_outlier_that_a_worst_case_follows() -> None:
    losses = some_losses(100)
    losses[17] = 1e6
    assert CVaR(0.1).solve(losses).ratio[17] > 5
    clean = torch.cat([losses[:17], losses[18:]])
    got = doro_ratio(losses, CVaR(0.1), trimmed=0.01)
    assert got[17] == 0
    assert_close((got * losses).mean(), CVaR(0.1).solve(clean).value, rtol=1e-6, atol=0)


def test_doro_refuses() -> None:
    with pytest.raises(ValueError, match=re.escape("trimmed must be in [0, 1), got 1.0")):
        doro_ratio(some_losses(), CVaR(0.1), trimmed=1.0)


# --- reward ensembles ---


def test_pessimistic_rewards_between_the_mean_and_the_lowest() -> None:
    rewards = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(pessimistic_rewards(rewards, temperature=1e6), rewards.mean(0), rtol=0, atol=1e-5)
    assert_close(pessimistic_rewards(rewards, temperature=1e-4), rewards.amin(0), rtol=0, atol=1e-3)
    exact = -0.7 * (-rewards / 0.7).exp().mean(0).log()
    assert_close(pessimistic_rewards(rewards, temperature=0.7), exact)
    assert_close(pessimistic_rewards(rewards, temperature=0.7), -KL(temperature=0.7).solve(-rewards.T).value)
    assert_close(pessimistic_rewards(rewards + 1e4, temperature=0.7), exact + 1e4)
    assert torch.equal(pessimistic_rewards(rewards[:1], temperature=0.1), rewards[0])
    assert torch.autograd.gradcheck(lambda r: pessimistic_rewards(r, temperature=0.7), [rewards.requires_grad_()])


def test_worst_regret_against_the_corners_of_the_ball() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    probs = torch.randn(6, 4, dtype=torch.float64, generator=generator).softmax(-1)
    corners = []
    for a in range(4):
        for sign in (1, -1):
            moved = rewards + sign * 0.5 * torch.eye(4, dtype=torch.float64)[a]
            corners.append(moved.amax(-1) - (probs * moved).sum(-1))
    assert_close(worst_regret(rewards, probs, radius=0.5), torch.stack(corners).amax(0))
    assert_close(worst_regret(rewards, probs, radius=0.0), rewards.amax(-1) - (probs * rewards).sum(-1))


def test_reward_functions_refuse() -> None:
    with pytest.raises(ValueError, match=re.escape("rewards must have shape (m, n) of m reward models")):
        pessimistic_rewards(torch.zeros(3), temperature=1.0)
    with pytest.raises(ValueError, match=re.escape("temperature must be in (0, inf), got 0.0")):
        pessimistic_rewards(torch.zeros(3, 2), temperature=0.0)
    with pytest.raises(ValueError, match=re.escape("probs must have the shape of rewards (3, 2), got (2,)")):
        worst_regret(torch.zeros(3, 2), torch.zeros(2), radius=1.0)
    with pytest.raises(ValueError, match=re.escape("radius must be in [0, inf), got -1")):
        worst_regret(torch.zeros(3, 2), torch.zeros(3, 2), radius=-1)


# --- the hardest fraction ---


def test_hardest_fraction_between_the_mean_and_cvar() -> None:
    losses = some_losses(100)
    assert_close(hardest_fraction_ratio(losses, fraction=0.3, factor=1.0), torch.ones_like(losses))
    assert_close(hardest_fraction_ratio(losses, fraction=1.0, factor=9.0), torch.ones_like(losses))
    limit = hardest_fraction_ratio(losses, fraction=0.3, factor=1e9)
    assert_close(limit, CVaR(0.3).solve(losses).ratio, rtol=1e-6, atol=1e-6)
    got = hardest_fraction_ratio(losses, fraction=0.3, factor=4.0)
    hard = losses >= losses.sort(descending=True).values[29]
    assert_close(got[hard] / got[~hard][0], torch.full((30,), 4.0, dtype=torch.float64))
    with pytest.raises(ValueError, match=re.escape("factor must be in [1, inf), got 0.5")):
        hardest_fraction_ratio(losses, fraction=0.3, factor=0.5)
    with pytest.raises(ValueError, match=re.escape("fraction must be in (0, 1], got 0.0")):
        hardest_fraction_ratio(losses, fraction=0.0, factor=2.0)
