"""The line of single rows on the CPU without a sort (Michelot): discard what lies below the zero of the remaining
losses' own line, until nothing does. That zero only ever rises towards the right one.

Rows are numpy's here: it computes on short ones at half the cost of a call of torch, and in one thread.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._checks import readable
from ._linear import Limit, Line, scan

Array: TypeAlias = npt.NDArray[np.float64]
# Rows in the type in which they were given.
Given: TypeAlias = npt.NDArray[np.floating]

_SEVERAL = 1024  # losses in a row from which on a CPU takes many rows one by one rather than sort them
LONG = 16384  # losses in a row from which on a sample tells where to begin
BLOCK = 16384  # losses looked at together: what is computed from them stays in the cache
_PASSES = 24  # of elimination; ordinary losses need about 6

_SLACK = 1e-12  # beyond the rounding of sums over millions
_CANCELLED = 1e-3  # share of a sum of squares below which what is left of a difference is not trusted
_EPS, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny


class _Left(NamedTuple):
    """What is not discarded yet of a row: losses given by their distance from a centre, none above it.

    Losses above the centre are known to be active: only the sums over them are kept.
    """

    away: Array
    base: Array | None  # their base weights
    whole: float  # weight of the row: 1, or under the uniform base its number of losses
    rest: float = 0.0  # base weight discarded
    above: tuple[float, float, float] = (0.0, 0.0, 0.0)  # how many, their distance and its square in sum

    @classmethod
    def row(cls, drop: Array, base: Array | None) -> _Left:
        return cls(drop, base, len(drop) if base is None else 1.0)

    def only(self, kept: npt.NDArray[np.bool_]) -> _Left:
        away, base, rest = self.away.compress(kept), self.base, self.rest
        if base is not None:
            base, rest = base.compress(kept), rest + float(base.compress(~kept).sum())
        return _Left(away, base, self.whole, rest, self.above)

    def zero(self, limit: Limit) -> float:
        """Where their line reaches 0, or a little below, so that rounding discards none."""
        away, base, (total, first, second) = self.away, self.base, self.above
        weighted = away if base is None else base * away
        total += len(away) if base is None else float(base.sum())
        first += float(weighted.sum())
        if not total > 0.0:
            return math.nan  # a row without an answer
        mass, mean = total / self.whole, first / total
        if limit.penalty is not None:
            return mean - limit.price / mass - _SLACK * abs(mean)
        second = (second + _dot(weighted, away)) / total
        budget = 2 * limit.radius * mass * (1 - _SLACK) - (1 - mass) - _SLACK
        variance = max(second - mean * mean, 0.0) + _SLACK * second
        return mean - math.sqrt(variance / budget) if budget > 0.0 else -math.inf

    def line(self, limit: Limit) -> Line | None:
        """Their line, without cancellation; of height 0 if the smallest is not active. None where it would cancel."""
        least, (many, first, second), whole = float(self.away.min()), self.above, self.whole
        rise, base = self.away - least, self.base
        weight, total = (many + len(rise), float(rise.sum())) if base is None else (float(base.sum()), _dot(base, rise))
        mass, mean = weight / whole, (total + first - many * least) / whole
        if limit.penalty is not None:
            slope = 1 / limit.price
        else:
            rise -= mean / mass
            centre = mean / mass + least
            spread_above = second - 2 * centre * first + centre * centre * many
            if spread_above < _CANCELLED * second:
                return None
            spread = mass * (_dot(rise if base is None else base * rise, rise) + spread_above) / whole
            budget = 2 * limit.radius * mass - (self.rest if base is not None else (whole - weight) / whole)
            # Saturated means spread 0: then the slope must be steep whatever is left of the budget.
            slope = math.sqrt(max(budget, _EPS**2) / max(spread, _TINY**0.5))
        height = 1 - mean * slope
        # What is active is decided as in the scan.
        return Line(least, slope, height / mass if height > 32 * _EPS else 0.0)


def line(drop: Tensor, base: Tensor | None, limit: Limit) -> Line:
    """The line of the worst case of losses given by their `drop` (..., n) below the maximum.

    A sort serves all rows at once, without a look at any value. On the CPU, where looking waits for
    nothing, single and long rows are solved one by one without it.
    """
    n = drop.shape[-1]
    if not readable(drop) or (drop.dim() > 1 and n < _SEVERAL):
        return scan(drop, base, limit)
    if drop.dim() == 1:
        return line_of_row(drop.numpy(), None if base is None else base.numpy(), limit)
    rows = drop.reshape(-1, n).numpy()
    bases = [None] * len(rows) if base is None else base.reshape(-1, n).numpy()
    lines = [line_of_row(row, of_row, limit) for row, of_row in zip(rows, bases, strict=True)]
    return Line(*torch.split(drop.new_tensor(lines).reshape(*drop.shape[:-1], 3), 1, -1))


def line_of_row(drop: Array, base: Array | None, limit: Limit) -> Line:
    found = None
    if len(drop) >= LONG:
        if base is None:
            found = line_of_long_row(drop, drop.min().item(), drop.max().item(), limit)
        else:
            found = _line_of_long_weighted_row(drop, base, limit)
    return found or line_of_whole_row(drop, base, limit)


def line_of_whole_row(drop: Array, base: Array | None, limit: Limit) -> Line:
    """Without a sample, which misled or would not pay."""
    found = _eliminate(_Left.row(drop, base), limit)
    if found is None:
        scanned = scan(torch.from_numpy(drop), None if base is None else torch.from_numpy(base), limit)
        found = Line(*(float(part) for part in scanned))
    return found


def line_of_long_row(losses: Given, least: float, top: float, limit: Limit) -> Line | None:
    """The line over the losses as they are, which go from `least` to `top`: a sample brackets where it reaches 0, one
    pass sums what lies above the bracket, and only what lies inside is searched. None where the sample misleads."""
    zero, margin = _zero_of_sample(losses, None, limit)
    for width in (3 * margin, 12 * margin):
        # In the losses' own type, so that they are compared without being widened.
        low, high = np.clip((zero - width, zero + width), least, top).astype(losses.dtype).tolist()
        inside, above = _parted(losses, low, high, limit.penalty is None)
        left = _Left(inside.astype(np.float64) - high, None, len(losses), 0.0, above)
        if low == least or left.zero(limit) >= low - high:
            found = _eliminate(left, limit)
            if found is not None:
                # The smallest active loss itself, not what its distance rounds to.
                return found._replace(least=float(inside[left.away == found.least].min()))
    return None


def _line_of_long_weighted_row(drop: Array, base: Array, limit: Limit) -> Line | None:
    zero, margin = _zero_of_sample(drop, base, limit)
    edge = zero - 4 * margin
    left = _Left.row(drop, base).only(drop > edge)
    return _eliminate(left, limit) if left.zero(limit) >= edge else None


def stride(n: int) -> int:
    """A sample takes one in so many of n losses."""
    return max(1, math.isqrt(n) // 8)


def _zero_of_sample(losses: Given, base: Array | None, limit: Limit) -> tuple[float, float]:
    """Where the line of a sample reaches 0, and about how far from there that of all losses does."""
    step = stride(len(losses))
    some, share = losses[::step].astype(np.float64), None if base is None else base[::step]
    top = float(some.max())
    found = _eliminate(_Left.row(some - top, None if share is None else share / max(share.sum(), _TINY)), limit)
    if found is None:
        return top, math.inf
    active = np.count_nonzero(some - top >= found.least)
    return top + float(found.zero()), len(some) * active**-1.5 / float(found.slope)


def _parted(losses: Given, low: float, high: float, squares: bool) -> tuple[Given, tuple[float, float, float]]:
    """What lies from `low` to `high`; and of what lies above: how many, their distance from `high` and its square."""
    found, many, first, second = [], 0, 0.0, 0.0
    room = np.empty(min(BLOCK, len(losses)))
    for start in range(0, len(losses), BLOCK):
        block = losses[start : start + BLOCK]
        above = np.greater(block, high)
        many += int(np.count_nonzero(above))
        found.append(block.compress(np.greater_equal(block, low) ^ above))
        np.copyto(room[: len(block)], block)
        # By torch, which is the quicker of the two here.
        rise = torch.from_numpy(room[: len(block)]).sub_(high).relu_()
        first += rise.sum().item()
        second += rise.dot(rise).item() if squares else 0.0
    return np.concatenate(found), (many, first, second)


def _eliminate(left: _Left, limit: Limit) -> Line | None:
    """The line of what is left when nothing more is to be discarded; None where that is not found, or lies above
    the centre."""
    for _ in range(_PASSES):
        zero = left.zero(limit)
        if not (len(left.away) and zero <= 0.0):
            return None
        kept = np.greater(left.away, min(zero, -_TINY))
        if np.count_nonzero(kept) == len(kept):
            found = left.line(limit)
            if found is None or found.height > 0.0:
                return found
            kept = np.greater(left.away, found.least)
        left = left.only(kept)
    return None


def _dot(one: Array, other: Array) -> float:
    """BLAS is the quicker way to it on a short row; on a long one it starts threads, which wait for torch's as
    torch's wait for them."""
    return float(one.dot(other) if len(one) <= 8192 else np.einsum("i,i->", one, other))
