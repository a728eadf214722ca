"""Robust PPO: the adversary shifts the prompts, and its ratio enters the advantages (A) or the policy loss (B)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from . import _checks
from .ambiguity import AmbiguitySet, group_means
from .ambiguity._problem import wide_dtype
from .objectives import generalized_advantages, penalised_rewards, sequence_mean, whiten
from .reweighter import Reweighter


def prompt_scores(rewards: Tensor, kl: Tensor | None = None, *, beta: float = 0.0) -> Tensor:
    """What the adversary maximises, (n,), higher is worse:  -reward,  or  -(reward - beta KL).

    Args:
        rewards: (n,) of the responses.
        kl: (n,) estimate of log pi/pi_ref of the whole response: the penalty is inside the score. None
            leaves it outside.
        beta: >= 0, its price.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range.
    Source: arXiv 2503.00539, Algorithm 2, with V_i = E[r - beta log pi/pi_ref].

    >>> import torch
    >>> prompt_scores(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 0.0]), beta=0.1)
    tensor([-0.5000, -2.0000])
    """
    _checks.per_sample("rewards", rewards)
    _checks.number("beta", beta, 0.0, torch.inf, "It is the price of the KL.")
    if kl is None:
        if beta != 0:
            raise ValueError(f"kl must be given with beta={beta!r}, got None. Pass log pi/pi_ref of each response.")
        return -rewards.detach()
    _checks.same_samples("kl", kl, "rewards", rewards)
    return beta * kl.detach() - rewards.detach()


def prompt_ratio(scores: Tensor, ambiguity: AmbiguitySet | Reweighter, *, groups: Tensor | None = None) -> Tensor:
    """Ratio of every response of a rollout, (n,), mean 1: what its advantage or its policy loss is scaled by.

    Args:
        scores: (n,) what the adversary maximises (see `prompt_scores`).
        ambiguity: a set, solved over the scores given and nothing else, or a `Reweighter`, whose memory
            lets small rollouts compete with recent ones, and which sees all ranks.
        groups: (n,) integer id of the prompt of each response: the worst case is then over prompts, not over
            lucky and unlucky responses. Hand over all responses to a prompt in one call.
    Returns: (n,) float32, detached.
    Raises: TypeError or ValueError: an argument of another shape, type or device.
    Source: arXiv 2503.00539, PPO: the multiplier of response i is n q*_i.

    >>> import torch
    >>> from robustgrad import CVaR
    >>> prompt_ratio(torch.tensor([0.0, 4.0, 3.0, 3.0]), CVaR(0.5), groups=torch.tensor([0, 0, 1, 1]))
    tensor([0., 0., 2., 2.])
    """
    _checks.per_sample("scores", scores)
    scores = scores.detach()
    if isinstance(ambiguity, Reweighter):
        return ambiguity.ratio(scores, groups=groups).float()
    if not isinstance(ambiguity, AmbiguitySet):
        raise TypeError(f"ambiguity must be an ambiguity set or a Reweighter, got {ambiguity!r}. Use CVaR(0.5).")
    if groups is not None:
        _checks.integer_ids(groups, scores)
        scores = group_means(scores.to(wide_dtype(scores.device)), groups)
    return ambiguity.solve(scores).ratio.float()


@dataclass(frozen=True)
class RobustPPO:
    """Where the ratio of a prompt enters PPO.

    Version B scales the policy loss of each response. Version A scales what the policy loss is made of:

        scaled="whitened"      c * whiten(A)                   the same gradient as B, exactly
        scaled="advantages"    whiten(c * A)
        scaled="rewards"       whiten(A of c * rewards)        and of -beta KL too where `kl_inside`

    The clipped surrogate is positively homogeneous in the advantage: that is why scaling after whitening
    equals B. Before it, whitening mixes the prompts and undoes a part of the ratio.

    Args:
        version: "A" or "B".
        scaled: what version A scales.
        critic_targets: the critic learns the scaled returns (A only). Otherwise the plain ones.
        kl_inside: the KL penalty of the tokens is scaled with the reward (A with "rewards" only).
    Raises: ValueError: a name that is none of these, or a switch that the version does not have.
    Source: arXiv 2503.00539, PPO versions A and B; the paper leaves the switches open.

    >>> import torch
    >>> ppo, mask = RobustPPO("B"), torch.ones(2, 1, dtype=torch.bool)
    >>> ppo.losses(torch.tensor([[-1.0], [-1.0]]), mask, torch.tensor([0.5, 1.5]))
    tensor([-0.5000, -1.5000])
    """

    version: Literal["A", "B"] = "B"
    _: KW_ONLY
    scaled: Literal["whitened", "advantages", "rewards"] = "whitened"
    critic_targets: bool = False
    kl_inside: bool = False

    def __post_init__(self) -> None:
        _checks.choice("version", self.version, ("B", "A"))
        _checks.choice("scaled", self.scaled, ("whitened", "advantages", "rewards"))
        if self.version == "B" and (self.scaled != "whitened" or self.critic_targets or self.kl_inside):
            raise ValueError(f'version must be "A" for the switches of {self}. Version B scales the policy loss alone.')
        if self.kl_inside and self.scaled != "rewards":
            raise ValueError(f'scaled must be "rewards" with kl_inside=True, got {self.scaled!r}. Leave kl_inside out.')

    def rollout(
        self,
        rewards: Tensor,
        kl: Tensor,
        values: Tensor,
        mask: Tensor,
        ratio: Tensor,
        *,
        discount: float = 1.0,
        trace: float = 0.95,
    ) -> tuple[Tensor, Tensor]:
        """Advantages for the policy, whitened over the rollout, and targets for the critic.

        Args:
            rewards: (n,) of the responses.
            kl: (n, T) penalty of every token in units of the reward (beta times `kl_estimate`); zeros where
                the KL is in the loss.
            values: (n, T) of the critic.
            mask: (n, T) bool, True on the tokens of the response.
            ratio: (n,) from `prompt_ratio`.
            discount, trace: as in `generalized_advantages`.
        Returns: (n, T) each, detached; 0 on padding in the advantages.
        """
        _checks.same_samples("ratio", ratio, "rewards", rewards)
        tokens = penalised_rewards(rewards, kl, mask, beta=1.0)
        plain, targets = generalized_advantages(tokens, values, mask, discount=discount, trace=trace)
        if self.version == "B":
            return whiten(plain, mask), targets
        by_token = ratio.detach().unsqueeze(-1)
        scaled, scaled_targets = by_token * plain, by_token * plain + torch.where(mask, values.detach(), 0.0)
        if self.scaled == "rewards":
            tokens = by_token * tokens if self.kl_inside else penalised_rewards(ratio * rewards, kl, mask, beta=1.0)
            scaled, scaled_targets = generalized_advantages(tokens, values, mask, discount=discount, trace=trace)
        advantages = by_token * whiten(plain, mask) if self.scaled == "whitened" else whiten(scaled, mask)
        return advantages, scaled_targets if self.critic_targets else targets

    def losses(self, token_losses: Tensor, mask: Tensor, ratio: Tensor) -> Tensor:
        """Policy loss of every response, (n,): the token mean, scaled by the ratio in version B.

        Args:
            token_losses: (n, T) from `clipped_surrogate` (and the KL where it is in the loss).
            mask: (n, T) bool.
            ratio: (n,) from `prompt_ratio`.
        With a `Reweighter` the hook does the same: `reweighter(losses, scores=..., groups=...)`.
        """
        losses = sequence_mean(token_losses, mask)
        _checks.same_samples("ratio", ratio, "token_losses", losses)
        return ratio.detach() * losses if self.version == "B" else losses
