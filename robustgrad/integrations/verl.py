"""verl: advantage estimators and policy losses with an adversary, chosen by name in its configuration.

Nothing to import: verl finds this module by itself once robustgrad is installed beside it (or with
`VERL_USE_EXTERNAL_MODULES=robustgrad.integrations.verl`, on every node). Over prompts, on the driver, for
every estimator of verl that needs no critic (`robust_grpo`, `robust_rloo`, ...):

    python -m verl.trainer.main_ppo ... algorithm.adv_estimator=robust_grpo \
        +algorithm.robustgrad.ambiguity=TotalVariation +algorithm.robustgrad.radius=0.1

Over responses, in the workers, by their policy loss (`robust_vanilla`, `robust_gspo`, ...), for runs with a
critic, whose advantages verl hands to no estimator:

    python -m verl.trainer.main_ppo ... actor_rollout_ref.actor.policy_loss.loss_mode=robust_vanilla \
        actor_rollout_ref.actor.policy_loss._target_=robustgrad.integrations.verl.PolicyLossConfig \
        +actor_rollout_ref.actor.policy_loss.robustgrad.ambiguity=ChiSquare \
        +actor_rollout_ref.actor.policy_loss.robustgrad.radius=0.5
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reweighter import Reweighter
from . import _config

try:
    from verl.trainer.ppo import core_algos
    from verl.workers.config import actor
except ImportError as error:
    raise ImportError("verl is missing. Install it as its own documentation says.") from error

__all__ = ["PolicyLossConfig", "RobustAdvantages", "RobustPolicyLoss"]

_OPTIONS = ("pool", "memory", "on_nonfinite")
# Estimators that verl calls by their name, with more than it hands to one of another name.
_BY_NAME = {"gae", "remax", "gdpo", "optimal_token_baseline", "tir_optimal_token_baseline"}


class RobustAdvantages:
    """An advantage estimator of verl, times the ratio of each prompt.

        advantage of response i  *  q_g / p_g,      g the prompt of i
        max_{q in ambiguity}  sum_g q_g (-mean reward of prompt g)

    The policy loss is positively homogeneous in the advantage, so this is the policy gradient of the worst
    case over prompts; a KL or entropy term in the loss keeps its own weight, a KL in the reward counts as
    reward. Called on verl's driver with the whole batch: no collectives, and any cut into mini-batches,
    micro-batches and ranks gives the same gradient.

    Args:
        name: of the registered estimator, e.g. "grpo". One of your own:
            `register_adv_est("robust_mine")(RobustAdvantages("mine"))`.
    Raises: ValueError: verl calls this estimator by its name with more than others get; when called, an
        `algorithm.robustgrad` that is missing or wrong.

    `algorithm.robustgrad` holds the set (`ambiguity` and its numbers) and, if need be, `pool`, `memory` and
    `on_nonfinite` of `Reweighter`. The default pool is "batch": all prompts of the batch, solved exactly, with
    nothing to save. "memory" also competes with earlier batches, and starts empty when a run is resumed.
    Source: arXiv 2503.00539, PPO version A.
    """

    def __init__(self, name: str) -> None:
        if name in _BY_NAME:
            raise ValueError(
                f"name must not be {name!r}: verl hands its arguments to the estimator of that name only. "
                f"{'Use loss_mode=robust_vanilla.' if name == 'gae' else 'Use robust_grpo or robust_rloo.'}"
            )
        self.name = name
        self.reweighter: Reweighter | None = None
        self._prompts = 0

    def __call__(
        self, token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Advantages times the ratio, and the returns as they are, both (b, t).

        Args:
            token_level_rewards: (b, t), summed to the reward of a response.
            response_mask: (b, t); rows without a token are placeholders, which have no say.
            index: (b,) the `uid` of each response's prompt.
            config: verl's `algorithm` section.
            more: whatever else the estimator takes.
        """
        self.reweighter = self.reweighter or _reweighter(config, "algorithm.robustgrad", pool="batch")
        rewards = token_level_rewards.sum(-1)  # before the estimator, which may write into its own
        if self.name == "grpo":
            # What verl itself hands to the estimator of this name.
            more["norm_adv_by_std_in_grpo"] = config.get("norm_adv_by_std_in_grpo", True)
        estimate = core_algos.get_adv_estimator_fn(self.name)
        advantages, returns = estimate(
            token_level_rewards=token_level_rewards, response_mask=response_mask, index=index, config=config, **more
        )
        groups = self._groups(index).to(rewards.device)
        ratio = self.reweighter.ratio(-rewards, groups=groups, mask=response_mask.bool().any(-1))
        self.reweighter.step()
        return advantages * ratio.to(advantages.dtype).unsqueeze(-1), returns

    def _groups(self, index: Any) -> Tensor:
        """An integer id for each prompt of the batch, never used again: verl's are texts."""
        _, ids = np.unique(np.asarray(index).astype(str), return_inverse=True)
        groups = torch.as_tensor(ids) + self._prompts
        self._prompts += len(ids)
        return groups


