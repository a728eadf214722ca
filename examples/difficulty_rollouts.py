"""Rollout-GDRO on bins of difficulty: how many responses each prompt gets, with what ppo.py asks a `Reweighter` for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from difficulty_gdro import OnDifficulty
from rollouts import Prompt
from torch import Tensor

from robustgrad.baselines import RolloutGDRO


class DifficultyRollouts(OnDifficulty):
    """arXiv 2601.19280, its second adversary: from 2 to three times `mean` responses, `mean` on average.

    The mean reward of a prompt is expected to be the same for any number of responses. What falls with it is the
    squared error of that mean, var(rewards) / n: the paper's variance proxy, and the loss of the bandits here.

    Args:
        solved: a response of at least this reward solves its prompt.
        mean: at least 2; 4 has the bounds of the paper.
    """

    def __init__(self, solved: float, mean: int) -> None:
        self.gdro = RolloutGDRO(10, mean=mean, low=2, high=3 * mean)
        super().__init__(self.gdro, solved)

    def responses(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many to draw to each prompt of the next rollout."""
        self.counts = self.gdro.counts(self.bins.look_up([prompt.number for prompt in prompts]))
        return self.counts.tolist()

    def ratio(self, scores: Tensor, *, groups: Tensor) -> Tensor:
        """Learn from the rollout, then weigh its responses so that no prompt counts more for having many."""
        errors = torch.stack([prompt.var() / len(prompt) for prompt in scores.split(self.counts.tolist())])
        self.gdro.update(errors.cpu().repeat_interleave(self.counts), self.bins.look_up(groups))
        self.bins.update(groups, scores <= -self.solved)
        return (self.gdro.mean / self.counts).repeat_interleave(self.counts).to(scores)

    def __str__(self) -> str:
        return f"Rollout-GDRO, {self.gdro.low} to {self.gdro.high} responses, solved at {self.solved:g}"
