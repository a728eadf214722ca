"""Kullback-Leibler: exponential tilting."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from .. import _checks
from ._problem import Problem
from ._tilting import inverse_temperature
from .base import AmbiguitySet

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
            return torch.ones_like(problem.losses)
        drop, unit = self._scaled(problem)
        return self._tilt(drop, unit, problem).at(drop)

    def _threshold(self, problem: Problem) -> Tensor:
        drop, unit = self._scaled(problem)
        if self.radius == 0:
            return problem.top + unit * problem.expect(drop)
        return problem.top + unit * self._tilt(drop, unit, problem).one()

    def _scaled(self, problem: Problem) -> tuple[Tensor, Tensor | float]:
        """A ball sees no scale; a temperature is compared with the losses as they are."""
        return problem.below_top() if self.temperature is None else (problem.losses - problem.top, 1.0)

    def _tilt(self, drop: Tensor, unit: Tensor | float, problem: Problem) -> Tilt:
        never = torch.zeros_like(problem.top, dtype=torch.bool)
        if self.temperature is not None:
            theta, saturated = torch.ones_like(problem.top) * unit / self.temperature, never
        elif self.radius == 0:
            theta, saturated = torch.zeros_like(problem.top), never
        else:
            theta, saturated = inverse_temperature(drop, problem, self.radius or 0.0)
        return Tilt(theta, saturated, problem.mass(drop == 0), problem.expect((theta * drop).exp()))

    def fit(self, losses: Tensor, weight: Tensor, *, unit: Tensor | float, step_size: Tensor) -> TiltRule:
        problem = Problem.unchecked(losses, weight)
        drop, scale = self._scaled(problem)
        return TiltRule(self._tilt(drop, scale * unit, problem), problem.top, scale)

    def _divergence(self, ratio: Tensor) -> Tensor:
        return torch.xlogy(ratio, ratio)

    def _price(self) -> float:
        return self.temperature or 0.0


@dataclass(frozen=True, eq=False)
class Tilt:
    """ratio = exp(theta (l - max)) / normaliser, or 1 / P(argmax) on the maximum where saturated."""

    theta: Tensor
    saturated: Tensor
    best_mass: Tensor
    normaliser: Tensor

    def at(self, drop: Tensor) -> Tensor:
        extreme = torch.where(drop == 0, 1 / self.best_mass, 0.0)
        return torch.where(self.saturated, extreme, (self.theta * drop).exp() / self.normaliser)

    def one(self) -> Tensor:
        """The drop whose ratio is 1; the maximum where saturated."""
        return torch.where(self.saturated, 0.0, self.normaliser.log() / self.theta)


@dataclass(frozen=True, eq=False)
class TiltRule:
    tilt: Tilt
    top: Tensor
    scale: Tensor | float

    def ratio(self, losses: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        return self.tilt.at((losses.minimum(self.top) - self.top) / self.scale).clamp_max(_LARGEST_RATIO)
