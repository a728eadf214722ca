"""Policy-gradient trainers: the ratio multiplies the advantages of a whole rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ambiguity import AmbiguitySet
from . import _columns
from .hf_trainer import RobustTrainer

_PER_STEP = 2**24  # prompts in the rollouts of one optimizer step

Of = str | Callable[[list[dict[str, Any]]], Tensor] | None


class RolloutTrainer(RobustTrainer):
    """GRPO and RLOO: the adversary picks prompts, by minus their mean reward.

    The loss is positively homogeneous in the advantage, so scaling the advantage of a completion is
    reweighting its loss; a KL term in the loss keeps its own weight. The losses themselves would not do:
    advantages are centred by prompt, so that no prompt has a larger mean loss than another.
    """

    patched = (*RobustTrainer.patched, "_calculate_rewards", "_generate_and_score_completions")

    def __init__(
        self, trainer: Any, ambiguity: AmbiguitySet, *, scores: Of = None, groups: Of = None, **options: Any
    ) -> None:
        # All samples of the step are in the rollout: no second pass, least of all a second generation.
        pool = options.pop("pool", "memory")
        super().__init__(trainer, ambiguity, pool="batch" if pool == "window" else pool, **options)
        self.scores, self.groups = scores, groups
        self.rewards = torch.empty(0)
        self.prompts = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.prompts = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        calls = self.calls
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.calls = calls  # one rollout may serve several steps

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = self.original["_calculate_rewards"](*args, **kwargs)
        weighted = (rewards * self.trainer.reward_weights.to(rewards.device)).nansum(-1)
        self.rewards = torch.where(rewards.isnan().all(-1), torch.nan, weighted)  # of all ranks
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Before anything shuffles the rows.
        rollout: dict[str, Any] = self.original["_generate_and_score_completions"](inputs)
        if self.trainer.model.training:
            advantages = rollout["advantages"]
            ratio = self._ratio(inputs, advantages.device).to(advantages.dtype)
            rollout["advantages"] = advantages * ratio.reshape(-1, *[1] * (advantages.dim() - 1))
            self.calls += 1
        return rollout

    def _ratio(self, inputs: list[dict[str, Any]], device: torch.device) -> Tensor:
        start = self.trainer.accelerator.process_index * len(inputs)
        rewards = self.rewards[start : start + len(inputs)].to(device)
        scores = -rewards if self.scores is None else self._values(self.scores, inputs).to(device)
        groups = self._prompts(start, len(inputs)) if self.groups is None else self._values(self.groups, inputs)
        ratio = self.reweighter.ratio(scores, groups=groups.to(device), mask=~scores.isnan())
        self.reweighter.step()
        return ratio

    def _prompts(self, start: int, n: int) -> Tensor:
        """An id for each prompt of the rollout, the same on all ranks and never used again."""
        per_prompt: int = self.trainer.num_generations
        first: int = self.trainer.state.global_step * _PER_STEP + self.prompts
        self.prompts = (self.prompts + n * self.trainer.accelerator.num_processes) % _PER_STEP
        return torch.arange(start, start + n) // per_prompt + first

    def _values(self, of: Any, inputs: list[dict[str, Any]]) -> Tensor:
        if isinstance(of, str):
            return _columns.tensor(of, [row.get(of) for row in inputs])
        values: Tensor = of(inputs)
        return values
