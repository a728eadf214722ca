"""A memory of recent losses: what makes small calls robust."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._units import Units
from .ambiguity import AmbiguitySet, Rule, WorstCase
from .ambiguity.base import Problem
from .pool import Pool, Samples

ENOUGH = 64  # remembered losses; fewer carry no rule


class MemoryPool(Pool):
    """Each loss competes with the last few hundred.

    The remembered losses are fitted once per optimizer step as a rule, and each new loss gets its ratio
    from the rule. Memory, units and rule change only between steps, all at once and symmetrically in the
    step's samples, so that no cut of a step into calls can matter. Below 64 remembered losses there is no
    rule: a call of at least 64 samples is solved on itself, a smaller one gets ratio 1.

    Args:
        memory: how many losses to remember; None chooses by the set and the samples per step.
    """

    def __init__(self, ambiguity: AmbiguitySet, memory: int | None = None) -> None:
        super().__init__(ambiguity)
        self._memory = memory
        self._step_size = 0
        self._units: Units | None = None
        self._remembered: Samples | None = None
        self._sampled: Tensor | None = None  # samples of the last step that counted
        self._rule: Rule | None = None
        self._scores: Tensor | None = None  # remembered scores, or means of their groups
        self._filled: Tensor | None = None

    def check(self, samples: Samples) -> None:
        earlier = self._step[-1] if self._step else self._remembered
        if earlier is not None and (earlier.groups is None) != (samples.groups is None):
            given, before = ("given", "left out") if earlier.groups is None else ("left out", "given")
            raise ValueError(
                f"groups must be given in every call or in none while losses are remembered, got groups "
                f"{given} after calls with groups {before}. Use a Reweighter of its own for each kind of call."
            )

    def _capacity(self) -> int:
        return self._memory or self.ambiguity.memory_size(self._step_size)

    def _ends_unmarked(self) -> bool:
        return self._waiting() >= self._capacity() // 4

    def _finish_step(self) -> None:
        step = Samples.join(self._step).counted()
        self._step_size = len(step.scores)
        if self._units is None:
            self._units = Units.new(step.scores)
        self._units.update(step.scores, step.weights)
        self._remember(step._replace(scores=self._units.into(step.scores)))
        self._sampled = (step.weights > 0).sum(dtype=step.scores.dtype)
        self._fit()

    def _remember(self, new: Samples) -> None:
        both = new if self._remembered is None else Samples.join([self._remembered, new])
        # What does not count goes first, in order otherwise: a queue that drops without knowing how many.
        order = (both.weights > 0).byte().argsort(stable=True)
        self._remembered = both.at(order[-self._capacity() :])

    def _fit(self) -> None:
        weights = self._remembered.weights
        self._scores = self._remembered.grouped()
        self._filled = (weights > 0).sum() >= ENOUGH
        self._rule = self.ambiguity.fit(
            self._scores, weights, unit=self._units.spread, step_size=self._sampled.clamp_min(1.0)
        )

    def _ratio(self, samples: Samples) -> Tensor:
        scores, weights = samples.grouped(), samples.weights
        if self._rule is None:
            ratio = self._on_itself(scores, samples.weight)
        else:
            ratio = self._rule.ratio(self._standardised(scores, samples), weights)
            if not self._surely_filled():
                ratio = torch.where(self._filled, ratio, self._on_itself(scores, samples.weight))
        sound = (scores < torch.inf) & (weights >= 0) & (weights < torch.inf)
        return torch.where(weights == 0, 0.0, torch.where(sound, ratio, torch.nan))

    def _surely_filled(self) -> bool:
        # On the CPU looking costs no sync; elsewhere both answers are computed and the right one is taken.
        return self._filled.is_cpu and bool(self._filled)

    def _on_itself(self, scores: Tensor, weight: Tensor | None) -> Tensor:
        if len(scores) < ENOUGH:
            return torch.ones_like(scores)
        return self.ambiguity.solve_unchecked(scores, weight).wide_ratio

    def _standardised(self, scores: Tensor, samples: Samples) -> Tensor:
        """In the units of the memory; a group that is remembered counts with its remembered mean."""
        own = self._units.into(scores)
        if samples.groups is None:
            return own
        weights = self._remembered.weights
        member = (samples.groups[:, None] == self._remembered.groups) & (weights > 0)
        first = member.byte().argmax(-1)
        # A sample that is not finite stays visible as such.
        return torch.where(member.any(-1) & own.isfinite(), self._scores[first], own)

    def _competing(self) -> WorstCase:
        if self._rule is None:
            last = self._step[-1].counted()
            return self.ambiguity.solve_unchecked(last.grouped(), last.weight)
        # What the rule gives, rather than the exact solution, which it differs from where a set is capped.
        problem = Problem.unchecked(self._units.out_of(self._scores), self._remembered.weights)
        ratio = self._rule.ratio(self._scores, self._remembered.weights)
        return WorstCase(self.ambiguity, problem, problem.finish(ratio / problem.expect(ratio)))

    def _size(self) -> Tensor:
        pool = self._step[-1].counted() if self._remembered is None else self._remembered
        return (pool.weights > 0).sum()

    def _plain(self) -> Tensor:
        alone = torch.tensor(len(self._step[-1].scores) < ENOUGH, device=self._device)
        return alone if self._rule is None else alone & ~self._filled

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        if self._remembered is not None:
            self._remembered, self._units = self._remembered.to(device), self._units.to(device)
            self._sampled = self._sampled.to(device)
            self._fit()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"step_size": self._step_size, "remembered": {}}
        if self._remembered is not None:
            remembered = {k: x for k, x in self._remembered._asdict().items() if x is not None}
            state |= {"remembered": remembered, "sampled": self._sampled, "units": self._units.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._step_size = state["step_size"]
        self._remembered = self._units = self._sampled = self._rule = self._scores = self._filled = None
        if state["remembered"]:
            self._remembered = Samples(**{k: x.clone() for k, x in state["remembered"].items()})
            self._units = Units(**{k: x.clone() for k, x in state["units"].items()})
            self._sampled = state["sampled"].clone()
            self._fit()
