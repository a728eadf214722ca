"""How far to tilt: the inverse temperature at which an exponential tilting reaches a KL radius."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import readable
from ._problem import Problem

# Numbers tried at once while the bracket is narrowed: on a CPU torch computes as many in one thread.
_GRID_SIZE, _GRID_SIZE_ELSEWHERE = 2**11, 2**18
_NEWTON_STEPS = 5  # from a bracket that was narrowed
_MOST_STEPS = 60  # from one that was not; ordinary losses need about 5
_SETTLED = 1e-7  # a step so small squares to nothing
_NOTHING = 1e-11  # the step that would follow, as steps shrink with their square
_LOG2_E = 1 / math.log(2)
_TALLEST = 30.0  # exponent of the maximum when the losses are centred below it
_TINY = torch.finfo(torch.float64).tiny
TIGHT = 1e-4  # radius below which the divergence drowns in the rounding of an exponential near 1


def exp(values: Tensor) -> Tensor:
    """exp, by way of exp2: torch hands exp of 128 numbers and more to several threads, which wait for each
    other for milliseconds where the cores are busy with something else."""
    return (values * _LOG2_E).exp2_()


def inverse_temperature(drop: Tensor, problem: Problem, radius: float) -> Tensor | float:
    """theta with KL(p exp(theta drop) || p) = radius, (..., 1); beyond every gap where none reaches it.

    KL rises in theta from 0 to -log P(argmax). Solved in u = log theta on h = log KL - log(-log P - KL),
    which has slope 2 for small theta and is nearly linear near saturation, by Newton steps, each replaced
    by a bisection if it leaves the bracket. Where the values may not be looked at, the bracket is narrowed
    by a fixed factor and a fixed number of steps finishes.
    """
    curve = _CurveOfRows.of(drop, problem, radius)
    if not isinstance(curve.best_mass, Tensor):
        return newton_of_one(curve)
    saturated = radius >= curve.entropy
    left = torch.where(saturated, 1.0, curve.entropy - radius)
    goal = math.log(radius) - left.log()
    low, high, u = curve.bracket(left)
    look = readable(drop) and drop.numel() > _GRID_SIZE
    if not look:
        low, high = _narrow(curve, goal, low, high)
        u = torch.lerp(low, high, 0.5)
    u = _newton(curve, goal, low, high, u, look)
    return torch.where(saturated, torch.finfo(u.dtype).tiny ** -0.5, u.exp())


def _newton(curve: Curve, goal: Tensor, low: Tensor, high: Tensor, u: Tensor, look: bool) -> Tensor:
    settled = torch.zeros_like(u, dtype=torch.bool)
    for _ in range(_MOST_STEPS if look else _NEWTON_STEPS):
        h, slope = curve.at(u.exp())
        short = h < goal
        low, high = torch.where(short, u, low), torch.where(short, high, u)
        step = (goal - h) / slope
        newton = u + step
        inside = newton == newton.clamp(low, high)
        newton = torch.where(inside, newton, torch.lerp(low, high, 0.5))
        # A row that has settled stays as it is: how long the others take must not show in it.
        u = torch.where(settled, u, newton) if look else newton
        if look:
            settled |= ~(step.abs() > _SETTLED)
            if bool(settled.all()):
                break
    return u


def newton_of_one(curve: Curve, guess: float | None = None) -> float:
    """The same with Python's numbers, which for one row are much cheaper than tensors of one entry."""
    if not curve.radius < curve.entropy:
        return float(curve.entropy + _TINY**-0.5)
    left = curve.entropy - curve.radius
    goal = math.log(curve.radius) - math.log(left)
    low, high, u = curve.bracket(left)
    u = u if guess is None else min(max(math.log(guess), low), high)
    before = 0.0
    for _ in range(_MOST_STEPS):
        h, slope = curve.at(math.exp(u))
        low, high = (u, high) if h < goal else (low, u)
        step = (goal - h) / slope if slope > 0.0 else math.inf
        newton = u + step
        u = newton if low <= newton <= high else (low + high) / 2
        if abs(step) <= _SETTLED or step * step * abs(step) <= _NOTHING * before * before:
            break
        before = step if u == newton else 0.0
    return math.exp(u)


