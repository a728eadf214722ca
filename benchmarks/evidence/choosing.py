"""What there is to see before a radius is chosen: trainings without, and on less, than the run that it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from torch import Tensor

from robustgrad import TotalVariation

from .choices import CHOICES, Seen
from .features import Features
from .heads import Parameters
from .methods import METHODS, Driven, Make, robust
from .tasks import Task
from .training import losses_of, together, trained

Fit = Callable[[Task, Make], Parameters]  # the last iterate, all seeds side by side


class Choosing:
    """All choices of one task; trainings that several of them ask for happen once."""

    def __init__(
        self, task: Task, capacity: str, seeds: Sequence[int], steps: int, prompts: Tensor, target: Tensor
    ) -> None:
        self.task, self.capacity, self.seeds, self.steps = task, capacity, seeds, steps
        self.prompts, self.target = prompts, target
        self.validation_losses = cache(self._validation_losses)
        self.left_out = cache(self._left_out)

    def methods(self, choice: str) -> list[Driven]:
        """A run at what was chosen for each seed."""
        return [Driven(CHOICES[choice](self._seen(place))) for place in range(len(self.seeds))]

    def _seen(self, place: int) -> Seen:
        index = self.task.index[self.seeds[place]]
        return Seen(
            pairs=len(index),
            steps=self.steps,
            losses=self.validation_losses(0.0)[place],
            by_radius=lambda radius: self.validation_losses(radius)[place].mean().item(),
            without=lambda radius, domain: self.left_out(radius, domain)[place].item(),
            prompts=self.prompts[index].unique(dim=0),
            target=self.target.unique(dim=0),
        )

    def _validation_losses(self, radius: float) -> Tensor:
        """(s, n)."""
        return losses_of(self._fitted(self.task, radius), together(self.task.validation))

    def _left_out(self, radius: float, domain: int) -> Tensor:
        """(s,) the mean loss on the training pairs of a domain after training without them."""
        task, seeds = self.task, self.seeds
        own = [task.domains[task.index[seed]] == domain for seed in seeds]
        rest = replace(
            task,
            index=[task.index[s][~mask] for s, mask in zip(seeds, own, strict=True)],
            swapped=[task.swapped[s][~mask] for s, mask in zip(seeds, own, strict=True)],
        )
        left = [self._pairs(seed, mask) for seed, mask in zip(seeds, own, strict=True)]
        return losses_of(self._fitted(rest, radius), together(left)).mean(-1)

    def _pairs(self, seed: int, mask: Tensor) -> Features:
        return self.task.pool.at(self.task.index[seed][mask]).swapped(self.task.swapped[seed][mask])

    def _fitted(self, task: Task, radius: float) -> Parameters:
        make = robust(TotalVariation(radius)) if radius else METHODS["plain"]
        return trained(task, make, self.capacity, self.seeds, self.steps)["last"]
