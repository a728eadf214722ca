"""Multi-adversary group DRO on bins of difficulty, with the methods that ppo.py asks a `Reweighter` for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from robustgrad.baselines import DifficultyBins, PromptGDRO, RolloutGDRO


class OnDifficulty:
    """An adversary over bins of prompts that the policy solves equally often; its state is part of a checkpoint.

    Args:
        gdro: the adversary, over 10 bins.
        solved: a response of at least this reward solves its prompt.
    """

    def __init__(self, gdro: PromptGDRO | RolloutGDRO, solved: float) -> None:
        self.solved, self.bins, self._adversary = solved, DifficultyBins(10), gdro

    def step(self) -> None:
        """Nothing: every rollout moves the scores."""

    def state_dict(self) -> dict[str, Any]:
        return {"bins": self.bins.state_dict(), "gdro": self._adversary.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bins.load_state_dict(state["bins"])
        self._adversary.load_state_dict(state["gdro"])


class DifficultyGDRO(OnDifficulty):
    """arXiv 2601.19280, its first adversary: prompts that the policy seldom solves weigh more."""

    def __init__(self, solved: float) -> None:
        self.gdro = PromptGDRO(10)
        super().__init__(self.gdro, solved)

    def ratio(self, scores: Tensor, *, groups: Tensor) -> Tensor:
        return self.gdro.ratio(scores, self.bins.update(groups, scores <= -self.solved))

    def __str__(self) -> str:
        return f"Prompt-GDRO, solved at {self.solved:g}"
