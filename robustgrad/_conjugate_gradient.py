"""Conjugate gradient on vectors that are held as one tensor for each parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Vector = tuple[Tensor, ...]  # one tensor for each parameter


def conjugate_gradient(operator: Callable[[Vector], Vector], target: Vector, iterations: int) -> Vector:
    """Solve operator(x) = target from x = 0, in a fixed number of iterations."""
    solution = tuple(torch.zeros_like(part) for part in target)
    left, search, size = target, target, dot(target, target)
    for _ in range(iterations):
        image = operator(search)
        bend = dot(search, image)
        # Solved already: then the search direction is zero, and so must the step be. NaN goes through.
        step = torch.where(bend == 0, 0.0, size / torch.where(bend == 0, 1.0, bend))
        solution = moved(solution, step, search)
        left = moved(left, -step, image)
        before, size = size, dot(left, left)
        search = moved(left, size / torch.where(before == 0, 1.0, before), search)
    return solution


def moved(start: Vector, step: Tensor, along: Vector) -> Vector:
    return tuple(s + step * a for s, a in zip(start, along, strict=True))


def dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
