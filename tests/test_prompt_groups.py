"""Soft groups of prompts: exact against a convex solver, inside the set, and blind to single wrong labels."""

from __future__ import annotations

import cvxpy
import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, TotalVariation, robust_loss
from robustgrad.prompt_groups import PromptGroups, soft_group_means

SETS = [TotalVariation(0.2), ChiSquare(0.3), KL(0.2), CVaR(0.6)]


def problem(seed: int = 0, n: int = 30, groups: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, memberships and base weights, all different."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(n, generator=generator, dtype=torch.float64) * 3
    membership = (2 * torch.randn(n, groups, generator=generator, dtype=torch.float64)).softmax(-1)
    return losses, membership, torch.rand(n, generator=generator, dtype=torch.float64) + 0.1


def ratio(losses: Tensor, membership: Tensor, ambiguity: AmbiguitySet, base: Tensor | None = None) -> Tensor:
    """What the gradient of each loss is multiplied by, through the Reweighter."""
    leaf = losses.clone().requires_grad_()
    means, masses = soft_group_means(leaf, membership, base)
    (Reweighter(ambiguity, pool="batch")(means, base=masses) * masses).sum().backward()
    share = torch.ones_like(losses) if base is None else base
    return leaf.grad * share.sum() / share


def solved(losses: Tensor, membership: Tensor, base: Tensor, ambiguity: AmbiguitySet) -> float:
    """The problem of the docstring as it stands there, by a convex solver over alpha."""
    p = (base / base.sum()).numpy()
    joint = p[:, None] * membership.numpy()
    masses = joint.sum(0)
    alpha = cvxpy.Variable(len(masses), nonneg=True)
    match ambiguity:
        case TotalVariation(radius=radius):
            ball = [cvxpy.norm1(alpha - masses) / 2 <= radius]
        case ChiSquare(radius=radius):
            ball = [cvxpy.sum(cvxpy.square(alpha - masses) / masses) / 2 <= radius]
        case KL(radius=radius):
            ball = [cvxpy.sum(cvxpy.rel_entr(alpha, masses)) <= radius]
        case CVaR(alpha=least):
            ball = [alpha <= masses / least]
    q = (joint / masses) @ alpha
    return float(cvxpy.Problem(cvxpy.Maximize(q @ losses.numpy()), [cvxpy.sum(alpha) == 1, *ball]).solve())


@pytest.mark.parametrize("ambiguity", SETS, ids=str)
def test_exact_against_a_convex_solver(ambiguity: AmbiguitySet) -> None:
    losses, membership, base = problem()
    q = ratio(losses, membership, ambiguity, base) * base / base.sum()
    assert float(q @ losses) == pytest.approx(solved(losses, membership, base, ambiguity), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ambiguity", SETS, ids=str)
def test_stays_inside_the_set(ambiguity: AmbiguitySet, seed: int) -> None:
    losses, membership, base = problem(seed)
    p, r = base / base.sum(), ratio(losses, membership, ambiguity, base)
    assert float(p @ r) == pytest.approx(1.0, abs=1e-9)
    assert (r >= 0).all()
    limit = 1 / ambiguity.alpha if isinstance(ambiguity, CVaR) else ambiguity.radius
    assert oracle.divergence(ambiguity, r.numpy(), p.numpy()) <= limit + 1e-9
    plain, unsmoothed = float(p @ losses), robust_loss(losses, ambiguity, base=base).item()
    assert plain - 1e-9 <= float(p * r @ losses) <= unsmoothed + 1e-9


def test_radius_0_is_plain_averaging() -> None:
    losses, membership, base = problem()
    assert torch.allclose(ratio(losses, membership, ChiSquare(0.0), base), torch.ones_like(losses))


def test_gradient_is_the_weighted_sum_by_hand() -> None:
    losses, membership, _ = problem()
    x, theta = torch.randn(30, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    means, masses = soft_group_means(losses + x @ theta, membership)
    (Reweighter(ChiSquare(0.3), pool="batch")(means, base=masses) * masses).sum().backward()
    alpha = oracle.solve(ChiSquare(0.3), means.detach().numpy(), masses.numpy())[0]
    by_hand = sum((row @ alpha) * x_j.numpy() for row, x_j in zip(membership.numpy(), x, strict=True)) / len(x)
    assert np.allclose(theta.grad.numpy(), by_hand, atol=1e-9)


@pytest.mark.parametrize("ambiguity", SETS, ids=str)
def test_one_hot_rows_are_the_groups_of_the_reweighter(ambiguity: AmbiguitySet) -> None:
    losses, membership, _ = problem()
    ids = membership.argmax(-1)
    hard = torch.nn.functional.one_hot(ids, membership.shape[1]).double()
    leaf = losses.clone().requires_grad_()
    Reweighter(ambiguity, pool="batch")(leaf, groups=ids).mean().backward()
    assert torch.allclose(ratio(losses, hard, ambiguity), leaf.grad * len(losses), atol=1e-6)


# The memory's total variation is the capped set.
@pytest.mark.parametrize("ambiguity", [TotalVariation(0.2, cap=2.0), *SETS[1:]], ids=str)
def test_a_group_in_memory_counts_with_its_remembered_mean(ambiguity: AmbiguitySet) -> None:
    losses, membership, _ = problem()
    reweighter = Reweighter(ambiguity)
    for _ in range(40):
        leaf = losses.clone().requires_grad_()
        means, masses = soft_group_means(leaf, membership)
        (reweighter(means, base=masses, groups=torch.arange(5)) * masses).sum().backward()
        reweighter.step()
    assert torch.allclose(leaf.grad * 30, ratio(losses, membership, ambiguity), atol=2e-2)


def test_a_wrong_label_gets_no_more_than_its_neighbours() -> None:
    losses, membership, _ = problem()
    twin = membership[0]
    losses, membership = torch.cat([losses, torch.tensor([50.0])]), torch.cat([membership, twin[None]])
    r = ratio(losses, membership, TotalVariation(0.2))
    assert r[-1] == pytest.approx(r[0].item())
    assert TotalVariation(0.2).solve(losses).max_ratio > 3 * r[-1]


def test_nan_is_never_a_plausible_weight() -> None:
    losses, membership, base = problem()
    losses[3] = torch.nan
    assert ratio(losses, membership, ChiSquare(0.3)).isnan().all()
    base[3] = 0.0
    assert ratio(losses, membership, ChiSquare(0.3), base)[4:].isfinite().all()


def test_a_group_without_mass_takes_no_part() -> None:
    losses, membership, _ = problem()
    empty = torch.cat([membership, torch.zeros(30, 1, dtype=torch.float64)], 1)
    assert torch.allclose(ratio(losses, empty, KL(0.2)), ratio(losses, membership, KL(0.2)))


def test_the_mean_is_the_loops_own() -> None:
    losses, membership, base = problem()
    means, masses = soft_group_means(losses, membership, base)
    assert float((means * masses).sum()) == pytest.approx(float((base * losses).sum() / base.sum()))
    assert float(masses.sum()) == pytest.approx(1.0)
    half = soft_group_means(losses.half(), membership, base.half())
    assert half[0].dtype == torch.float32


def test_fit_finds_clusters_and_is_repeatable() -> None:
    true = torch.eye(3, 8).repeat_interleave(40, 0)
    points = true + 0.03 * torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
    groups = PromptGroups.fit(points, 3)
    ids = groups.ids(points).reshape(3, 40)
    assert (ids == ids[:, :1]).all() and len(set(ids[:, 0].tolist())) == 3
    assert torch.equal(PromptGroups.fit(points, 3).centres, groups.centres)
    assert not torch.equal(PromptGroups.fit(points, 3, seed=5).ids(points), groups.ids(points))


def test_temperature_goes_from_hard_groups_to_none() -> None:
    points = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    centres = PromptGroups.fit(points, 4).centres
    cold, warm = (PromptGroups(centres, t).membership(points) for t in (1e-4, 1e4))
    hard = torch.nn.functional.one_hot(PromptGroups(centres).ids(points), 4).float()
    assert torch.allclose(cold, hard, atol=1e-3)
    assert torch.allclose(warm, torch.full_like(warm, 0.25), atol=1e-3)


def test_equal_prompts_can_be_grouped() -> None:
    groups = PromptGroups.fit(torch.ones(10, 4), 2)
    assert groups.membership(torch.ones(10, 4)).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PromptGroups(torch.zeros(4)), r"centres must have shape \(n, d\), got \(4,\)"),
        (lambda: PromptGroups(torch.eye(2), temperature=0.0), r"temperature must be in \(0, inf\), got 0"),
        (lambda: PromptGroups.fit(torch.rand(3, 2), 4), "count must be at most the 3 prompts, got 4"),
        (lambda: PromptGroups.fit(torch.rand(3, 2), 1), "count must be an integer of at least 2, got 1"),
        (lambda: PromptGroups(torch.eye(2)).ids(torch.rand(5, 3)), "embeddings must have 2 columns"),
        (lambda: soft_group_means(torch.rand(3), torch.rand(2, 2)), "a row for each of the 3 losses, got 2"),
        (lambda: soft_group_means(torch.rand(3, 1), torch.rand(3, 2)), r"losses must have shape \(n,\)"),
        (lambda: soft_group_means(torch.rand(2), torch.rand(2, 2), -torch.ones(2)), "base must be finite and not neg"),
    ],
)
def test_errors_say_what_to_do(call: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
