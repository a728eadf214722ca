"""Chi-square: an adversary limited in the variance of the ratio."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from .. import _checks
from ._elimination import line
from ._kernel import Recipe
from ._linear import Limit, Line
from ._problem import Problem
from .base import AmbiguitySet, PlainRule, Rule


@dataclass(frozen=True, repr=False)
class ChiSquare(AmbiguitySet):
    """Worst distribution in a chi-square ball, or with a chi-square penalty.

        max_q <q, losses>   s.t.  (1/2) sum p (q/p - 1)^2 <= radius,  sum q = 1,  q >= 0
        max_q <q, losses> - penalty * (1/2) sum p (q/p - 1)^2            (penalty form)

    The ratio is ((l - eta)/lam)_+: linear in the loss above the `threshold` eta, 0 below it. While
    nothing is cut off, the value of the ball is mean + sqrt(2 radius Var). radius = 0 gives ratio 1;
    radius >= (1/P(argmax) - 1)/2 gives the maximum, ties sharing.

    Args:
        radius: >= 0, in the halved convention of arXiv 2010.05893 (see `from_unhalved`).
        penalty: > 0, in units of the loss. It depends on the scale of the losses, a radius does not.
    Raises: ValueError or TypeError: an argument outside its range, or not exactly one of the two.
    Source: Namkoong & Duchi (2017); Levy et al., arXiv 2010.05893; penalty form: sparsemax,
        Martins & Astudillo (2016).
    """

    radius: float | None = None
    _: KW_ONLY
    penalty: float | None = None

    def __post_init__(self) -> None:
        _checks.exactly_one("ChiSquare", radius=self.radius, penalty=self.penalty)
        if self.radius is not None:
            _checks.number("radius", self.radius, 0.0, torch.inf, "Use 0 for plain averaging.")
        if self.penalty is not None:
            _checks.number("penalty", self.penalty, 0.0, torch.inf, "Use radius= for a scale-free set.", open_low=True)

    @classmethod
    def from_unhalved(cls, radius: float) -> ChiSquare:
        """The ball sum p (q/p - 1)^2 <= radius, without the half, as some papers write it."""
        return cls(_checks.number("radius", radius, 0.0, torch.inf, "Use 0 for plain averaging.") / 2)

    @property
    def saturating_size(self) -> float:
        return 1.0 if self.radius is None else 1 + 2 * self.radius

    def _worst_case(self, problem: Problem) -> Tensor:
        if self.radius == 0:
            return problem.plain()
        drop, unit = self._scaled(problem)
        found = self._line(drop, unit, problem.base)
        # Where the budget is just used up the line is flat, and only the order tells who is active.
        return found.at(drop).mul_(drop.ge_(found.least))

    def _recipe(self) -> Recipe:
        if self.penalty is not None:
            return Recipe("price", (self._limit.price,))
        return Recipe("ball", (self._limit.radius,)) if self.radius else Recipe("plain")

    def _threshold(self, problem: Problem) -> Tensor:
        drop, unit = self._scaled(problem)
        return problem.top + unit * self._line(drop, unit, problem.base).zero()

    def _scaled(self, problem: Problem) -> tuple[Tensor, Tensor | float]:
        """A ball sees no scale; a penalty is compared with the losses as they are."""
        return problem.below_top() if self.penalty is None else (problem.distance(), 1.0)

    def _line(self, drop: Tensor, unit: Tensor | float, base: Tensor | None) -> Line:
        limit = self._limit
        return line(drop, base, limit if self.penalty is None else Limit(0.0, self.penalty / unit))

    @property
    def _limit(self) -> Limit:
        # Any set saturates long before; twice the largest float would be infinite.
        return Limit(min(self.radius or 0.0, 1e100), self.penalty)

    def fit(self, losses: Tensor, weight: Tensor, *, unit: Tensor | float, step_size: Tensor) -> Rule:
        if self.radius == 0:
            return PlainRule()
        problem = Problem.remembered(losses, weight)
        drop, scale = self._scaled(problem)
        return LineRule(self._line(drop, scale * unit, problem.base), problem.top, scale)

    def _divergence(self, ratio: Tensor) -> Tensor:
        return (ratio - 1).square() / 2

    def _price(self) -> float:
        return self.penalty or 0.0


@dataclass(frozen=True, eq=False)
class LineRule:
    line: Line
    top: Tensor
    scale: Tensor | float

    def ratio(self, losses: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        return self.line.at((losses.minimum(self.top) - self.top) / self.scale)
