"""Kullback-Leibler: exponential tilting."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from .. import _checks
from ._kernel import Recipe
from ._problem import Problem
from ._tilting import exp, inverse_temperature
from .base import AmbiguitySet, PlainRule, Rule

_LARGEST_RATIO = 100.0  # of a new loss under a rule fitted on remembered ones


@dataclass(frozen=True, repr=False)
class KL(AmbiguitySet):
    """Worst distribution in a Kullback-Leibler ball, or with a KL penalty called temperature.

        max_q <q, losses>   s.t.  sum q log(q/p) <= radius,  sum q = 1,  q >= 0
        max_q <q, losses> - temperature * sum q log(q/p)      (softmax(losses / temperature + log p))

    The ratio is exp(theta l) / E exp(theta l). `threshold` is the loss whose ratio is 1.
    radius = 0 gives ratio 1; radius >= -log P(argmax) gives the maximum, ties sharing.

    Args:
        radius: >= 0, in nats.
        temperature: > 0, in units of the loss. It depends on the scale of the losses, a radius does not;
            the value is temperature * log E exp(losses / temperature).
    Raises: ValueError or TypeError: an argument outside its range, or not exactly one of the two.
    Source: Hu & Hong (2013), Theorem 1; temperature form as in KLDPO, arXiv 2502.01930, normalised.
    """

    radius: float | None = None
    _: KW_ONLY
    temperature: float | None = None

    def __post_init__(self) -> None:
        _checks.exactly_one("KL", radius=self.radius, temperature=self.temperature)
        if self.radius is not None:
            _checks.number("radius", self.radius, 0.0, torch.inf, "Use 0 for plain averaging.")
        if self.temperature is not None:
            _checks.number(
                "temperature",
                self.temperature,
                0.0,
                torch.inf,
                "Use radius= for a scale-free set.",
                open_low=True,
            )

    @property
    def saturating_size(self) -> float:
        return 1.0 if self.radius is None else math.exp(min(self.radius, 700.0))

    def _worst_case(self, problem: Problem) -> Tensor:
        if self.radius == 0:
            return problem.plain()
        drop, unit = self._scaled(problem)
        # Through softmax, in which ties stay ties to the bit.
        tilted = (self._theta(drop, unit, problem) * drop).softmax(-1)
        return tilted.mul_(drop.shape[-1]) if problem.base is None else tilted.div_(problem.expect(tilted))

    def _recipe(self) -> Recipe:
        if self.temperature is not None:
            return Recipe("softmax", (self._coldest,))
        return Recipe("tilt", (self.radius,)) if self.radius else Recipe("plain")

    @property
    def _coldest(self) -> float:
        """The temperature, kept from where it gives the maximum alone: infinity times 0 would be NaN."""
        return max(self.temperature or 0.0, 1e-150)

    def _threshold(self, problem: Problem) -> Tensor:
        drop, unit = self._scaled(problem)
        if self.radius == 0:
            return problem.top + unit * problem.expect(drop)
        theta = self._theta(drop, unit, problem)
        return problem.top + unit * problem.expect(exp(theta * drop)).log() / theta

    def _scaled(self, problem: Problem) -> tuple[Tensor, Tensor | float]:
        """A ball sees no scale; a temperature is compared with the losses as they are."""
        return problem.below_top() if self.temperature is None else (problem.distance(), 1.0)

    def _theta(self, drop: Tensor, unit: Tensor | float, problem: Problem) -> Tensor | float:
        if self.temperature is not None:
            return unit / self._coldest
        return inverse_temperature(drop, problem, self.radius) if self.radius else 0.0

    def fit(self, losses: Tensor, weight: Tensor, *, unit: Tensor | float, step_size: Tensor) -> Rule:
        if self.radius == 0:
            return PlainRule()
        problem = Problem.remembered(losses, weight)
        drop, scale = self._scaled(problem)
        theta = self._theta(drop, scale * unit, problem)
        return TiltRule(theta, problem.expect(exp(theta * drop)), problem.top, scale)

    def _divergence(self, ratio: Tensor) -> Tensor:
        # The mean of ratio - 1 is 0; taking it off term by term leaves nothing to cancel near ratio 1.
        return torch.xlogy(ratio, ratio) - (ratio - 1)

    def _price(self) -> float:
        return self.temperature or 0.0


@dataclass(frozen=True, eq=False)
class TiltRule:
    theta: Tensor | float
    normaliser: Tensor
    top: Tensor
    scale: Tensor | float

    def ratio(self, losses: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        drop = (losses.minimum(self.top) - self.top) / self.scale
        return (exp(self.theta * drop) / self.normaliser).clamp_max(_LARGEST_RATIO)
