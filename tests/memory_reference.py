"""The memory pool in plain Python floats, one loss at a time, from the formulas; nothing shared with the package."""

from __future__ import annotations

import functools
import math

import numpy as np
import oracle

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation


def density(loss: float, memory: np.ndarray, share: float) -> float:
    """Ratio of `loss`, once it has joined the memory, under the uniform distribution on the top `share`."""
    above, ties = int((memory > loss).sum()), int((memory == loss).sum())
    covered = min(max(share * (len(memory) + 1) - above, 0.0), ties + 1.0)
    return covered / ((ties + 1) * share)


def ratio(ambiguity: AmbiguitySet, loss: float, memory: np.ndarray, step_size: int, unit: float) -> float:
    clamped = min(loss, memory.max())
    match ambiguity:
        case CVaR():
            return density(loss, memory, ambiguity.alpha)
        case TotalVariation(radius=None):
            top = max(1 / step_size, 1 / 64)
            shares = np.array([density(x, np.delete(memory, i), top) for i, x in enumerate(memory)])
            edge = (shares * memory).sum() / shares.sum() - ambiguity.penalty / unit
            moved = (memory < edge).mean()
            return (1 - moved) * density(loss, memory, 1 - moved) + moved * density(loss, memory, top)
        case TotalVariation():
            top, moved = max(1 / step_size, 1 / 64), ambiguity.radius
            if ambiguity.cap is not None:
                moved = min(moved, 1 - 1 / ambiguity.cap)
                top = moved / (ambiguity.cap - 1)
            kept = (1 - moved) * density(loss, memory, 1 - moved) if moved < 1 else 0.0
            return kept + moved * density(loss, memory, top)
        case ChiSquare():
            return _line(ambiguity, clamped, memory, unit)
        case KL():
            return _tilt(ambiguity, clamped, memory, unit)
    raise NotImplementedError(ambiguity)


@functools.lru_cache(maxsize=4)
def _solved(ambiguity: AmbiguitySet, memory: bytes) -> np.ndarray:
    """The slow oracle once per memory, not once per loss."""
    return oracle.solve(ambiguity, np.frombuffer(memory))[0]


def _line(ambiguity: ChiSquare, loss: float, memory: np.ndarray, unit: float) -> float:
    """The line through the oracle's two largest distinct active losses, or saturation."""
    scaled = ambiguity if ambiguity.penalty is None else ChiSquare(penalty=ambiguity.penalty / unit)
    found = _solved(scaled, memory.tobytes())
    values, where = np.unique(memory, return_index=True)
    active = [(values[i], found[where[i]]) for i in range(len(values)) if found[where[i]] > 1e-9]
    if len(active) == 1:
        return active[0][1] if loss >= active[0][0] else 0.0
    (low, r_low), (high, r_high) = active[0], active[-1]
    return max(0.0, r_high + (loss - high) * (r_high - r_low) / (high - low))


def _tilt(ambiguity: KL, loss: float, memory: np.ndarray, unit: float) -> float:
    if ambiguity.temperature is not None:
        theta = unit / ambiguity.temperature
    else:
        found = _solved(ambiguity, memory.tobytes())
        high, low = memory.argmax(), memory.argmin()
        theta = math.log(found[high] / found[low]) / (memory[high] - memory[low])
    return min(math.exp(theta * (loss - memory.max())) / np.exp(theta * (memory - memory.max())).mean(), 100.0)


class Memory:
    """Ring, units and rule of MATH, advanced one optimizer step at a time."""

    def __init__(self, ambiguity: AmbiguitySet, size: int) -> None:
        self.ambiguity, self.size = ambiguity, size
        self.ring: list[float] = []
        self.settled = self.mean = self.variance = self.level = 0.0
        self.spread, self.step_size = 1.0, 0

    def step(self, losses: np.ndarray) -> np.ndarray:
        """The ratios of a step's losses; afterwards they are remembered."""
        ratios = np.array([self._ratio(x) for x in losses])
        self._learn(losses[np.isfinite(losses)])
        return ratios

    def _ratio(self, loss: float) -> float:
        if math.isnan(loss) or loss == math.inf:
            return math.nan
        if len(self.ring) < 64:
            return 1.0
        return ratio(
            self.ambiguity, (loss - self.level) / self.spread, np.array(self.ring), self.step_size, self.spread
        )

    def _learn(self, losses: np.ndarray) -> None:
        decay = 0.5 ** (len(losses) / 256)
        old, new = decay * self.settled, 1 - decay
        self.settled = old + new
        gap = losses.mean() - self.mean
        self.variance = (old * self.variance + new * losses.var()) / self.settled + (
            old * new / self.settled**2 * gap**2
        )
        self.mean += new / self.settled * gap
        spread = math.sqrt(self.variance) if self.variance > 0 else 1.0
        if (
            abs(self.mean - self.level) > 0.25 * self.spread
            or abs(math.log(spread / self.spread)) > 0.25
            or self.settled < 0.9
        ):
            self.level, self.spread = self.mean, spread
        self.ring = (self.ring + [(x - self.level) / self.spread for x in losses])[-self.size :]
        self.step_size = len(losses)
