"""Order statistics that the sets are built from: quantiles, top shares, cumulative sums.

On the CPU numpy sorts and selects: it uses the vector instructions of the processor, torch does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .._checks import readable
from ._problem import Problem, all_equal, compared


def cumsum(values: Tensor) -> Tensor:
    """Cumulative sum over the last dimension, also where CUDA's own would refuse to be deterministic."""
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return doubling_cumsum(values)
    return values.cumsum(-1)


def doubling_cumsum(values: Tensor) -> Tensor:
    """The same in log2(n) shifted additions, each of them deterministic on every device."""
    n, step = values.shape[-1], 1
    while step < n:
        values = torch.cat((values[..., :step], values[..., step:] + values[..., :-step]), -1)
        step *= 2
    return values


def quantile(problem: Problem, mass: float) -> Tensor:
    """The loss at which the heaviest-loss `mass` of the base is reached from above, (..., 1)."""
    losses, n = problem.losses, problem.losses.shape[-1]
    if problem.base is not None:
        ordered, order = losses.sort(-1, descending=True)
        above = (cumsum(problem.base.gather(-1, order)) < mass).sum(-1, keepdim=True)
        # The sum may stay a rounding below a mass of 1: never past the last entry that takes part.
        last = (problem.base > 0).sum(-1, keepdim=True) - 1
        return ordered.gather(-1, above.minimum(last).clamp_min(0))
    # The plain ceiling is exact: where rounding lands one entry off, its share comes out as 0 or 1.
    k = min(max(math.ceil(mass * n), 1), n)
    if losses.is_cpu:
        return _kth(losses, n - k + 1)
    # On CUDA kthvalue is refused in deterministic mode, and a sort costs no more.
    return losses.sort(-1, descending=True).values[..., k - 1 : k]


def _kth(losses: Tensor, k: int) -> Tensor:
    """The k-th smallest of each row, (..., 1)."""
    if not readable(losses):
        return losses.kthvalue(k, -1, keepdim=True).values
    return torch.from_numpy(np.partition(losses.numpy(), k - 1)[..., k - 1 : k])


def ascending(values: Tensor) -> Tensor:
    """The values of each row in ascending order."""
    return torch.from_numpy(np.sort(values.numpy())) if readable(values) else values.sort(-1).values


def top_share(problem: Problem, mass: float) -> Tensor:
    """How much of each entry lies in the heaviest-loss `mass` of the base, (..., n).

    1 above the quantile, 0 below, and equal for the ties on it; the mean under the base is `mass`.
    """
    edge = quantile(problem, mass)
    above, tied = compared(torch.gt, problem.losses, edge), compared(torch.eq, problem.losses, edge)
    boundary = ((mass - problem.expect(above)) / problem.expect(tied)).clamp_(0.0, 1.0)
    return above.addcmul_(tied, boundary.add_(problem.poison))


class Place(NamedTuple):
    """Where new losses, of base weight `weight`, come to stand among remembered ones of mass `total`."""

    total: Tensor
    above: Tensor
    tied: Tensor

    def top_share(self, mass: Tensor | float) -> Tensor:
        """How much of each lies in the top `mass`."""
        return (mass * self.total - self.above).clamp_min_(0.0).minimum(self.tied).div_(self.tied)


@dataclass(frozen=True, eq=False)
class Ranked:
    """Remembered losses in ascending order with the base mass up to each, for top shares of new ones."""

    ordered: Tensor  # (m,) ascending, -inf on empty slots
    mass: Tensor  # (m + 1,) mass of the first 0 .. m of them
    total: Tensor  # (1,)

    @classmethod
    def of(cls, losses: Tensor, weight: Tensor) -> Ranked:
        if all_equal(weight):
            ordered = ascending(losses)
            counts = torch.arange(len(weight) + 1, dtype=weight.dtype, device=weight.device)
            mass = counts.mul_(weight[0])
        else:
            ordered, order = torch.where(weight > 0, losses, -torch.inf).sort()
            mass = pad(cumsum(torch.where(weight > 0, weight, 0.0)[order]), (1, 0))
        return cls(ordered, mass, mass[-1:])

    def place(self, losses: Tensor, weight: Tensor | float) -> Place:
        upto = self.mass.take(torch.searchsorted(self.ordered, losses, right=True))
        below = self.mass.take(torch.searchsorted(self.ordered, losses))
        return Place(self.total + weight, self.total - upto, upto - below + weight)
