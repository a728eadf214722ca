"""Slow, obvious, float64: worst cases by bisection on one dual number, dual bounds, and a convex solver.

Nothing here follows the closed forms of `robustgrad.ambiguity`. A row is first reduced to its distinct
losses, written as `gap` = distance below the maximum (0 first, ascending) with the base `mass` of each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from robustgrad.ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

Array = NDArray[np.float64]
Given = Array | None


def solve(ambiguity: AmbiguitySet, losses: Array, base: Given = None, mask: Given = None) -> tuple[Array, float]:
    """Ratio and value of one row of losses, float64."""
    losses, p = np.asarray(losses, np.float64), _reference(losses, base, mask)
    ratio, on = np.zeros_like(losses), p > 0
    if not on.any() or not losses[on].max() < np.inf:
        ratio[on] = np.nan
        return ratio, np.nan
    top, gap, mass, inverse = _levels(losses[on], p[on])
    r = _ratio(ambiguity, gap, mass)
    ratio[on] = r[inverse]
    if top == -np.inf or (r[gap == np.inf] > 0).any():
        return ratio, -np.inf
    cost = price_of(ambiguity) * divergence(ambiguity, r, mass)
    return ratio, float(top - (mass * r * np.where(gap == np.inf, 0, gap)).sum() - cost)


def divergence(ambiguity: AmbiguitySet, ratio: Array, p: Array) -> float:
    """Divergence of the distribution ratio * p from p, in the set's own convention."""
    ratio, p = ratio[p > 0], p[p > 0] / p.sum()
    match ambiguity:
        case TotalVariation():
            return float((p * np.abs(ratio - 1)).sum() / 2)
        case ChiSquare():
            return float((p * (ratio - 1) ** 2).sum() / 2)
        case KL():
            return float((p * _phi(np.log(np.maximum(ratio, 1e-300)))).sum())
    return float(ratio.max())


def _reference(losses: Array, base: Given, mask: Given) -> Array:
    p = np.ones(len(losses)) if base is None else np.asarray(base, np.float64)
    p = p if mask is None else np.where(mask, p, 0.0)
    return p / p.sum() if p.sum() > 0 else p


def _levels(losses: Array, p: Array) -> tuple[float, Array, Array, NDArray[np.intp]]:
    negative, inverse = np.unique(-losses, return_inverse=True)
    gap = negative - negative[0] if len(negative) > 1 else np.zeros(1)
    return -negative[0], gap, np.bincount(inverse, p), inverse


def price_of(ambiguity: AmbiguitySet) -> float:
    return getattr(ambiguity, "penalty", None) or getattr(ambiguity, "temperature", None) or 0.0


def _bisect(reached: Callable[[float], bool], low: float, high: float, steps: int = 90) -> float:
    """The largest x in [low, high] that has not reached; in logarithms where low > 0."""
    middle = (lambda: np.sqrt(low) * np.sqrt(high)) if low > 0 else (lambda: (low + high) / 2)
    for _ in range(steps):
        x = float(middle())
        low, high = (low, x) if reached(x) else (x, high)
    return low


def _covered(mass: Array, amount: float) -> Array:
    """Share of each entry that the first `amount` of mass covers; the boundary is found by bisection."""
    low, high = 0, len(mass) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if mass[:middle].sum() <= amount else (low, middle - 1)
    share = (np.arange(len(mass)) < low).astype(float)
    share[low] = np.clip((amount - mass[:low].sum()) / mass[low], 0, 1)
    return share