@dataclass
class PolicyLossConfig(actor.PolicyLossConfig):  # type: ignore[misc]  # verl has no types here
    """verl's own, with a place for the ambiguity set: `robustgrad: {ambiguity: ChiSquare, radius: 0.5}`."""

    robustgrad: dict[str, Any] = field(default_factory=dict)


class RobustPolicyLoss:
    """A policy loss of verl that follows the worst case over responses, by their own policy loss.

    The loss is the one of that name, its value and metrics unchanged, `config.global_batch_info` and the
    aggregation included; the gradient of each response is multiplied by its ratio. On policy the loss of a
    response is minus its advantage: after a critic that says where the policy does worse than expected;
    after GRPO it says nothing about prompts, and `RobustAdvantages` is the better place.

    Args:
        name: of the registered policy loss, e.g. "vanilla". One of your own:
            `register_policy_loss("robust_mine")(RobustPolicyLoss("mine"))`.
    Raises: ValueError: when called, a `policy_loss.robustgrad` that is missing or wrong, or the Megatron
        strategy, where pipeline ranks without a loss would be waited for.

    The default pool is the memory. Workers are not told of optimizer steps, so it takes in what it has seen
    after every quarter of its size, and on several ranks exchanges losses once per micro-batch.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.reweighter: Reweighter | None = None

    def __call__(self, *, log_prob: Tensor, config: Any, **arguments: Any) -> tuple[Tensor, dict[str, Any]]:
        if config.strategy == "megatron":
            raise ValueError(
                "actor.strategy must not be megatron with a robust policy loss, got megatron: pipeline ranks without "
                "a loss do not come to the exchange. Use algorithm.adv_estimator=robust_grpo."
            )
        self.reweighter = self.reweighter or _reweighter(config.policy_loss, "policy_loss.robustgrad", pool="memory")
        loss_fn = core_algos.get_policy_loss_fn(self.name)
        with self.reweighter.capture(rows=len(log_prob), samples=_samples(config.global_batch_info)) as capture:
            loss, metrics = loss_fn(log_prob=log_prob, config=config, **arguments)
            capture(loss)
        return loss, metrics


def _samples(info: dict[str, Any]) -> Any:
    """Over how many responses of this rank the loss is an average; None: those of the micro-batch."""
    total = info.get("global_batch_size")
    return None if total is None else total / info.get("dp_size", 1)


def _reweighter(config: Any, where: str, *, pool: str) -> Reweighter:
    ambiguity, options = _config.read(config.get("robustgrad"), _OPTIONS, where)
    return Reweighter(ambiguity, **options | {"pool": _config.one_pass(options.get("pool", pool), "verl")})


def _register(names: Any, register: Callable[[str], Any], robust: Callable[[str], Any]) -> None:
    for name in list(names):
        if not name.startswith("robust_"):
            register(f"robust_{name}")(robust(name))


_register(core_algos.ADV_ESTIMATOR_REGISTRY.keys() - _BY_NAME, core_algos.register_adv_est, RobustAdvantages)
_register(core_algos.POLICY_LOSS_REGISTRY, core_algos.register_policy_loss, RobustPolicyLoss)
