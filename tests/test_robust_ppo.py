"""PPO versions A and B: equal after whitening, different before it; an adversary over prompts."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from robustgrad import KL, ChiSquare, CVaR, Reweighter, TotalVariation
from robustgrad.objectives import clipped_surrogate, generalized_advantages, penalised_rewards, sequence_mean, whiten
from robustgrad.robust_ppo import RobustPPO, prompt_ratio, prompt_scores

SETS = [TotalVariation(0.3), ChiSquare(0.5), KL(0.3), CVaR(0.5)]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)
# Every way of version A that is not the identity with B.
DIFFERENT = [
    RobustPPO("A", scaled="advantages"),
    RobustPPO("A", scaled="rewards"),
    RobustPPO("A", scaled="rewards", kl_inside=True),
]


class Rollout:
    """Four prompts, three responses each, and a linear policy with a double graph."""

    def __init__(self, n: int = 12, tokens: int = 5) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.groups = torch.arange(n) // 3
        self.rewards, self.values, self.kl = normal(n), normal(n, tokens), 0.1 * normal(n, tokens)
        self.mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (n, 1), generator=generator)
        self.features, self.theta = normal(n, tokens, 6), (0.1 * normal(6)).requires_grad_()
        self.old = -0.2 * normal(n, tokens).abs()
        self.scores = prompt_scores(self.rewards)

    def advantages(self, ppo: RobustPPO, ratio: Tensor) -> tuple[Tensor, Tensor]:
        return ppo.rollout(self.rewards, self.kl, self.values, self.mask, ratio)

    def losses(self, ppo: RobustPPO, ratio: Tensor) -> Tensor:
        advantages, _ = self.advantages(ppo, ratio)
        return ppo.losses(clipped_surrogate(self.features @ self.theta, self.old, advantages), self.mask, ratio)

    def gradient(self, ppo: RobustPPO, ratio: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(self.losses(ppo, ratio).mean(), self.theta)
        return gradient

    def naive(self, ratio: Tensor) -> Tensor:
        """sum_i q_i grad loss_i of plain PPO, one response at a time."""
        ones, total = torch.ones_like(ratio), 0
        for i, c in enumerate(ratio):
            (gradient,) = torch.autograd.grad(self.losses(RobustPPO("B"), ones)[i], self.theta)
            total = total + c / len(ratio) * gradient
        return total


@pytest.fixture
def rollout() -> Rollout:
    return Rollout()


@each_set
def test_after_whitening_a_is_b_exactly(rollout: Rollout, ambiguity: object) -> None:
    ratio = prompt_ratio(rollout.scores, ambiguity, groups=rollout.groups)
    version_a, version_b = (RobustPPO(version) for version in "AB")
    assert_close(rollout.losses(version_a, ratio), rollout.losses(version_b, ratio), rtol=1e-14, atol=1e-15)
    gradient = rollout.gradient(version_b, ratio)
    assert_close(rollout.gradient(version_a, ratio), gradient, rtol=1e-13, atol=1e-15)
    assert_close(gradient, rollout.naive(ratio.double()), rtol=1e-12, atol=1e-14)


def test_the_identity_is_bitwise_where_scaling_does_not_round(rollout: Rollout) -> None:
    ratio = torch.tensor([0.0, 0.5, 2.0, 4.0]).repeat(3)
    assert torch.equal(rollout.losses(RobustPPO("A"), ratio), rollout.losses(RobustPPO("B"), ratio))


@each_set
@pytest.mark.parametrize("ppo", DIFFERENT, ids=str)
def test_otherwise_they_differ(rollout: Rollout, ppo: RobustPPO, ambiguity: object) -> None:
    ratio = prompt_ratio(rollout.scores, ambiguity, groups=rollout.groups)
    b = rollout.gradient(RobustPPO("B"), ratio)
    assert (rollout.gradient(ppo, ratio) - b).norm() > 1e-2 * b.norm()


@pytest.mark.parametrize("ppo", [RobustPPO("A"), RobustPPO("B"), *DIFFERENT], ids=str)
def test_ratio_one_is_plain_ppo(rollout: Rollout, ppo: RobustPPO) -> None:
    ones = torch.ones(12)
    tokens = penalised_rewards(rollout.rewards, rollout.kl, rollout.mask, beta=1.0)
    plain, returns = generalized_advantages(tokens, rollout.values, rollout.mask)
    advantages, targets = rollout.advantages(ppo, ones)
    assert_close(advantages, whiten(plain, rollout.mask))
    assert_close(targets, returns)


def test_what_each_switch_of_a_scales(rollout: Rollout) -> None:
    """By the definitions, written out; whitening is undone by comparing after another whitening."""
    c = torch.linspace(0.1, 1.9, 12, dtype=torch.float64)
    by_token, mask = c[:, None], rollout.mask
    zero = torch.zeros_like(rollout.kl)
    rewards = penalised_rewards(rollout.rewards, zero, mask, beta=0.0)
    kl = torch.where(mask, rollout.kl, 0.0)
    plain, returns = generalized_advantages(rewards - kl, rollout.values, mask)
    outside, outside_targets = generalized_advantages(by_token * rewards - kl, rollout.values, mask)
    inside, inside_targets = generalized_advantages(by_token * (rewards - kl), rollout.values, mask)
    values = torch.where(mask, rollout.values, 0.0)
    cases = [
        ({"scaled": "whitened"}, by_token * whiten(plain, mask), by_token * plain + values),
        ({"scaled": "advantages"}, whiten(by_token * plain, mask), by_token * plain + values),
        ({"scaled": "rewards"}, whiten(outside, mask), outside_targets),
        ({"scaled": "rewards", "kl_inside": True}, whiten(inside, mask), inside_targets),
    ]
    for switches, advantages, targets in cases:
        for critic_targets, expected in ((False, returns), (True, targets)):
            got = rollout.advantages(RobustPPO("A", critic_targets=critic_targets, **switches), c)
            assert_close(got[0], advantages)
            assert_close(got[1], expected)


@each_set
def test_version_b_is_the_hook(rollout: Rollout, ambiguity: object) -> None:
    ratio = prompt_ratio(rollout.scores, ambiguity, groups=rollout.groups)
    losses = rollout.losses(RobustPPO("B"), torch.ones(12)) * 1
    Reweighter(ambiguity, pool="batch")(losses, scores=rollout.scores, groups=rollout.groups).mean().backward()
    assert_close(rollout.theta.grad, rollout.gradient(RobustPPO("B"), ratio), rtol=1e-6, atol=1e-8)


# --- the adversary ---


@each_set
def test_ratio_is_constant_within_a_prompt_and_over_their_means(rollout: Rollout, ambiguity: object) -> None:
    ratio = prompt_ratio(rollout.scores, ambiguity, groups=rollout.groups)
    assert torch.equal(ratio.view(4, 3), ratio.view(4, 3)[:, :1].expand(4, 3))
    over_prompts = ambiguity.solve(rollout.scores.view(4, 3).mean(1)).ratio
    assert_close(ratio.view(4, 3)[:, 0], over_prompts.float())
    alone = prompt_ratio(rollout.scores, ambiguity)
    assert_close(alone, ambiguity.solve(rollout.scores).ratio.float())
    assert not torch.equal(alone, ratio)


@each_set
def test_a_pool_gives_the_same_ratio_as_its_set(rollout: Rollout, ambiguity: object) -> None:
    reweighter = Reweighter(ambiguity, pool="batch")
    with torch.no_grad():
        pooled = prompt_ratio(rollout.scores, reweighter, groups=rollout.groups)
    assert_close(pooled, prompt_ratio(rollout.scores, ambiguity, groups=rollout.groups))


def test_a_memory_lets_small_rollouts_compete() -> None:
    reweighter = Reweighter(CVaR(0.2))
    scores = torch.rand(256, generator=torch.Generator().manual_seed(0))
    for part in scores.split(32):
        prompt_ratio(part, reweighter)
        reweighter.step()
    low, high = (prompt_ratio(torch.tensor([score]), reweighter).item() for score in (0.1, 0.95))
    assert low == 0 and high == pytest.approx(5)


def test_scores_with_the_penalty_inside_and_outside() -> None:
    rewards, kl = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 20.0])
    outside, inside = prompt_scores(rewards), prompt_scores(rewards, kl, beta=0.1)
    assert_close(outside, torch.tensor([-1.0, -2.0]))
    assert_close(inside, torch.tensor([-1.0, 0.0]))
    assert outside.argmax() == 0 and inside.argmax() == 1


def test_nan_scores_never_become_weights() -> None:
    scores = torch.tensor([0.0, torch.nan, 1.0])
    assert prompt_ratio(scores, ChiSquare(0.5)).isnan().all()
    assert prompt_ratio(scores, Reweighter(ChiSquare(0.5), pool="batch")).isnan().any()


# --- wrong use ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": "C"}, "version must be 'B' or 'A', got 'C'"),
        ({"version": "A", "scaled": "values"}, "scaled must be 'whitened' or 'advantages' or 'rewards', got 'values'"),
        ({"version": "B", "scaled": "rewards"}, 'version must be "A" for the switches of RobustPPO('),
        ({"version": "B", "critic_targets": True}, 'version must be "A"'),
        ({"version": "A", "kl_inside": True}, "scaled must be \"rewards\" with kl_inside=True, got 'whitened'"),
    ],
)
def test_switches_that_do_not_go_together(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RobustPPO(**arguments)


def test_arguments_that_are_refused(rollout: Rollout) -> None:
    with pytest.raises(TypeError, match=r"ambiguity must be an ambiguity set or a Reweighter, got 0\.1"):
        prompt_ratio(rollout.scores, 0.1)
    with pytest.raises(TypeError, match="groups must be integer ids"):
        prompt_ratio(rollout.scores, CVaR(0.5), groups=rollout.scores)
    with pytest.raises(ValueError, match=r"kl must be given with beta=0.1, got None"):
        prompt_scores(rollout.rewards, beta=0.1)
    with pytest.raises(ValueError, match=re.escape("ratio must have the shape of rewards (12,), got (3,)")):
        rollout.advantages(RobustPPO("A"), torch.ones(3))
    with pytest.raises(ValueError, match=re.escape("ratio must have the shape of token_losses (12,), got (3,)")):
        RobustPPO("B").losses(rollout.values, rollout.mask, torch.ones(3))


def test_sequence_means_are_what_is_scaled(rollout: Rollout) -> None:
    ratio = torch.linspace(0, 2, 12, dtype=torch.float64)
    expected = ratio * sequence_mean(rollout.values, rollout.mask)
    assert_close(RobustPPO("B").losses(rollout.values, rollout.mask, ratio), expected)


@pytest.mark.parametrize("ppo", [RobustPPO("B"), *DIFFERENT], ids=str)
@pytest.mark.parametrize("option", [{"discount": 0.5}, {"trace": 0.5}], ids=str)
def test_discount_and_trace_reach_the_advantages(rollout: Rollout, ppo: RobustPPO, option: dict[str, float]) -> None:
    given = rollout.rewards, rollout.kl, rollout.values, rollout.mask, torch.linspace(0.5, 1.5, 12)
    for plain, changed in zip(ppo.rollout(*given), ppo.rollout(*given, **option), strict=True):
        assert not torch.allclose(plain, changed)
