"""The alternatives to an exact solve: bisection on the dual in torch (as fast-dro does, from arXiv 2010.05893),
scipy's root finding, entmax's sparsemax, and a general convex solver."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

Array = NDArray[np.float64]
STEPS = 36  # 2^-36 of the bracket: ratios good to about 1e-10.


def bisection(ambiguity: AmbiguitySet, losses: Tensor) -> Tensor | None:
    """Ratios of (..., n) losses in float64 by a fixed number of halvings; None where no equation is left.

    Brackets are as tight as the theory allows, rows are solved together, and no step waits for the device.
    """
    losses = losses.double()
    top = losses.amax(-1, keepdim=True)
    match ambiguity:
        case CVaR(alpha=alpha):
            return top_mass(losses, alpha) / alpha
        case TotalVariation(penalty=None, cap=None, radius=rho):
            best = losses == top
            kept = top_mass(losses, 1 - rho)
            return kept + best * (rho * losses.shape[-1] / best.sum(-1, keepdim=True, dtype=losses.dtype))
        case TotalVariation(penalty=None, cap=cap, radius=rho):
            moved = min(rho, 1 - 1 / cap)
            return top_mass(losses, 1 - moved) + (cap - 1) * top_mass(losses, moved / (cap - 1))
        case ChiSquare(penalty=None, radius=rho):
            return chi_square_ball(losses, top, rho)
        case ChiSquare(penalty=price):
            return chi_square_penalty(losses, top, price)
        case KL(temperature=None, radius=rho):
            return kl_ball(losses - top, rho)
    return None


def halve(above: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The point of [low, high] from which `above` holds."""
    for _ in range(STEPS):
        middle = torch.lerp(low, high, 0.5)
        beyond = above(middle)
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return high


def top_mass(losses: Tensor, mass: float) -> Tensor:
    """How much of each loss lies in the top `mass` of the samples; ties share."""
    count = mass * losses.shape[-1]
    low, high = losses.aminmax(dim=-1, keepdim=True)
    edge = halve(lambda t: (losses > t).sum(-1, keepdim=True) < count, low - (high - low), high)
    # The bracket holds one distinct loss: the largest that does not exceed its upper end.
    edge = torch.where(losses <= edge, losses, -torch.inf).amax(-1, keepdim=True)
    above, tied = losses > edge, losses == edge
    share = (count - above.sum(-1, keepdim=True, dtype=losses.dtype)) / tied.sum(-1, keepdim=True)
    return above + tied * share.clamp(0, 1)


def chi_square_ball(losses: Tensor, top: Tensor, rho: float) -> Tensor:
    variance, mean = torch.var_mean(losses, -1, correction=0, keepdim=True)
    plain = mean - (variance / (2 * rho)).sqrt()  # the threshold if no ratio is 0
    low = torch.minimum(plain, losses.amin(-1, keepdim=True))

    def steep(eta: Tensor) -> Tensor:
        excess = (losses - eta).clamp_min_(0)
        first = excess.mean(-1, keepdim=True)
        return excess.square_().mean(-1, keepdim=True) > (1 + 2 * rho) * first.square()

    excess = (losses - halve(steep, low, top)).clamp_min_(0)
    return excess / excess.mean(-1, keepdim=True)


def chi_square_penalty(losses: Tensor, top: Tensor, price: float) -> Tensor:
    low = torch.minimum(top, losses.mean(-1, keepdim=True)) - price

    def little(tau: Tensor) -> Tensor:
        return (losses - tau).clamp_min_(0).mean(-1, keepdim=True) < price

    return (losses - halve(little, low, top)).clamp_min_(0) / price


def kl_ball(drop: Tensor, rho: float) -> Tensor:
    n, best = drop.shape[-1], drop == 0
    mass = best.sum(-1, keepdim=True, dtype=drop.dtype) / n
    left = -mass.log() - rho
    gap = -torch.where(best, -torch.inf, drop).amax(-1, keepdim=True)
    low = (8 * rho) ** 0.5 / -drop.amin(-1, keepdim=True)
    high = (2 * (1.22 * (1 - mass) / (mass * left)).log()).clamp_min(1) / gap

    def far(log_theta: Tensor) -> Tensor:
        exponent = drop * log_theta.exp()
        weight = exponent.exp()
        total = weight.mean(-1, keepdim=True)
        return weight.mul_(exponent).mean(-1, keepdim=True) / total - total.log() > rho

    tilted = (drop * halve(far, low.log(), high.log()).exp()).exp()
    return torch.where(left > 0, tilted / tilted.mean(-1, keepdim=True), best / mass)


