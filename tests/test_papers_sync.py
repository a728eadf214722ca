"""Objectives, baselines, the natural gradient and the gradient penalty never make the host wait."""

from __future__ import annotations

import torch
from test_ambiguity_sync import NoSync
from test_objectives_robust import Data, each_objective

from robustgrad import CVaR
from robustgrad.baselines import (
    GroupDRO,
    doro_ratio,
    dr_dpo_loss,
    hardest_fraction_ratio,
    inverse_frequency_ratio,
    kldpo_ratio,
    pessimistic_rewards,
)
from robustgrad.gradient_penalty import squared_norm_losses, wasserstein_loss
from robustgrad.npg import natural_gradient
from robustgrad.objectives import generalized_advantages, penalised_rewards, whiten
from robustgrad.robust_ppo import RobustPPO, prompt_ratio


@each_objective
def test_objectives(objective) -> None:
    data = Data()
    with NoSync():
        objective(data).mean().backward()


def test_ratios_of_losses() -> None:
    losses = torch.rand(32, requires_grad=True) * 1
    with NoSync():
        for form in ("normalised", "released"):
            kldpo_ratio(losses, temperature=0.5, form=form)
        doro_ratio(losses, CVaR(0.5), trimmed=0.1)
        hardest_fraction_ratio(losses, fraction=0.2, factor=2.0)
        inverse_frequency_ratio(torch.arange(32) // 5)
        dr_dpo_loss(losses, temperature=0.5).backward()
        pessimistic_rewards(torch.rand(3, 8), temperature=0.5)


def test_groups_off_the_cpu_are_not_read() -> None:
    """Meta tensors have no values: whatever would read one raises."""
    losses, groups = torch.empty(8, device="meta"), torch.empty(8, dtype=torch.long, device="meta")
    for form in ("mean", "scaled"):
        assert GroupDRO([3, 1], group_loss=form).ratio(losses, groups).shape == (8,)
    assert inverse_frequency_ratio(groups, counts=[3, 1]).shape == (8,)


def test_natural_gradient_and_gradient_penalty() -> None:
    theta, z = torch.randn(4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    with NoSync():
        natural = natural_gradient((z.detach() @ theta).tanh(), torch.rand(6), [theta])
        natural.assign([theta], natural.step_size(0.01))
        wasserstein_loss((z @ theta).square(), z, radius=0.1).backward()
        squared_norm_losses((z @ theta).square(), z, coefficient=0.1).sum().backward()


def test_robust_ppo() -> None:
    mask, tokens, rewards = torch.ones(6, 3, dtype=torch.bool), torch.rand(6, 3), torch.rand(6)
    with NoSync():
        ratio = prompt_ratio(-rewards, CVaR(0.5), groups=torch.arange(6) // 2)
        for ppo in (RobustPPO("B"), RobustPPO("A", scaled="rewards", kl_inside=True)):
            advantages, _ = ppo.rollout(rewards, tokens, tokens, mask, ratio)
            ppo.losses(advantages, mask, ratio)
        generalized_advantages(penalised_rewards(rewards, tokens, mask, beta=0.1), tokens, mask)
        whiten(tokens, mask)
