"""How far to tilt: the inverse temperature at which an exponential tilting reaches a KL radius."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._problem import ABYSS, Problem

_NEWTON_STEPS = 5
_GRID_SIZE = 2**11  # numbers tried at once while the bracket is narrowed; torch computes as many in one thread
_LOG2_E = 1 / math.log(2)
_TALLEST = 30.0  # exponent of the maximum when the losses are centred below it


def exp(values: Tensor) -> Tensor:
    """exp, by way of exp2: torch hands exp of 128 numbers and more to several threads, which wait for each
    other for milliseconds where the cores are busy with something else."""
    return (values * _LOG2_E).exp2()


def inverse_temperature(drop: Tensor, problem: Problem, radius: float) -> Tensor:
    """theta with KL(p exp(theta drop) || p) = radius, (..., 1); beyond every gap where none reaches it.

    KL rises in theta from 0 to -log P(argmax). Solved in u = log theta on h = log KL - log(-log P - KL),
    which has slope 2 for small theta and is nearly linear near saturation: the bracket is narrowed by a
    fixed factor, then a fixed number of Newton steps finishes, each replaced by a bisection if it leaves.
    """
    curve = _Curve.of(drop, problem)
    saturated = radius >= curve.entropy
    left = torch.where(saturated, 1.0, curve.entropy - radius)
    goal = math.log(radius) - left.log()
    low, high = _narrow(curve, goal, *curve.bracket(radius, left))
    u = torch.lerp(low, high, 0.5)
    for _ in range(_NEWTON_STEPS):
        h, slope = curve.at(u.exp())
        short = h < goal
        low, high = torch.where(short, u, low), torch.where(short, high, u)
        newton = u - (h - goal) / slope
        inside = newton == newton.clamp(low, high)
        u = torch.where(inside, newton, torch.lerp(low, high, 0.5))
    return torch.where(saturated, torch.finfo(u.dtype).tiny ** -0.5, u.exp())


def _narrow(curve: _Curve, goal: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The bracket 2^10 times narrower. Small problems try many points at once: there the launches cost
    more than the arithmetic."""
    points = min(31, max(1, _GRID_SIZE // max(1, curve.drop.numel())))
    parts = torch.arange(1, points + 1, dtype=low.dtype, device=low.device) / (points + 1)
    parts = parts.view(-1, *[1] * low.dim())
    for _ in range(math.ceil(10 / math.log2(points + 1))):
        u = torch.lerp(low, high, parts)
        short = curve.at(u.exp())[0] < goal
        low, high = torch.where(short, u, low).amax(0), torch.where(short, high, u).amin(0)
    return low, high


@dataclass(frozen=True, eq=False)
class _Curve:
    """The divergence of the tilted distribution as a function of theta."""

    problem: Problem
    drop: Tensor  # (..., n), 0 on excluded entries
    depth: Tensor  # mean distance below the maximum
    best: Tensor
    best_mass: Tensor
    entropy: Tensor
    square: Tensor
    others: Tensor  # 1 / P(argmax) below the maximum, 0 at it

    @classmethod
    def of(cls, drop: Tensor, problem: Problem) -> _Curve:
        if problem.valid is not None:
            drop = torch.where(problem.valid, drop, 0.0)
        best = drop == 0
        mass = problem.mass(best)
        return cls(problem, drop, -problem.expect(drop), best, mass, -mass.log(), drop.square(), ~best / mass)

    def bracket(self, radius: float, left: Tensor) -> tuple[Tensor, Tensor]:
        """log theta, from Var <= range^2 / 4 and from what the two largest values alone would need."""
        tiny = torch.finfo(self.drop.dtype).tiny
        span = (-self.drop.amin(-1, keepdim=True)).clamp_min(tiny)
        gap = (-torch.where(self.best, -ABYSS, self.drop).amax(-1, keepdim=True)).clamp_min(tiny**0.5)
        odds = 1.22 * (1 - self.best_mass) / (self.best_mass * left)
        low = 0.5 * math.log(8 * radius) - span.log()
        return low, torch.maximum((2 * odds.log()).clamp_min(1.0).log() - gap.log(), low)

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """h and dh/du. Centred at the mean, or for large theta a little below the maximum: no overflow,
        and expm1 keeps what a difference of exponentials near 1 would lose."""
        tiny = torch.finfo(theta.dtype).tiny ** 0.5
        rise = (theta * self.depth).clamp_max(_TALLEST)
        y = torch.addcmul(rise, theta, self.drop)
        expect = self.problem.expect
        growth = expect(y.expm1())
        # exp beside expm1, not expm1 + 1: far below the maximum the sum would be rounding alone.
        tilted = exp(y)
        drop, square, odds = expect(tilted * self.drop), expect(tilted * self.square), expect(tilted * self.others)
        normaliser = growth + 1
        fall = theta * drop / normaliser
        divergence = (fall + rise - growth.log1p()).clamp_min(tiny)
        # What is left up to saturation, as a sum of positive terms.
        left = ((odds / rise.exp()).log1p() - fall).clamp_min(tiny)
        variance = torch.addcmul(theta.square() * square / normaliser, fall, fall, value=-1)
        return (divergence / left).log(), variance * self.entropy / (divergence * left)