def root_finding(ambiguity: AmbiguitySet, losses: Tensor) -> Tensor | None:
    """Ratios of one row by Brent's method on its dual equation, in numpy; None where there is none to solve."""
    x = losses.double().numpy()
    match ambiguity:
        case ChiSquare(penalty=None, radius=rho):
            return torch.from_numpy(_brent_chi_square_ball(x, rho))
        case ChiSquare(penalty=price):
            tau = _brent(lambda tau: np.maximum(x - tau, 0).mean() - price, x.mean() - price, x.max())
            return torch.from_numpy(np.maximum(x - tau, 0) / price)
        case KL(temperature=None, radius=rho):
            return torch.from_numpy(_brent_kl_ball(x - x.max(), rho))
    return None


def _brent(function: Callable[[float], float], low: float, high: float) -> float:
    from scipy.optimize import brentq

    return float(brentq(function, low, high, xtol=1e-13, rtol=1e-13))


def _brent_chi_square_ball(x: Array, rho: float) -> Array:
    low, high = x.mean() - 2 * np.sqrt(x.var() / rho) - np.ptp(x), x.max() - 1e-9 * np.ptp(x)

    def excess(eta: float) -> float:
        above = np.maximum(x - eta, 0)
        return float((above**2).mean() / above.mean() ** 2 - 1 - 2 * rho)

    above = np.maximum(x - (_brent(excess, low, high) if excess(high) > 0 else high), 0)
    return above / above.mean()


def _brent_kl_ball(drop: Array, rho: float) -> Array:
    def tilted(theta: float) -> Array:
        weight = np.exp(theta * drop)
        return weight / weight.mean()

    def excess(log_theta: float) -> float:
        ratio = tilted(np.exp(log_theta))
        return float((ratio * np.log(np.maximum(ratio, 1e-300))).mean() - rho)

    low = 0.5 * np.log(8 * rho) - np.log(np.ptp(drop))
    high = np.log(800 / -drop[drop < 0].max())
    return tilted(np.exp(_brent(excess, low, high) if excess(high) > 0 else high))


def sparsemax(ambiguity: AmbiguitySet, losses: Tensor) -> Tensor | None:
    """Ratios by entmax, whose sparsemax is the worst case under a chi-square penalty, if it is installed."""
    if not isinstance(ambiguity, ChiSquare) or ambiguity.penalty is None or not find_spec("entmax"):
        return None
    import entmax

    n = losses.shape[-1]
    found: Tensor = entmax.sparsemax(losses.double() / (n * ambiguity.penalty), dim=-1)
    return found * n


def convex_program(ambiguity: AmbiguitySet, n: int) -> Callable[[Tensor], Tensor]:
    """A cvxpy problem built once, with the losses as its parameter; solving it gives the ratios.

    Solving raises cvxpy.error.SolverError where the solver gives up.
    """
    import cvxpy as cp

    losses, ratio = cp.Parameter(n), cp.Variable(n, nonneg=True)
    rules: list[Any] = [cp.sum(ratio) == n]
    price = getattr(ambiguity, "penalty", None) or getattr(ambiguity, "temperature", None) or 0.0
    spent: Any = 0.0
    match ambiguity:
        case CVaR(alpha=alpha):
            rules += [ratio <= 1 / alpha]
        case TotalVariation(cap=cap):
            spent = cp.sum(cp.pos(ratio - 1))  # half the L1 norm, since both sum to n
            rules += [] if cap is None else [ratio <= cap]
        case ChiSquare():
            spent = cp.sum_squares(ratio - 1) / 2
        case KL():
            spent = cp.sum(cp.kl_div(ratio, 1))
    radius = getattr(ambiguity, "radius", None)
    rules += [] if radius is None else [spent <= radius * n]
    problem = cp.Problem(cp.Maximize(losses @ ratio - price * spent), rules)

    def solve(values: Tensor) -> Tensor:
        losses.value = values.double().cpu().numpy()
        problem.solve(solver=cp.CLARABEL)
        return torch.as_tensor(ratio.value)

    return solve