def _ratio(ambiguity: AmbiguitySet, gap: Array, mass: Array) -> Array:
    match ambiguity:
        case CVaR(alpha=alpha):
            return _covered(mass, alpha) / alpha
        case TotalVariation(penalty=None, cap=None, radius=rho):
            moved = min(rho, 1 - mass[0])
            return 1 - _covered(mass[::-1], moved)[::-1] + _single(mass, moved)
        case TotalVariation(penalty=None, cap=cap, radius=rho):
            return _capped(mass, rho, cap)
        case TotalVariation(penalty=price):
            return np.where(gap > price, 0.0, 1.0) + _single(mass, mass[gap > price].sum())
        case ChiSquare(penalty=None, radius=rho):
            return _chi_square_ball(_scaled(gap), mass, rho)
        case ChiSquare(penalty=price):
            height = _bisect(lambda s: (mass * np.maximum(s - gap, 0)).sum() > price, 0, price / mass[0])
            return np.maximum(height - gap, 0) / price
        case KL(temperature=None, radius=rho):
            return _kl_ball(_scaled(gap), mass, rho)
        case KL(temperature=price):
            shift = _bisect(lambda a: (mass * np.exp(a - gap / price)).sum() > 1, 0, -np.log(mass[0]) + 1e-12)
            return np.exp(shift - gap / price)
    raise TypeError(ambiguity)


def _single(mass: Array, moved: float) -> Array:
    """All moved mass on the maximum."""
    return np.where(np.arange(len(mass)) == 0, moved / mass[0], 0.0)


def _scaled(gap: Array) -> Array:
    finite = gap[np.isfinite(gap)].max() or 1.0
    return np.where(np.isfinite(gap), gap / finite, 1e12)  # Far enough for -inf.


def _capped(mass: Array, rho: float, cap: float) -> Array:
    def flow(moved: float) -> tuple[Array, Array]:
        return _covered(mass[::-1], moved)[::-1], _covered(mass, moved / (cap - 1))

    def crossed(moved: float) -> bool:
        given, received = (np.flatnonzero(share) for share in flow(moved))
        return moved > min(rho, cap - 1) or given.min(initial=len(mass)) < received.max(initial=0)

    given, received = flow(rho if not crossed(rho) else _bisect(crossed, 0, rho))
    return 1 - given + (cap - 1) * received


def _chi_square_ball(gap: Array, mass: Array, rho: float) -> Array:
    if rho == 0 or len(gap) == 1:
        return np.ones_like(gap)
    if mass[0] * (1 + 2 * rho) >= 1:
        return _single(mass, 1.0)

    def ratio(s: float) -> Array:  # s is measured from the second level: near saturation it is tiny
        height = np.maximum(gap[1] - gap + s, 0)
        return height / (mass * height).sum()

    return ratio(_bisect(lambda s: (mass * (ratio(s) - 1) ** 2).sum() <= 2 * rho, 1e-40, 1e26))


def _tilt(gap: Array, mass: Array, theta: float) -> Array:
    """Logarithm of the ratio proportional to exp(-theta gap), without cancellation at small theta."""
    return -theta * gap - _log_mean(mass, -theta * gap)


def _log_mean(mass: Array, x: Array) -> float:
    """log E exp(x) where the greatest x is 0."""
    less_one = float((mass * np.expm1(x)).sum())
    return float(np.log1p(less_one) if less_one > -0.5 else np.log((mass * np.exp(x)).sum()))


def _phi(x: Array) -> Array:
    """r log r - r + 1 at r = exp(x): non-negative, and accurate near r = 1."""
    near = np.where(np.abs(x) < 0.05, x, 0.0)  # powers of the others would overflow
    series = sum(near**k * (k - 1) / np.prod(np.arange(1.0, k + 1)) for k in range(2, 13))
    return np.where(np.abs(x) < 0.05, series, np.exp(x) * (x - 1) + 1)


def _kl_ball(gap: Array, mass: Array, rho: float) -> Array:
    if rho == 0 or len(gap) == 1:
        return np.ones_like(gap)
    if rho >= -np.log(mass[0]):
        return _single(mass, 1.0)
    theta = _bisect(lambda t: (mass * _phi(_tilt(gap, mass, t))).sum() > rho, 1e-26, 2000 / gap[1])
    return np.exp(_tilt(gap, mass, theta))


def dual_bound(ambiguity: AmbiguitySet, losses: Array, base: Given = None, mask: Given = None) -> float:
    """Upper bound of the optimum: the dual function bounds it at every point; here at the best one found."""
    p = _reference(losses, base, mask)
    top, gap, mass, _ = _levels(np.asarray(losses, np.float64)[p > 0], p[p > 0])
    scale = gap.max() or 1.0
    return float(top + scale * _dual(ambiguity, gap / scale, mass, price_of(ambiguity) / scale))


