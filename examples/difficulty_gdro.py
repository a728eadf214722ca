"""Prompt-GDRO on bins of difficulty, with the methods that ppo.py asks a `Reweighter` for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from robustgrad.baselines import DifficultyBins, PromptGDRO


class DifficultyGDRO:
    """arXiv 2601.19280, its first adversary: prompts that the policy seldom solves weigh more.

    Args:
        solved: a response of at least this reward solves its prompt.
    """

    def __init__(self, solved: float) -> None:
        self.solved, self.bins, self.gdro = solved, DifficultyBins(10), PromptGDRO(10)

    def ratio(self, scores: Tensor, *, groups: Tensor) -> Tensor:
        return self.gdro.ratio(scores, self.bins.update(groups, scores <= -self.solved))

    def step(self) -> None:
        """Nothing: every rollout moves the scores."""

    def state_dict(self) -> dict[str, Any]:
        return {"bins": self.bins.state_dict(), "gdro": self.gdro.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bins.load_state_dict(state["bins"])
        self.gdro.load_state_dict(state["gdro"])

    def __str__(self) -> str:
        return f"Prompt-GDRO, solved at {self.solved:g}"