def _narrow(curve: _CurveOfRows, goal: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The bracket 2^10 times narrower. Small problems try many points at once: there the launches cost
    more than the arithmetic."""
    size = _GRID_SIZE if curve.drop.is_cpu else _GRID_SIZE_ELSEWHERE
    points = min(31, max(1, size // max(1, curve.drop.numel())))
    parts = torch.arange(1, points + 1, dtype=low.dtype, device=low.device) / (points + 1)
    parts = parts.view(-1, *[1] * low.dim())
    for _ in range(math.ceil(10 / math.log2(points + 1))):
        u = torch.lerp(low, high, parts)
        short = curve.at(u.exp())[0] < goal
        low, high = torch.where(short, u, low).amax(0), torch.where(short, high, u).amin(0)
    return low, high


@dataclass(eq=False)
class Curve(ABC):
    """The divergence of the tilted distribution as a function of theta.

    What is one number per row is a Python float for a single row on the CPU, else a tensor (..., 1); the
    formulas are written once for both.
    """

    radius: float
    best_mass: Any
    depth: Any  # mean distance below the maximum
    square: Any  # mean squared distance
    span: Any
    gap: Any  # from the maximum to the next

    def __post_init__(self) -> None:
        self.entropy = _entropy(self.best_mass)

    def bracket(self, left: Any) -> tuple[Any, Any, Any]:
        """log theta, from Var <= range^2 / 4 and from what the two largest values alone would need; and a
        first guess, right for losses that are normal."""
        m, small = _functions(left), _TINY**0.5
        odds = 1.22 * (1 - self.best_mass) / (self.best_mass * left)
        low = 0.5 * math.log(8 * self.radius) - m.log(_at_least(self.span, small))
        steep = m.log(_at_least(2 * m.log(_at_least(odds, small)), 1.0))
        high = _at_least(steep - m.log(_at_least(self.gap, small)), low)
        variance = _at_least(self.square - self.depth * self.depth, small)
        guess = 0.5 * (math.log(2 * self.radius) - m.log(variance))
        return low, high, _at_most(_at_least(guess, low), high)

    def at(self, theta: Any) -> tuple[Any, Any]:
        """h and dh/du. Centred at the mean, or for large theta a little below the maximum: no overflow."""
        m, small = _functions(theta), _TINY**0.5
        rise = _at_most(theta * self.depth, _TALLEST)
        others, first, second, growth = self._moments(theta, rise)
        peak = m.exp(rise)
        normaliser = peak * self.best_mass + others
        log_normaliser = m.log(normaliser) if growth is None else m.log1p(growth)
        fall = theta * first / normaliser
        divergence = _at_least(fall + rise - log_normaliser, small)
        # What is left up to saturation, as a sum of positive terms.
        left = _at_least(m.log1p(others / (peak * self.best_mass)) - fall, small)
        variance = theta * theta * second / normaliser - fall * fall
        return m.log(divergence / left), variance * self.entropy / (divergence * left)

    @property
    def tight(self) -> bool:
        """Whether the divergence would drown in the rounding of the normaliser."""
        return self.radius < TIGHT

    @abstractmethod
    def _moments(self, theta: Any, rise: Any) -> Any:
        """Over what is below the maximum, of exp(theta drop + rise): the mean, with drop and with its square. And the
        mean of all less 1, without cancellation, if that is asked for."""


@dataclass(eq=False)
class _CurveOfRows(Curve):
    problem: Problem
    drop: Tensor  # (..., n), 0 on excluded entries
    powers: Tensor  # (..., 3, n): base mass of what is below the maximum, times 1, drop, drop^2

    @classmethod
    def of(cls, drop: Tensor, problem: Problem, radius: float) -> _CurveOfRows:
        if problem.valid is not None:
            drop = torch.where(problem.valid, drop, 0.0)
        best = drop == 0.0
        powers = torch.stack((drop.sign().neg_(), drop, drop * drop), -2)
        powers.mul_(1 / drop.shape[-1] if problem.base is None else problem.base.unsqueeze(-2))
        ends = drop.amin(-1, keepdim=True), drop.masked_fill(best, -torch.inf).amax(-1, keepdim=True)
        sums, rest = powers.sum(-1), (*ends, problem.mass(best))
        one = drop.dim() == 1 and readable(drop)
        _, mean, square = sums.tolist() if one else _split(sums)
        lowest, second, mass = (number.item() for number in rest) if one else rest
        return cls(radius, mass, -mean, square, -lowest, -second, problem, drop, powers)

    def _moments(self, theta: Any, rise: Any) -> Any:
        # As `exp`, but in place: for many rows a tensor more costs as much as what is computed in it.
        tilted = (self.drop * (theta * _LOG2_E)).add_(rise * _LOG2_E).exp2_()
        if tilted.is_cpu and not self.tight:
            found = torch.matmul(self.powers, tilted.unsqueeze(-1)).squeeze(-1)
        else:
            # torch sums in pairs, which loses less; and cuBLAS would refuse to be deterministic.
            found = (self.powers * tilted.unsqueeze(-2)).sum(-1)
        # expm1 keeps what a difference of exponentials near 1 would lose.
        growth = self.problem.expect((self.drop * theta).add_(rise).expm1_()) if self.tight else None
        if not isinstance(self.depth, float):
            return *_split(found), growth
        return *found.tolist(), growth if growth is None else growth.item()


def _entropy(best_mass: Any) -> Any:
    """The divergence of all mass on the maximum; a row without an answer has no maximum."""
    if isinstance(best_mass, Tensor):
        return -best_mass.log()
    return -math.log(best_mass) if best_mass > 0.0 else math.nan


def _split(numbers: Tensor) -> Any:
    """(..., k) as k tensors (..., 1)."""
    return torch.split(numbers, 1, -1)


def _functions(number: Any) -> Any:
    """log, log1p and exp for what is one number per row."""
    return torch if isinstance(number, Tensor) else math


def _at_least(number: Any, low: Any) -> Any:
    if not isinstance(number, Tensor):
        return max(number, low)
    return number.maximum(low) if isinstance(low, Tensor) else number.clamp_min(low)


def _at_most(number: Any, high: Any) -> Any:
    if not isinstance(number, Tensor):
        return min(number, high)
    return number.minimum(high) if isinstance(high, Tensor) else number.clamp_max(high)
