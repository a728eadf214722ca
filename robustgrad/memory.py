"""A memory of recent losses: what makes small calls robust."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _state_checks
from ._units import Units
from .ambiguity import AmbiguitySet, Rule, WorstCase
from .ambiguity._problem import Problem
from .distributed import Ranks
from .pool import Pool
from .samples import Samples
from .schedule import Schedule

ENOUGH = 64  # remembered losses; fewer carry no rule
_ROUNDING = 1e-12  # relative difference of equal losses that were put into other units and back


@dataclass(frozen=True, eq=False)
class _Memory:
    """What is known between two steps. `samples`, `units` and `sampled` determine the rest."""

    samples: Samples  # oldest first, standardised, weight 0 where not finite
    units: Units
    sampled: Tensor  # how many samples of the last step counted
    scores: Tensor  # those of the samples, or the means of their groups
    rule: Rule
    filled: Tensor

    @classmethod
    def fitted(cls, ambiguity: AmbiguitySet, samples: Samples, units: Units, sampled: Tensor) -> _Memory:
        scores, weights = samples.grouped(), samples.weights
        rule = ambiguity.fit(scores, weights, unit=units.spread, step_size=sampled.clamp_min(1.0))
        filled = ((weights > 0).sum() >= ENOUGH) & _vary(scores, weights, units)
        return cls(samples, units, sampled, scores, rule, filled)

    @property
    def surely_filled(self) -> bool:
        # On the CPU looking costs no sync; elsewhere both answers are computed and the right one is taken.
        return self.filled.is_cpu and bool(self.filled)

    def ratio(self, scores: Tensor, samples: Samples) -> Tensor:
        own = self.units.into(scores)
        if samples.groups is not None and self.samples.groups is not None:
            own = self._of_groups(own, samples.groups, self.samples.groups)
        return self.rule.ratio(own, 1.0 if samples.weight is None else samples.weight)

    def _of_groups(self, own: Tensor, groups: Tensor, remembered: Tensor) -> Tensor:
        """A group that is remembered counts with its remembered mean, whatever part of it a call holds."""
        member = (groups[:, None] == remembered) & (self.samples.weights > 0)
        first = member.byte().argmax(-1)
        # A sample that is not finite stays visible as such.
        return torch.where(member.any(-1) & own.isfinite(), self.scores[first], own)

    def worst_case(self, ambiguity: AmbiguitySet) -> WorstCase:
        """What the rule makes of the remembered losses: of the set itself, unless that is capped."""
        weights = self.samples.weights
        problem = Problem.unchecked(self.units.out_of(self.scores), weights)
        # A rule spreads over the weight of a loss that it meets; without weight there is nothing to spread over.
        ratio = torch.where(weights > 0, self.rule.ratio(self.scores, weights), 0.0)
        return WorstCase(ambiguity, problem, problem.finish(ratio / problem.expect(ratio)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples.state_dict(),
            "units": self.units.state_dict(),
            "sampled": self.sampled,
        }


def _vary(scores: Tensor, weights: Tensor, units: Units) -> Tensor:
    """Whether the remembered losses differ: equal ones say nothing about the order of others."""
    top = torch.where(weights > 0, scores, -torch.inf).amax()
    bottom = torch.where(weights > 0, scores, torch.inf).amin()
    return (top - bottom) * units.spread > _ROUNDING * units.level.abs()


class MemoryPool(Pool):
    """Each loss competes with the last few hundred, of all ranks.

    The remembered losses are fitted once per optimizer step as a rule, and each new loss gets its ratio
    from the rule. Memory, units and rule change only between steps, all at once and symmetrically in the
    step's samples, so that no cut of a step into calls or ranks can matter. Below 64 remembered losses, and
    while all of them are equal (the first step of DPO), there is no rule: a call of at least 64 samples is
    solved on itself where there is one rank, any other gets ratio 1.

    The ranks exchange the losses of a step once, when its end is marked; before the first mark, in each call.

    Args:
        memory: how many losses to remember; None chooses by the set and the samples per step.
    """

    def __init__(self, ambiguity: AmbiguitySet | Schedule, ranks: Ranks, memory: int | None = None) -> None:
        super().__init__(ambiguity, ranks)
        self._size_asked = memory
        self._step_size = 0
        self._memory: _Memory | None = None
        self._exchanged = 0  # of the entries in `_step`, those that stem from all ranks already

    def check(self, samples: Samples) -> None:
        remembered = None if self._memory is None else self._memory.samples
        earlier = self._latest if self._waiting() else remembered
        if earlier is not None and len(samples.scores) and (earlier.groups is None) != (samples.groups is None):
            given, before = ("given", "left out") if earlier.groups is None else ("left out", "given")
            raise ValueError(
                f"groups must be given in every call or in none while losses are remembered, got groups {given} "
                f"after calls with groups {before}. Use a Reweighter of its own for each kind of call."
            )

    def mark(self) -> None:
        ended = not self._marked
        super().mark()
        # Now rather than at the next call: what a checkpoint holds after a step is the same on every rank.
        if ended and self._marked:
            self._exchange()

    def _record(self, samples: Samples) -> None:
        super()._record(samples)
        if not self.expects_steps:
            self._exchange()

    def _exchange(self) -> None:
        if self.ranks.group is None or self._exchanged == len(self._step):
            return
        together, _ = self.ranks.gather(Samples.join(self._step[self._exchanged :]))
        self._step[self._exchanged :] = [together]
        self._exchanged = len(self._step)

    def _capacity(self) -> int:
        return self._size_asked or self.ambiguity.memory_size(self._step_size)

    def _ends_unmarked(self) -> bool:
        return self._waiting() >= self._capacity() // 4

    def _finish_step(self) -> None:
        step = Samples.join(self._step)._replace(ratio=None).counted()
        self._exchanged = 0
        if len(step.scores) == 0:
            return
        self._step_size = len(step.scores)
        units = Units.new(step.scores) if self._memory is None else self._memory.units
        units = units.updated(step.scores, step.weights)
        kept = step._replace(scores=units.into(step.scores))
        kept = kept if self._memory is None else Samples.join([self._memory.samples, kept])
        # What does not count goes first, in order otherwise: a queue that drops without knowing how many.
        order = (kept.weights > 0).byte().argsort(stable=True)[-self._capacity() :]
        sampled = (step.weights > 0).sum(dtype=step.scores.dtype)
        self._memory = _Memory.fitted(self.ambiguity, kept.at(order), units, sampled)

    def _ratio(self, samples: Samples) -> Tensor:
        scores, weight, memory = samples.grouped(), samples.weight, self._memory
        if memory is None:
            ratio = self._on_itself(scores, weight)
        else:
            ratio = memory.ratio(scores, samples)
            if not memory.surely_filled:
                ratio = torch.where(memory.filled, ratio, self._on_itself(scores, weight))
        if weight is None:
            return ratio.masked_fill(scores.isnan(), torch.nan)
        sound = (scores < torch.inf) & (weight >= 0) & (weight < torch.inf)
        return ratio.masked_fill(~sound, torch.nan).masked_fill(weight == 0, 0.0)

    def _on_itself(self, scores: Tensor, weight: Tensor | None) -> Tensor:
        if len(scores) < ENOUGH or self.ranks.group is not None:
            return torch.ones_like(scores)
        return self.ambiguity.solve_unchecked(scores, weight).wide_ratio

    def _competing(self) -> WorstCase:
        if self._memory is not None:
            return self._memory.worst_case(self.ambiguity)
        last = self._latest.counted()
        return self.ambiguity.solve_unchecked(last.grouped(), last.weight)

    def _size(self) -> Tensor:
        pool = self._latest.counted() if self._memory is None else self._memory.samples
        return (pool.weights > 0).sum()

    def _plain(self) -> Tensor:
        small = len(self._latest.scores) < ENOUGH or self.ranks.group is not None
        alone = torch.tensor(small, device=self._device)
        return alone if self._memory is None else alone & ~self._memory.filled

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        if self._memory is not None:
            self._memory = self._restored(self._memory.state_dict(), device)

    def _restored(self, state: dict[str, Any], device: torch.device | None = None) -> _Memory:
        samples, units = Samples.restored(state["samples"], device), Units.restored(state["units"], device)
        _state_checks.finite(samples.state_dict())
        _state_checks.numbers({"sampled": state["sampled"]}, positive="")
        return _Memory.fitted(self.ambiguity, samples, units, state["sampled"].to(device, copy=True))

    def state_dict(self) -> dict[str, Any]:
        memory = None if self._memory is None else self._memory.state_dict()
        return super().state_dict() | {"step_size": self._step_size, "memory": memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._step_size = _state_checks.part(state, "step_size", int)
        self._exchanged = len(self._step) if self._marked or not self.expects_steps else 0
        self._memory = None if state["memory"] is None else self._restored(state["memory"])
