"""CVaR: the mean of the worst share of the losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .. import _checks
from ._kernel import Recipe
from ._problem import Problem
from ._sorted import Ranked, quantile, top_share
from .base import AmbiguitySet
from .total_variation import TopRule


@dataclass(frozen=True, repr=False)
class CVaR(AmbiguitySet):
    """Conditional value at risk: the mean of the worst share `alpha` of the losses.

        max_q <q, losses>   s.t.  q <= p / alpha,  sum q = 1,  q >= 0

    The heaviest-loss mass alpha has ratio 1/alpha, the entries on its boundary share what is left,
    the rest has ratio 0. alpha = 1 is the mean; alpha <= P(argmax) is the maximum, ties sharing.
    `threshold` is the value at risk, the smallest loss that counts; `divergence` is max q/p <= 1/alpha.

    Args:
        alpha: in (0, 1], the share of the mass that counts.
    Raises: ValueError or TypeError: alpha outside (0, 1].
    Source: Rockafellar & Uryasev (2000); arXiv 2010.05893.
    """

    alpha: float

    def __post_init__(self) -> None:
        _checks.number("alpha", self.alpha, 0.0, 1.0, "It is the share of losses that count.", open_low=True)

    @property
    def _share(self) -> float:
        """alpha, kept away from the subnormal numbers, whose quotients have no digits left."""
        return max(self.alpha, 1e-300)

    @property
    def saturating_size(self) -> float:
        return 1 / self._share

    def memory_size(self, step_size: int) -> int:
        return max(super().memory_size(step_size), math.ceil(50 / self._share))

    def _worst_case(self, problem: Problem) -> Tensor:
        if self.alpha == 1:
            return problem.plain()
        return top_share(problem, self._share).div_(self._share)

    def _recipe(self) -> Recipe:
        return Recipe("plain") if self.alpha == 1 else Recipe("top", (self._share, 1 / self._share))

    def _threshold(self, problem: Problem) -> Tensor:
        return quantile(problem, self._share)

    def fit(self, losses: Tensor, weight: Tensor, *, unit: Tensor | float, step_size: Tensor) -> TopRule:
        return TopRule.of(Ranked.of(losses, weight), [self._share], [1 / self._share])

    def _divergence(self, ratio: Tensor) -> Tensor:
        # A constant, so that its mean under any base is the maximum itself.
        return ratio.amax(-1, keepdim=True).expand_as(ratio)
