"""The inverse temperature of a KL ball inside a kernel; the formulas are those of `_tilting.py`."""

from __future__ import annotations

import triton
import triton.language as tl

BEYOND: tl.constexpr = tl.constexpr(6.703903964971298e153)  # an inverse temperature at which any gap is everything


@triton.jit
def _log1p(x):
    """log(1 + x), exact for small x: the rounding of 1 + x is divided out again."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1, likewise."""
    u = tl.exp(x)
    logarithm = tl.log(tl.where((u == 1.0) | (u == 0.0), 2.0, u))
    return tl.where(u == 1.0, x, tl.where(u == 0.0, -1.0, (u - 1.0) * (x / logarithm)))


@triton.jit
def _sum(values):
    return tl.sum(values, 1, keep_dims=True)


@triton.jit
def curve_of(theta, others, first, second, growth, best_mass, depth, tight):
    """h = log KL - log(entropy - KL) at theta, and its slope in log theta, from the sums of the tilted losses."""
    rise = tl.minimum(theta * depth, 30.0)
    peak = tl.exp(rise) * best_mass
    normaliser = peak + others
    # Where the radius is tight the divergence would drown in the rounding of exponentials near 1.
    growth = tl.where(tight, _log1p(growth), tl.log(normaliser))
    fall = theta * first / normaliser
    divergence = tl.maximum(fall + rise - growth, 1.4916681462400413e-154)
    left = tl.maximum(_log1p(others / peak) - fall, 1.4916681462400413e-154)
    variance = theta * theta * second / normaliser - fall * fall
    return tl.log(divergence / left), -variance * tl.log(best_mass) / (divergence * left)


@triton.jit
def _curve(theta, drop, share, under, best_mass, depth, tight):
    """The same for rows of losses in registers."""
    y = drop * theta + tl.minimum(theta * depth, 30.0)
    tilted = tl.exp(y) * under
    growth = tl.zeros_like(depth)
    if tight:
        growth = _sum(share * expm1(y))
    return curve_of(
        theta, _sum(tilted), _sum(tilted * drop), _sum(tilted * drop * drop), growth, best_mass, depth, tight
    )


@triton.jit
def bracket_of(span, gap, square, best_mass, depth, radius, left):
    """log theta, from below and above, and a first guess that is right for normal losses."""
    small: tl.constexpr = 1.4916681462400413e-154
    odds = 1.22 * (1.0 - best_mass) / (best_mass * left)
    low = 0.5 * tl.log(8.0 * radius) - tl.log(tl.maximum(span, small))
    steep = tl.log(tl.maximum(2.0 * tl.log(tl.maximum(odds, small)), 1.0))
    high = tl.maximum(steep - tl.log(tl.maximum(gap, small)), low)
    variance = tl.maximum(square - depth * depth, small)
    guess = 0.5 * (tl.log(2.0 * radius) - tl.log(variance))
    return low, high, tl.minimum(tl.maximum(guess, low), high)


@triton.jit
def moved(h, slope, goal, low, high, u, settled):
    """Bracket and guess after a Newton step, or a bisection if that leaves the bracket; what has settled stays."""
    short = h < goal
    low, high = tl.where(short, u, low), tl.where(short, high, u)
    move = (goal - h) / tl.where(slope > 0.0, slope, 1e-300)
    newton = u + move
    inside = (newton >= low) & (newton <= high)
    u = tl.where(settled, u, tl.where(inside, newton, (low + high) / 2))
    return low, high, u, settled | (tl.abs(move) <= 1e-7)


@triton.jit
def inverse_temperature(drop, weight, total, radius):
    """theta (R, 1) with KL(p exp(theta drop) || p) = radius; beyond every gap where none reaches it.

    `drop` is 0 where the weight is. Newton steps in log theta, each replaced by a bisection if it leaves the
    bracket; a row that has settled stays as it is, so that no other row shows in it.
    """
    share, tight = weight / total, radius < 1e-4
    radius = radius + tl.zeros_like(total)
    under = tl.where(drop < 0.0, share, 0.0)
    best_mass = _sum(share - under)
    best_mass = tl.where(best_mass > 0.0, best_mass, 1.0)
    entropy = -tl.log(best_mass)
    saturated = radius >= entropy
    left = tl.where(saturated, 1.0, entropy - radius)
    goal = tl.log(radius) - tl.log(left)
    depth = -_sum(under * drop)
    gap = -tl.max(tl.where(drop == 0.0, -float("inf"), drop), 1, keep_dims=True)
    square, span = _sum(under * drop * drop), -tl.min(drop, 1, keep_dims=True)
    low, high, u = bracket_of(span, gap, square, best_mass, depth, radius, left)
    settled = saturated
    step = 0
    while (tl.min(settled.to(tl.int32)) == 0) & (step < 60):
        h, slope = _curve(tl.exp(u), drop, share, under, best_mass, depth, tight)
        low, high, u, settled = moved(h, slope, goal, low, high, u, settled)
        step += 1
    return tl.where(saturated, BEYOND, tl.exp(u))
