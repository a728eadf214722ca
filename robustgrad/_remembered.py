"""Remembered losses with their rule: what a memory pool knows between two steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ._units import Units
from .ambiguity import AmbiguitySet, Rule, WorstCase
from .ambiguity import _memory_kernel as kernel
from .ambiguity._problem import Problem
from .samples import Samples

ENOUGH = 64  # remembered losses; fewer carry no rule
_ROUNDING = 1e-12  # relative difference of equal losses that were put into other units and back


@dataclass(frozen=True, eq=False)
class Remembered:
    """Losses in units of their own, and the rule that the set fits to them, worked out when it is asked for.

    On a GPU kernels keep all of it in place, in `samples` and `numbers`.
    """

    ambiguity: AmbiguitySet
    samples: Samples  # oldest first, standardised, weight 0 where not finite
    units: Units
    sampled: Tensor  # how many samples of the last step counted
    numbers: Tensor | None = None  # of a memory that kernels keep; `units` and `sampled` are among them

    @cached_property
    def scores(self) -> Tensor:
        """Those of the samples, or the means of their groups."""
        return self.samples.grouped()

    @cached_property
    def rule(self) -> Rule:
        step_size = self.sampled.clamp_min(1.0)
        return self.ambiguity.fit(self.scores, self.samples.weights, unit=self.units.spread, step_size=step_size)

    @cached_property
    def filled(self) -> Tensor:
        weights = self.samples.weights
        return ((weights > 0).sum() >= ENOUGH) & _vary(self.scores, weights, self.units)

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

    def kept_by_kernel(self) -> Remembered | None:
        """The same where kernels keep it, if they do."""
        recipe = self.ambiguity._recipe()
        if self.samples.groups is not None or not kernel.takes(self.samples.scores, recipe):
            return None
        if self.numbers is not None:
            return self
        known = torch.stack([*self.units.state_dict().values(), self.sampled])
        numbers = torch.cat((known, known.new_zeros(kernel.NUMBERS - len(known))))
        nothing = known.new_empty(2, 0)
        return self._with(numbers).learned(self.ambiguity, nothing, len(self.samples.scores))

    def _with(self, numbers: Tensor) -> Remembered:
        return Remembered(self.ambiguity, self.samples, Units(*numbers[:5].unbind()), numbers[5], numbers)

    def learned(self, ambiguity: AmbiguitySet, seen: Tensor, capacity: int) -> Remembered:
        """With the scores and weights (2, b) of a step, by one launch, in place once the memory is full."""
        recipe, numbers = ambiguity._recipe(), self.numbers
        assert recipe is not None and numbers is not None
        ring, mass = kernel.learn(recipe, seen, self.samples.scores, self.samples.weights, capacity, numbers)
        return Remembered(ambiguity, Samples(ring, mass), self.units, self.sampled, numbers)

    def met(self, given: tuple[Tensor | None, ...], seen: Tensor, nonfinite: Tensor) -> Tensor:
        """The ratio of a call as it was given, by one launch; see `kernel.meet`."""
        recipe, numbers = self.ambiguity._recipe(), self.numbers
        assert recipe is not None and numbers is not None
        return kernel.meet(recipe, given, self.samples.scores, self.samples.weights, numbers, seen, nonfinite)

    def state_dict(self) -> dict[str, Any]:
        """Copies: kernels go on where the originals are."""
        return {
            "samples": {name: tensor.clone() for name, tensor in self.samples.state_dict().items()},
            "units": {name: number.clone() for name, number in self.units.state_dict().items()},
            "sampled": self.sampled.clone(),
        }


def _vary(scores: Tensor, weights: Tensor, units: Units) -> Tensor:
    """Whether the remembered losses differ: equal ones say nothing about the order of others."""
    top = torch.where(weights > 0, scores, -torch.inf).amax()
    bottom = torch.where(weights > 0, scores, torch.inf).amin()
    return (top - bottom) * units.spread > _ROUNDING * units.level.abs()


class Room:
    """Where the calls of a step lie, one after the other: a replayed CUDA graph finds them in the same place."""

    def __init__(self) -> None:
        self._lanes = torch.empty(3, 0, dtype=torch.float64)
        self.used = 0

    def take(self, n: int, device: torch.device) -> Tensor:
        """Scores, weights and ratios (3, n) of a call, to be written."""
        if self._lanes.device != device or self.used + n > self._lanes.shape[1]:
            self._lanes = torch.empty(3, max(512, 2 * (self.used + n)), dtype=torch.float64, device=device)
            self.used = 0
        self.used += n
        return self._lanes[:, self.used - n : self.used]

    def seen(self, step: list[Samples]) -> Tensor:
        """Scores and weights (2, b) of all calls of a step, whether they lie here or not."""
        if self.used == sum(len(samples.scores) for samples in step):
            return self._lanes[:2, : self.used]
        together = Samples.join(step)
        return torch.stack((together.scores, together.weights))
