"""Ratios that are linear in the loss above a threshold: the line that spends a chi-square budget or price.

Single rows on the CPU are numpy's: it computes on short ones at half the cost of a call of torch, and in one thread.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from .._checks import readable
from ._sorted import ascending, cumsum

Array: TypeAlias = npt.NDArray[np.float64]

_LONG = 1024  # losses in a row from which on a CPU takes the rows one by one rather than sort them
_PASSES = 24  # of elimination; ordinary losses need about 6
_SAMPLED = 16  # a sample of one in so many tells where to begin

_SLACK = 1e-12  # beyond the rounding of sums over millions
_EPS, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny


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


def line(drop: Tensor, base: Tensor | None, limit: Limit) -> Line:
    """The line of the worst case of losses given by their `drop` (..., n) below the maximum.

    A sort serves all rows at once, without a look at any value. On the CPU, where looking waits for
    nothing, single and long rows are solved one by one without it.
    """
    n = drop.shape[-1]
    if not readable(drop) or (drop.dim() > 1 and n < _LONG):
        return _scan(drop, base, limit)
    if drop.dim() == 1:
        return _eliminate(drop.numpy(), None if base is None else base.numpy(), limit)
    rows = drop.reshape(-1, n).numpy()
    bases = [None] * len(rows) if base is None else base.reshape(-1, n).numpy()
    lines = [_eliminate(row, of_row, limit) for row, of_row in zip(rows, bases, strict=True)]
    return Line(*torch.split(drop.new_tensor(lines).reshape(*drop.shape[:-1], 3), 1, -1))


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


def _scan(drop: Tensor, base: Tensor | None, limit: Limit) -> Line:
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


def _eliminate(drop: Array, base: Array | None, limit: Limit) -> Line:
    """One row on the CPU, without a sort (Michelot): discard what lies below the threshold of the remaining
    losses' own line, until nothing does. That threshold only ever rises towards the right one."""
    powers, keep = _powers(drop, base, limit), np.empty_like(drop)
    edge = _edge_of_sample(drop, base, limit) if len(drop) >= _SAMPLED * _LONG else -math.inf
    before: list[float] = []
    for trial in range(_PASSES):
        moments = _dot(powers, np.greater(drop, edge, out=keep)).tolist()
        if not moments[0] > 0.0:
            break  # a row without an answer
        if moments != before:
            zero = _zero(moments, len(drop) if base is None else 1, limit)
            too_few = trial == 0 and zero < edge  # The sample began too high.
            edge = -math.inf if too_few else max(edge, min(zero, -_TINY))
            before = moments
            continue
        found = _line_of(drop, base, keep, moments[0], limit)
        if found.height > 0.0:
            return found
        edge = float(found.least)
    scanned = _scan(torch.from_numpy(drop), None if base is None else torch.from_numpy(base), limit)
    return Line(*(float(part) for part in scanned))


def _dot(rows: Array, row: Array) -> Array:
    """rows @ row. BLAS is the quicker way to it on a short row; on a long one it starts threads, which wait for torch's
    as torch's wait for them."""
    found: Array = rows.dot(row) if len(row) < _LONG else np.einsum("...i,i->...", rows, row)
    return found


def _powers(drop: Array, base: Array | None, limit: Limit) -> Array:
    """(2 or 3, n): the weights, times 1, drop and, for a ball, drop^2."""
    ones = np.ones_like(drop)
    powers = np.stack((ones, drop) if limit.penalty is not None else (ones, drop, drop * drop))
    return powers if base is None else powers * base


def _zero(moments: list[float], n: int, limit: Limit) -> float:
    """Where the line of losses with these sums reaches 0, or a little below, so that rounding discards none."""
    total, first = moments[:2]
    mass, mean = total / n, first / total
    if limit.penalty is not None:
        return mean - limit.price / mass + _SLACK * mean
    second = moments[2] / total
    budget = 2 * limit.radius * mass * (1 - _SLACK) - (1 - mass) - _SLACK
    variance = max(second - mean * mean, 0.0) + _SLACK * second
    return mean - math.sqrt(variance / budget) if budget > 0.0 else -math.inf


def _line_of(drop: Array, base: Array | None, keep: Array, total: float, limit: Limit) -> Line:
    """The line of the kept losses, of weight `total`, without cancellation; of height 0 if the smallest is not
    active."""
    n, weight = (len(drop), keep) if base is None else (1, base * keep)
    mass, rest = total / n, (n - total) / n if base is None else float((base - weight).sum())
    least = float((drop * keep).min())
    rise = drop - least
    mean = float(_dot(weight, rise)) / n
    if limit.penalty is not None:
        slope = 1 / limit.price
    else:
        rise -= mean / mass
        spread = mass * float(_dot(weight, rise * rise)) / n
        budget = 2 * limit.radius * mass - rest
        # Saturated means spread 0: then the slope must be steep whatever is left of the budget.
        slope = math.sqrt(max(budget, _EPS**2) / max(spread, _TINY**0.5))
    height = 1 - mean * slope
    # What is active is decided as in the scan.
    return Line(least, slope, height / mass if height > 32 * _EPS else 0.0)


def _edge_of_sample(drop: Array, base: Array | None, limit: Limit) -> float:
    """Where the ratio reaches 0 for a sample, and a little below: a place to begin, no more."""
    some = np.ascontiguousarray(drop[::_SAMPLED])
    share = None if base is None else base[::_SAMPLED] / base[::_SAMPLED].sum()
    found = _eliminate(some, share, limit)
    edge = found.zero() - 4 * len(some) ** -0.5 / found.slope
    return edge if edge < 0.0 else -math.inf
