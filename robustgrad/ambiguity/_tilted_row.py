"""The exponential tilting of one row on the CPU, by numpy and without a copy of the losses; as `_tilting.py` has it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ._elimination import LONG, Array, Given, stride
from ._tilting import TIGHT, Curve, newton_of_one

_BLOCK = 8192  # losses worked on together: they stay in the cache
_LOOKS = 3  # at a long row before Newton's steps take over; ordinary losses need one
_TURNS = 6  # of Newton's method on a polynomial
_NEGLIGIBLE = 0.1  # what the series may leave out of theta, in roundings of a loss


def tilted(given: Given, top: float, theta: float) -> Array:
    """exp(theta (given - top)), scaled to mean 1."""
    ratio, total = np.empty(len(given)), 0.0
    for start in range(0, len(given), _BLOCK):
        part = ratio[start : start + _BLOCK]
        np.subtract(given[start : start + _BLOCK], top, out=part, dtype=np.float64)
        part *= theta
        total += float(np.exp(part, out=part).sum())
    ratio *= len(given) / total
    return ratio


def inverse_temperature(given: Given, least: float, top: float, radius: float) -> float:
    """theta at which the divergence is `radius`; in a long row the search begins at that of a sample."""
    guess = _of_sample(given, radius) if len(given) >= LONG else None
    if guess is not None and radius >= TIGHT:
        guess, settled = _closer(given, top, radius, guess)
        if settled:
            return guess
    return newton_of_one(_CurveOfRow.of(given, least, top, radius), guess)


def _of_sample(given: Given, radius: float) -> float | None:
    some = given[:: stride(len(given)) // 4].astype(np.float64)
    least, top = some.min().item(), some.max().item()
    return newton_of_one(_CurveOfRow.of(some, least, top, radius)) if least < top else None


def _closer(given: Given, top: float, radius: float, theta: float) -> tuple[float, bool]:
    """Nearer to the theta of the radius, and whether that is it."""
    negligible = _NEGLIGIBLE * np.finfo(given.dtype).eps.item()
    for _ in range(_LOOKS):
        step = Step.of(_moments(given, top, theta), radius, negligible)
        theta *= 1 + step.change
        if step.settled or not step.near:
            return theta, step.settled
    return theta, False


@np.errstate(over="ignore", invalid="ignore")  # Where powers overflow the series tells nothing, and says so.
def _moments(given: Given, top: float, theta: float) -> list[float]:
    """Means of exp(z) z^k for k up to 5, where z is theta times the distance below the maximum."""
    sums = np.zeros(6)
    for start in range(0, len(given), _BLOCK):
        z = np.subtract(given[start : start + _BLOCK], top, dtype=np.float64)
        z *= theta
        weight = np.exp(z)
        sums[:2] += weight.sum(), weight.dot(z)
        square = z * z
        for power in (2, 4):
            weight *= square
            sums[power : power + 2] += weight.sum(), weight.dot(z)
    means: list[float] = (sums / len(given)).tolist()
    return means


class Step(NamedTuple):
    """By what share of itself theta has to change for the divergence to be the radius, by its series there.

    With K the log of the normaliser at s theta the divergence is s K' - K, and its slope in s is s K'': cumulants of
    the tilted z at s = 1.
    """

    change: float
    near: bool  # the series tells the way
    settled: bool  # and the end of it

    @classmethod
    def of(cls, moments: list[float], radius: float, negligible: float) -> Step:
        mean, c2, c3, c4, c5 = _cumulants(*(moment / moments[0] for moment in moments[1:]))
        if not 0.0 < c2 < math.inf:
            return cls(0.0, False, False)
        missing = radius - (mean - math.log(moments[0]))
        second, third, fourth = (c3 + c2) / 2, (c4 / 2 + c3) / 3, (c5 / 6 + c4 / 2) / 4
        x = missing / c2
        if not abs(second * x) + abs(third * x * x) + abs(fourth * x * x * x) < c2 / 8:
            return cls(0.0, False, False)
        for _ in range(_TURNS):
            value = (((fourth * x + third) * x + second) * x + c2) * x - missing
            x -= value / (((4 * fourth * x + 3 * third) * x + 2 * second) * x + c2)
        # By how much each term is smaller than the one before.
        way = abs(x) * (1 + math.sqrt(c2))
        left_out = (abs(third) * way + abs(fourth * x)) * way * abs(x * x * x)
        return cls(x, True, left_out < negligible * c2)


def _cumulants(m1: float, m2: float, m3: float, m4: float, m5: float) -> tuple[float, float, float, float, float]:
    square, cube = m1 * m1, m1 * m1 * m1
    c2, c3 = m2 - square, m3 - 3 * m1 * m2 + 2 * cube
    c4 = m4 - 4 * m1 * m3 + 6 * square * m2 - 3 * square * square - 3 * c2 * c2
    return m1, c2, c3, c4, m5 - 5 * m1 * m4 + 10 * square * m3 - 10 * cube * m2 + 4 * square * cube - 10 * c3 * c2


@dataclass(eq=False)
class _CurveOfRow(Curve):
    given: Given
    top: float
    best: list[npt.NDArray[np.intp]]  # where the maximum is, by blocks

    @classmethod
    def of(cls, given: Given, least: float, top: float, radius: float) -> _CurveOfRow:
        n = len(given)
        best = [np.flatnonzero(given[start : start + _BLOCK] == top) for start in range(0, n, _BLOCK)]
        curve = cls(radius, sum(map(len, best)) / n, 0.0, 0.0, top - least, 0.0, given, top, best)
        first, second, next_ = 0.0, 0.0, -math.inf
        for drop, at_top in curve._drops():
            first += float(drop.sum())
            second += float(drop.dot(drop))
            drop[at_top] = -math.inf
            next_ = max(next_, float(drop.max()))
        curve.depth, curve.square, curve.gap = -first / n, second / n, -next_
        return curve

    def _drops(self) -> Iterator[tuple[Array, npt.NDArray[np.intp]]]:
        for number, at_top in enumerate(self.best):
            block = self.given[number * _BLOCK : (number + 1) * _BLOCK]
            yield np.subtract(block, self.top, dtype=np.float64), at_top

    def _moments(self, theta: float, rise: float) -> tuple[float, float, float, float | None]:
        n, others, first, second, growth = len(self.given), 0.0, 0.0, 0.0, 0.0
        for drop, at_top in self._drops():
            weight = drop * theta
            if self.tight:
                growth += float(np.expm1(weight + rise).sum())
            np.exp(weight, out=weight)
            weight[at_top] = 0.0
            others += float(weight.sum())
            first += float(weight.dot(drop))
            weight *= drop
            second += float(weight.dot(drop))
        # What is asked for is exp(rise) times that; its rounding is that of the exponentials.
        unit = math.exp(rise) / n
        return others * unit, first * unit, second * unit, growth / n if self.tight else None
