"""Every objective under every ambiguity set: the gradient against a hand-written weighted sum in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, TotalVariation, robust_loss
from robustgrad.baselines import dpo_pro
from robustgrad.objectives import (
    bradley_terry,
    clipped_surrogate,
    dpo,
    flip_corrected_dpo,
    group_advantages,
    hinge_dpo,
    ipo,
    kl_estimate,
    rebel,
    sequence_log_probs,
    sequence_mean,
    simpo,
    token_log_probs,
    value_loss,
)

SETS = [
    TotalVariation(0.3), TotalVariation(penalty=0.2), TotalVariation(0.3, cap=2.0), ChiSquare(0.3),
    ChiSquare(penalty=0.5), KL(0.3), KL(temperature=0.5), CVaR(0.4),
]  # fmt: skip


class Data:
    """A small language model in float64 (embedding, then logits), pairs of responses, and a rollout."""

    def __init__(self, n: int = 10, length: int = 5) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 12)).double()
        self.tokens = torch.randint(11, (2 * n, length))
        self.mask = torch.arange(length) < torch.randint(2, length + 1, (2 * n, 1))
        self.reference = sequence_log_probs(self.logits(), self.tokens, self.mask).detach() + torch.randn(2 * n)
        self.noise = 0.3 * torch.randn(2 * n, length - 1, dtype=torch.float64)
        self.rewards = torch.randn(2 * n, dtype=torch.float64)

    def logits(self) -> Tensor:
        return self.model(self.tokens)[..., :11]

    def values(self) -> Tensor:
        return self.model(self.tokens)[..., 11]

    def pairs(self, *, average: bool = False) -> tuple[Tensor, Tensor]:
        chosen, rejected = sequence_log_probs(self.logits(), self.tokens, self.mask, average=average).chunk(2)
        return chosen, rejected

    def with_reference(self) -> tuple[Tensor, ...]:
        return (*self.pairs(), *self.reference.chunk(2))

    def surrogate(self, *, kl: float = 0.0) -> Tensor:
        log_probs = token_log_probs(self.logits(), self.tokens)
        old = (log_probs + self.noise).detach()
        advantages = group_advantages(self.rewards, torch.arange(20) // 4)
        losses = clipped_surrogate(log_probs, old, advantages) + kl * kl_estimate(log_probs, old)
        return sequence_mean(losses, self.mask[:, 1:])

    def critic(self) -> Tensor:
        values = self.values()
        losses = value_loss(values, (values + 0.1).detach(), self.rewards[:, None].expand_as(values))
        return sequence_mean(losses, self.mask)


OBJECTIVES: dict[str, Callable[[Data], Tensor]] = {
    "bradley_terry": lambda d: bradley_terry(*d.values()[:, -1].chunk(2), margin=0.1, label_smoothing=0.1),
    "dpo": lambda d: dpo(*d.with_reference()),
    "conservative dpo": lambda d: dpo(*d.with_reference(), label_smoothing=0.1),
    "hinge_dpo": lambda d: hinge_dpo(*d.with_reference(), beta=0.5),
    "ipo": lambda d: ipo(*d.with_reference(), beta=0.5),
    "flip_corrected_dpo": lambda d: flip_corrected_dpo(*d.with_reference(), flip_rate=0.2),
    "simpo": lambda d: simpo(*d.pairs(average=True), margin=0.3),
    "dpo_pro": lambda d: dpo_pro(*d.with_reference(), torch.linspace(0.5, 1, 10, dtype=torch.float64), radius=0.2),
    "rebel": lambda d: rebel(*d.with_reference(), d.rewards[:10] - d.rewards[10:], eta=0.5),
    "rebel as released": lambda d: rebel(
        *d.with_reference(), d.rewards[:10] - d.rewards[10:], eta=0.5, scale="log_prob"
    ),
    "ppo": lambda d: d.surrogate(),
    "grpo with KL": lambda d: d.surrogate(kl=0.1),
    "value_loss": lambda d: d.critic(),
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)


def gradients(outputs: Tensor, model: nn.Module) -> Tensor:
    parts = torch.autograd.grad(outputs, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def naive(losses: Tensor, weights: Tensor, model: nn.Module) -> Tensor:
    """sum_i q_i grad loss_i, one sample at a time."""
    total = torch.zeros(())
    for weight, loss in zip(weights, losses, strict=True):
        total = total + weight * gradients(loss, model)
    return total


@each_objective
@each_set
def test_gradient_through_the_hook_and_through_the_value(
    objective: Callable[[Data], Tensor], ambiguity: AmbiguitySet
) -> None:
    data = Data()
    losses = objective(data)
    assert losses.dtype == torch.float64 and losses.dim() == 1
    expected = naive(losses, ambiguity.solve(losses).weights, data.model)
    assert expected.norm() > 1e-6
    assert_close(gradients(robust_loss(losses, ambiguity), data.model), expected, rtol=1e-6, atol=1e-9)
    hooked = Reweighter(ambiguity, pool="batch")(objective(data))
    assert_close(gradients(hooked.mean(), data.model), expected, rtol=1e-6, atol=1e-9)


@each_objective
def test_float32_agrees_with_float64(objective: Callable[[Data], Tensor]) -> None:
    data = Data()
    wide = objective(data)
    expected = gradients(wide.mean(), data.model)
    data.model.float()
    losses = objective(data)
    got = gradients(losses.mean(), data.model)
    assert_close(losses.double(), wide, rtol=1e-4, atol=1e-5)
    assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
