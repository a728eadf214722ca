"""Bounds from above on a whole batch at once: a ratio whose value meets one is optimal, whoever found it.

For any multipliers lam >= 0 and eta, and phi the integrand of the divergence,

    max_q  <=  lam * radius + eta + E sup_{0 <= r <= cap} [ r (l - eta) - lam phi(r) ].

`bound` reads the multipliers off a ratio. A bad reading makes the bound loose and never wrong. Losses come as
`drop` = (loss - max) / range in [-1, 0]; everything is (rows, n) float64, and `p` is 0 where an entry has no part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robustgrad.ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

Array = NDArray[np.float64]


def mean(p: Array, x: Array) -> Array:
    """Mean under p, (rows, 1)."""
    return (p * x).sum(-1, keepdims=True)


def phi(ambiguity: AmbiguitySet, r: Array) -> Array:
    """Integrand of the divergence."""
    match ambiguity:
        case TotalVariation():
            return np.abs(r - 1) / 2
        case ChiSquare():
            return (r - 1) ** 2 / 2
        case KL():
            far = r * np.log(np.maximum(r, 1e-300)) - r + 1
            y = r - 1
            return np.where(np.abs(y) < 1e-3, y**2 / 2 - y**3 / 6 + y**4 / 12 - y**5 / 20, far)
    return np.zeros_like(r)


def bound(ambiguity: AmbiguitySet, drop: Array, p: Array, ratio: Array, price: Array) -> Array:
    """Upper bound of the worst-case mean of `drop` less the price of the divergence, (rows, 1)."""
    match ambiguity:
        case CVaR(alpha=alpha):
            candidates = _cvar(alpha, drop, p, ratio)
        case TotalVariation():
            candidates = _total_variation(ambiguity, drop, p, ratio, price)
        case ChiSquare():
            candidates = _chi_square(ambiguity, drop, p, ratio, price)
        case KL():
            candidates = _kl(ambiguity, drop, p, ratio, price)
    # No distribution has a mean above the maximum.
    return np.minimum.reduce([np.zeros_like(price), *candidates])


def _least(on: NDArray[np.bool_], drop: Array) -> Array:
    return np.where(on, drop, 0.0).min(-1, keepdims=True)


def _cvar(alpha: float, drop: Array, p: Array, ratio: Array) -> list[Array]:
    def at(eta: Array) -> Array:
        return eta + mean(p, np.maximum(drop - eta, 0)) / alpha

    # The boundary is the least loss that counts, unless it is the one above an entry of rounding size.
    return [at(_least(ratio > least, drop)) for least in (0.0, 1e-6)]


def _total_variation(ambiguity: TotalVariation, drop: Array, p: Array, ratio: Array, price: Array) -> list[Array]:
    cap, radius = ambiguity.cap or np.inf, ambiguity.radius or 0.0

    def at(low: Array, high: Array) -> Array:
        """Below `low` a sample gives its mass, above `high` it receives."""
        lam, eta = high - low, (high + low) / 2
        y = drop - eta
        best = np.maximum(-lam / 2, y)
        if cap < np.inf:
            best = np.maximum(best, cap * y - lam / 2 * (cap - 1))
        return lam * radius + eta + mean(p, best)

    if ambiguity.penalty is not None:
        return [at(-price, np.zeros_like(price))]
    lows = [_least(ratio > least, drop) for least in (0.0, 1e-6)]
    if cap == np.inf:
        return [at(low, np.zeros_like(low)) for low in lows]
    highs = [_least(ratio > most, drop) for most in (1.0, 1 + 1e-6)]
    met = [at(x, x) for x in (*lows, *highs)]  # the cap is what binds
    return [at(low, np.maximum(low, high)) for low in lows for high in highs] + met


def _chi_square(ambiguity: ChiSquare, drop: Array, p: Array, ratio: Array, price: Array) -> list[Array]:
    on = p * (ratio > 0)
    on = on / on.sum(-1, keepdims=True)
    centre, level = mean(on, drop), mean(on, ratio)

    def at(lam: Array) -> Array:
        eta = centre - lam * (level - 1)
        z = np.maximum((drop - eta) / lam, -1)
        return lam * (ambiguity.radius or 0.0) + eta + lam * mean(p, z + z**2 / 2)

    if ambiguity.penalty is not None:
        return [at(price)]
    spread = mean(on, (drop - centre) ** 2)
    covariance, variance = mean(on, (drop - centre) * (ratio - level)), mean(on, (ratio - level) ** 2)
    read = np.where(variance > 0, covariance / np.where(variance > 0, variance, 1), 1.0)
    # Where nothing is cut off, the radius alone says the slope: the ratio may be too close to 1 to read.
    mild = np.sqrt(spread / (2 * max(ambiguity.radius or 0.0, 1e-30)))
    return [at(np.maximum(lam, 1e-300)) for lam in (read, mild)]


def _kl(ambiguity: KL, drop: Array, p: Array, ratio: Array, price: Array) -> list[Array]:
    def at(lam: Array) -> Array:
        """The best eta is known: the logarithm of the mean of the tilts."""
        less_one = mean(p, np.expm1(drop / lam))
        return lam * ((ambiguity.radius or 0.0) + np.log1p(np.maximum(less_one, -1 + 1e-300)))

    if ambiguity.temperature is not None:
        return [at(price)]
    tilted = p * ratio
    centre, logarithm = mean(tilted, drop), np.log(np.maximum(ratio, 1e-300))
    spread = mean(tilted, (drop - centre) ** 2)
    slope = mean(tilted, (drop - centre) * logarithm)
    read = np.where(slope > 0, spread / np.where(slope > 0, slope, 1), 1.0)
    variance = mean(p, (drop - mean(p, drop)) ** 2)
    mild = np.sqrt(variance / (2 * max(ambiguity.radius or 0.0, 1e-30)))
    return [at(np.maximum(lam, 1e-300)) for lam in (read, mild)]
