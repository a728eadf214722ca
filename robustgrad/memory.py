"""A memory of recent losses: what makes small calls robust."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _state_checks
from ._remembered import ENOUGH, Remembered, Room
from ._units import Units
from .ambiguity import AmbiguitySet, WorstCase
from .ambiguity import _memory_kernel as kernel
from .distributed import Ranks
from .pool import Pool
from .samples import Given, Samples
from .schedule import Schedule


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
        self._memory: Remembered | None = None
        self._room = Room()
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

    def _most_waiting(self) -> int:
        return max(super()._most_waiting(), 64 * self._capacity())

    def _ends_unmarked(self) -> bool:
        return self._waiting() >= self._capacity() // 4

    def _finish_step(self) -> None:
        self._exchanged = 0
        if not self._waiting():
            return
        self._step_size = self._waiting()
        kept = self._kept_by_kernel()
        if kept is not None:
            self._memory = kept.learned(self.ambiguity, self._room.seen(self._step), self._capacity())
        else:
            self._memory = self._learned(Samples.join(self._step)._replace(ratio=None).counted())
        self._room.used = 0

    def _kept_by_kernel(self) -> Remembered | None:
        """The memory where a kernel takes the step in: wherever one can, so that resuming is exact to the bit."""
        if self._memory is None:
            return None
        most = max(len(self._memory.samples.scores), self._capacity())
        learns = kernel.learns(most, self._step_size, self.ambiguity._recipe())
        return self._memory.kept_by_kernel() if learns else None

    def _learned(self, step: Samples) -> Remembered:
        units = Units.new(step.scores) if self._memory is None else self._memory.units
        units = units.updated(step.scores, step.weights)
        kept = step._replace(scores=units.into(step.scores))
        kept = kept if self._memory is None else Samples.join([self._memory.samples, kept])
        # What does not count goes first, in order otherwise: a queue that drops without knowing how many.
        order = (kept.weights > 0).byte().argsort(stable=True)[-self._capacity() :]
        sampled = (step.weights > 0).sum(dtype=step.scores.dtype)
        return Remembered(self.ambiguity, kept.at(order), units, sampled)

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

    def quick_ratio(self, given: Given, nonfinite: Tensor) -> Tensor | None:
        if self._memory is None or not given.losses.is_floating_point() or not kernel.reaches(given.losses):
            return None
        alone = len(given.losses) >= ENOUGH and self.ranks.group is None
        if len(given.losses) == 0 or given.groups is not None or (alone and given.scores is not None):
            return None
        losses, scores, _, base, mask = given
        self.check(Samples(losses))
        self._begin(losses.device)
        memory = self._memory.kept_by_kernel()
        if memory is None:
            return None
        self._memory = memory
        unfilled = self.ambiguity.solve_unchecked(losses, base, mask).wide_ratio if alone else None
        seen = self._room.take(len(losses), losses.device)
        ratio = memory.met((losses, scores, base, mask, unfilled), seen, nonfinite)
        weight = None if base is None and mask is None else seen[1]
        self._record(Samples(seen[0], weight, None, seen[2]))
        return ratio

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

    def _restored(self, state: dict[str, Any], device: torch.device | None = None) -> Remembered:
        samples, units = Samples.restored(state["samples"], device), Units.restored(state["units"], device)
        _state_checks.finite(samples.state_dict())
        _state_checks.numbers({"sampled": state["sampled"]}, positive="")
        return Remembered(self.ambiguity, samples, units, state["sampled"].to(device, copy=True))

    def state_dict(self) -> dict[str, Any]:
        memory = None if self._memory is None else self._memory.state_dict()
        return super().state_dict() | {"step_size": self._step_size, "memory": memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._step_size = _state_checks.part(state, "step_size", int)
        self._exchanged = len(self._step) if self._marked or not self.expects_steps else 0
        self._memory = None if state["memory"] is None else self._restored(state["memory"])
        self._room = Room()
