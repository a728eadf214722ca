"""The exponential tilting of one row on the CPU, by numpy and without a copy of the losses; as `_tilting.py` has it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ._elimination import LONG, Array, Given, stride
from ._tilting import Curve, newton_of_one

_BLOCK = 8192  # losses worked on together: they stay in the cache


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
    """theta at which the divergence is `radius`; in a long row Newton's steps begin at that of a sample."""
    guess = None
    if len(given) >= LONG:
        some = given[:: stride(len(given)) // 4]
        lowest, highest = some.min().item(), some.max().item()
        guess = newton_of_one(_CurveOfRow.of(some, lowest, highest, radius)) if lowest < highest else None
    return newton_of_one(_CurveOfRow.of(given, least, top, radius), guess)


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