def _dual(ambiguity: AmbiguitySet, gap: Array, mass: Array, price: float) -> float:
    """Least dual value with the maximum at 0 and the range at 1."""

    def excess(s: float) -> float:  # E (l - eta)_+ at eta = -s
        return float((mass * np.maximum(s - gap, 0)).sum())

    def tail(alpha: float) -> tuple[float, float]:  # alpha times CVaR_alpha <= alpha eta + E (l - eta)_+
        return min((excess(s) - alpha * s, -s) for s in gap)

    def conjugate(x: Array) -> Array:  # of the chi-square penalty
        return np.maximum(x, -1) + np.maximum(x, -1) ** 2 / 2

    match ambiguity:
        case CVaR(alpha=alpha):
            return tail(alpha)[0] / alpha
        case TotalVariation(penalty=None, cap=None, radius=rho):
            return tail(1 - rho)[0]
        case TotalVariation(penalty=None, cap=cap, radius=rho):
            (low, eta), (high, upper) = tail(1 - rho), tail(rho / (cap - 1))
            return low + (cap - 1) * high if upper >= eta else cap * tail(1 / cap)[0]
        case TotalVariation():
            return float(-(mass * np.minimum(gap, price)).sum())
        case ChiSquare(penalty=None, radius=rho):
            return min(0.0, _least(lambda s: _chi_square_dual(gap, mass, rho, s), 1e-40, 1e18))
        case ChiSquare():
            return _least(lambda s: price * (mass * conjugate((s - gap) / price)).sum() - s, 0, 1)
        case KL(temperature=None, radius=rho):
            return min(0.0, _least(lambda t: t * (rho + _log_mean(mass, -gap / t)), 1e-40, 1e18))
        case KL():
            top = min(1.0, -price * np.log(mass[0]))
            return _least(lambda s: price * (mass * np.expm1((s - gap) / price)).sum() - s, 0, top)
    raise TypeError(ambiguity)


def _chi_square_dual(gap: Array, mass: Array, rho: float, s: float) -> float:
    """eta + sqrt(1 + 2 rho) sqrt(E (l - eta)_+^2) at eta = -s, written so that a large s does not cancel."""
    z = np.minimum(gap, s)
    low = (mass * z).sum()
    mean, variance = s - low, (mass * (z - low) ** 2).sum()
    return float(mean * np.expm1((np.log1p(2 * rho) + np.log1p(variance / mean**2)) / 2) - low)


def _least(f: Callable[[float], float], low: float, high: float) -> float:
    """Least value of a unimodal f that ternary search finds; in logarithms where low > 0."""
    forth, back = (np.log, np.exp) if low > 0 else (float, float)
    a, b = forth(low), forth(high)
    for _ in range(80):
        third = (b - a) / 3
        a, b = (a, b - third) if f(back(a + third)) <= f(back(b - third)) else (a + third, b)
    return min(float(f(back(x))) for x in (a, b, forth(high)))


def cvxpy_value(ambiguity: AmbiguitySet, losses: Array, base: Given = None) -> float:
    """Value by an interior-point solver, from the definition of the set alone; for few ordinary losses."""
    import cvxpy as cp

    p = _reference(losses, base, None)
    losses, p = np.asarray(losses, np.float64)[p > 0], p[p > 0]
    q, price = cp.Variable(len(p), nonneg=True), price_of(ambiguity)
    limits = [cp.sum(q) == 1]
    match ambiguity:
        case CVaR(alpha=alpha):
            distance, radius = cp.max(cp.multiply(q, 1 / p)), 1 / alpha
        case TotalVariation(cap=cap):
            distance, radius = cp.norm1(q - p) / 2, ambiguity.radius
            limits += [] if cap is None else [q <= cap * p]
        case ChiSquare():
            distance, radius = cp.sum_squares(cp.multiply(q - p, p**-0.5)) / 2, ambiguity.radius
        case KL():
            distance, radius = cp.sum(cp.kl_div(q, p)), ambiguity.radius
    limits += [] if price else [distance <= radius]
    return float(cp.Problem(cp.Maximize(losses @ q - price * distance), limits).solve(solver=cp.CLARABEL))
