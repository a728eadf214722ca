"""Ratios that are linear in the loss above a threshold: the line that spends a chi-square budget or price."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._sorted import ascending, cumsum

_TINY = torch.finfo(torch.float64).tiny


class Line(NamedTuple):
    """ratio = (slope * (drop - least) + height)_+ with `least` the drop of the smallest active loss.

    Numbers for one row, tensors (..., 1) for many.
    """

    least: Tensor | float
    slope: Tensor | float
    height: Tensor | float

    def at(self, drop: Tensor) -> Tensor:
        return (drop - self.least).mul_(self.slope).add_(self.height).relu_()

    def zero(self) -> Tensor | float:
        """The drop at which the ratio reaches 0."""
        return self.least - self.height / self.slope


class Limit(NamedTuple):
    """What bounds the divergence: the radius of a ball, or else a penalty."""

    radius: float
    penalty: Tensor | float | None = None

    @property
    def price(self) -> float:
        """The penalty as a number that can be divided by."""
        return max(float(self.penalty or 0.0), _TINY)


class _Prefixes(NamedTuple):
    """Losses in descending order, with the base mass at, before, up to and after each.

    `rest` is None under the uniform base, whose masses are multiples of 1/n.
    """

    ordered: Tensor
    p: Tensor | float
    before: Tensor
    mass: Tensor
    rest: Tensor | None

    @classmethod
    def of(cls, drop: Tensor, base: Tensor | None) -> _Prefixes:
        if base is None:
            ordered, n = ascending(drop).flip(-1), drop.shape[-1]
            counts = torch.linspace(0.0, 1.0, n + 1, device=drop.device, dtype=drop.dtype)
            return cls(ordered, 1 / n, counts[:-1], counts[1:], None)
        # What has no mass goes below all others: among ties of -inf it would count as active without them.
        ordered, order = torch.where(base > 0, drop, 2 * drop - 1).sort(-1, descending=True)
        p = base.gather(-1, order)
        mass = cumsum(p)
        # Shifted sums rather than differences: a small mass beside a large one would cancel.
        before = pad(mass[..., :-1], (1, 0))
        return cls(ordered, p, before, mass, pad(cumsum(p.flip(-1)).flip(-1)[..., 1:], (0, 1)))

    def budget(self, radius: float) -> Tensor:
        """2 radius P - (1 - P) in a form that does not cancel at small radii."""
        if self.rest is not None:
            return 2 * radius * self.mass - self.rest
        n, like = self.ordered.shape[-1], self.ordered
        return torch.linspace(-1.0, 2 * radius, n + 1, device=like.device, dtype=like.dtype)[1:]


def scan(drop: Tensor, base: Tensor | None, limit: Limit) -> Line:
    """By prefix sums over the sorted losses, all terms of one sign, so nothing cancels.

    For the k largest losses, with P their mass and E the expectation under the base: fall is
    -E(l - l_(k))_+, spread is P E(l - l_(k))_+^2 - fall^2 = P^2 Var.
    """
    prefix = _Prefixes.of(drop, base)
    # The first gap reaches round to the last loss; no mass lies before it, so it counts for nothing.
    gaps = prefix.ordered - prefix.ordered.roll(1, -1)
    step = prefix.before * gaps
    fall = cumsum(step)
    if limit.penalty is not None:
        least, mass, fall = _last(fall > -limit.penalty, prefix.ordered, prefix.mass, fall)
        slope = torch.ones_like(fall) / limit.penalty
        return Line(least, slope, (fall * slope + 1.0) / mass)
    half_second = cumsum(gaps.mul_(torch.sub(fall, step, alpha=0.5)))
    spread, budget = cumsum(half_second.mul_(2 * prefix.p)), prefix.budget(limit.radius)
    limits = torch.finfo(spread.dtype)
    # A loss whose ratio would be rounding alone is not active: it may stand for -inf.
    active = torch.addcmul(spread, budget, fall.square(), value=-1 - 64 * limits.eps) >= 0.0
    least, mass, fall, spread, budget = _last(active, prefix.ordered, prefix.mass, fall, spread, budget)
    # Saturated means spread 0: then the slope must be steep whatever is left of the budget.
    slope = (budget.clamp_min_(limits.eps**2) / spread.clamp_min_(limits.tiny**0.5)).sqrt_()
    return Line(least, slope, (fall * slope + 1.0) / mass)


def _last(active: Tensor, *sums: Tensor) -> list[Tensor]:
    """The sums at the last active prefix: being active is monotone, so it is a count. The first is."""
    k = active[..., 1:].sum(-1, keepdim=True)
    return [(one if one.shape == active.shape else one.expand_as(active)).gather(-1, k) for one in sums]
