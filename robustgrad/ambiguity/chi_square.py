"""Chi-square: an adversary limited in the variance of the ratio."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks
from ._problem import Problem
from ._sorted import cumsum
from .base import AmbiguitySet


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
            return torch.ones_like(problem.losses)
        drop, unit = self._scaled(problem)
        line = self._line(drop, unit, problem.base)
        # Where the budget is just used up the line is flat, and only the order tells who is active.
        return line.at(drop) * (drop >= line.least)

    def _threshold(self, problem: Problem) -> Tensor:
        drop, unit = self._scaled(problem)
        return problem.top + unit * self._line(drop, unit, problem.base).zero()

    def _scaled(self, problem: Problem) -> tuple[Tensor, Tensor | float]:
        """A ball sees no scale; a penalty is compared with the losses as they are."""
        return problem.below_top() if self.penalty is None else (problem.losses - problem.top, 1.0)

    def _line(self, drop: Tensor, unit: Tensor | float, base: Tensor | None) -> Line:
        scan = _Scan.of(drop, base)
        return scan.ball(self.radius or 0.0) if self.penalty is None else scan.penalised(self.penalty / unit)

    def fit(self, losses: Tensor, weight: Tensor, *, unit: Tensor | float, step_size: Tensor) -> LineRule:
        problem = Problem.unchecked(losses, weight)
        drop, scale = self._scaled(problem)
        return LineRule(self._line(drop, scale * unit, problem.base), problem.top, scale)

    def _divergence(self, ratio: Tensor) -> Tensor:
        return (ratio - 1).square() / 2

    def _price(self) -> float:
        return self.penalty or 0.0


class Line(NamedTuple):
    """ratio = (slope * (drop - least) + height)_+ with `least` the drop of the smallest active loss."""

    least: Tensor
    slope: Tensor
    height: Tensor

    def at(self, drop: Tensor) -> Tensor:
        return torch.addcmul(self.height, drop - self.least, self.slope).clamp_min(0.0)

    def zero(self) -> Tensor:
        """The drop at which the ratio reaches 0."""
        return self.least - self.height / self.slope


@dataclass(frozen=True, eq=False)
class LineRule:
    line: Line
    top: Tensor
    scale: Tensor | float

    def ratio(self, losses: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        return self.line.at((losses.minimum(self.top) - self.top) / self.scale)


class _Scan(NamedTuple):
    """Prefix sums over the losses in descending order, all terms of one sign, so nothing cancels.

    For the k largest losses, with P their mass and E the expectation under the base: fall is
    -E(l - l_(k))_+, spread is P E(l - l_(k))_+^2 - fall^2 = P^2 Var, rest is 1 - P.
    """

    ordered: Tensor
    mass: Tensor
    rest: Tensor
    fall: Tensor
    spread: Tensor

    @classmethod
    def of(cls, drop: Tensor, base: Tensor | None) -> _Scan:
        ordered, p, before, mass, rest = _descending(drop, base)
        # The first gap reaches round to the last loss; no mass lies before it, so it counts for nothing.
        gaps = ordered - ordered.roll(1, -1)
        step = before * gaps
        fall = cumsum(step)
        half_second = cumsum(gaps * torch.sub(fall, step, alpha=0.5))
        return cls(ordered, mass, rest, fall, cumsum(2 * p * half_second))

    def ball(self, radius: float) -> Line:
        # 2 radius P - (1 - P) in the form that does not cancel at small radii.
        budget = 2 * radius * self.mass - self.rest
        limits = torch.finfo(self.spread.dtype)
        # A loss whose ratio would be rounding alone is not active: it may stand for -inf.
        active = torch.addcmul(self.spread, budget, self.fall.square(), value=-1 - 64 * limits.eps) >= 0
        least, mass, fall, spread, budget = self._last(active, self.spread, budget)
        # Saturated means spread 0: then the slope must be steep whatever is left of the budget.
        slope = (budget.clamp_min(limits.eps**2) / spread.clamp_min(limits.tiny**0.5)).sqrt()
        return Line(least, slope, (1 + fall * slope) / mass)

    def penalised(self, penalty: Tensor | float) -> Line:
        least, mass, fall = self._last(self.fall > -penalty)
        slope = torch.ones_like(fall) / penalty
        return Line(least, slope, (1 + fall * slope) / mass)

    def _last(self, active: Tensor, *more: Tensor) -> list[Tensor]:
        """The sums at the last active prefix: being active is monotone, so it is a count. The first is."""
        k = active[..., 1:].sum(-1, keepdim=True)
        return [sums.gather(-1, k) for sums in (self.ordered, self.mass, self.fall, *more)]


def _descending(losses: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | float, Tensor, Tensor, Tensor]:
    """Losses in descending order, their base mass, and the mass before, up to and after each."""
    ordered, order = losses.sort(-1, descending=True)
    if base is None:
        n = losses.shape[-1]
        counts = torch.linspace(0.0, 1.0, n + 1, device=losses.device, dtype=losses.dtype)
        mass = counts[1:].expand_as(ordered)
        return ordered, 1 / n, counts[:-1], mass, 1 - mass
    p = base.gather(-1, order)
    mass = cumsum(p)
    # Shifted sums rather than differences: a small mass beside a large one would cancel.
    before = pad(mass[..., :-1], (1, 0))
    rest = pad(cumsum(p.flip(-1)).flip(-1)[..., 1:], (0, 1))
    return ordered, p, before, mass, rest
