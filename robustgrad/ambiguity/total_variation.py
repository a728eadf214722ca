"""Total variation: an adversary that may move a share of the probability mass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from .. import _checks
from ._kernel import Recipe
from ._problem import Problem, compared
from ._sorted import Ranked, quantile, top_share
from .base import AmbiguitySet


@dataclass(frozen=True, repr=False)
class TotalVariation(AmbiguitySet):
    """Worst distribution when at most a share `radius` of the probability mass may move.

        max_q <q, losses>   s.t.  (1/2) sum |q - p| <= radius,  sum q = 1,  0 <= q <= cap * p
        max_q <q, losses> - penalty * (1/2) sum |q - p|         (penalty form)

    The mass leaves the smallest losses and goes to the largest one, tied maxima sharing it; only ranks
    matter. `radius=0.1` reads "10% of the prompts may change". 0 gives ratio 1 everywhere; from
    1 - P(argmax) on, the maximum alone. `threshold` is the loss below which all mass is taken.

    Args:
        radius: in [0, 1], the mass moved.
        penalty: > 0, in units of the loss, instead of a radius: losses more than `penalty` below the
            maximum give up their mass. It depends on the scale of the losses, a radius does not.
        cap: > 1, largest ratio of any sample. radius >= 1 - 1/cap gives CVaR(1/cap).

    The memory pool cannot place mass on the single worst sample of a population seen one sample at a
    time: it solves the *capped* set, whose top share kappa = radius / (cap - 1) gets ratio `cap`, and
    without a cap kappa = max(1/B, 1/64) for B samples per optimizer step.

    Raises: ValueError or TypeError: an argument outside its range, or not exactly one of radius, penalty.
    Source: arXiv 2503.00539 (half-L1 normalisation); Jiang & Guan (2018) for the CVaR form.
    """

    radius: float | None = None
    _: KW_ONLY
    penalty: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        _checks.exactly_one("TotalVariation", radius=self.radius, penalty=self.penalty)
        if self.radius is not None:
            _checks.number("radius", self.radius, 0.0, 1.0, "It is the share of mass moved; 0 is plain averaging.")
        if self.penalty is not None:
            _checks.number("penalty", self.penalty, 0.0, torch.inf, "Use radius= for a scale-free set.", open_low=True)
        if self.cap is not None:
            _checks.number("cap", self.cap, 1.0, torch.inf, "It is the largest allowed ratio.", open_low=True)
            if self.radius is None:
                raise ValueError(f"cap must come with radius=, got cap={self.cap!r} with penalty=. Leave cap out.")

    @classmethod
    def from_l1(cls, radius: float, *, cap: float | None = None) -> TotalVariation:
        """The set sum |q - p| <= radius, un-halved, as some papers write it; radius in [0, 2]."""
        _checks.number("radius", radius, 0.0, 2.0, "The un-halved L1 radius is twice the mass moved.")
        return cls(radius / 2, cap=cap)

    @property
    def saturating_size(self) -> float:
        if self.penalty is not None:
            return 1.0
        return 1 / (1 - self._moved()) if self._moved() < 1 else math.inf

    def _moved(self) -> float:
        """The mass that moves: a cap stops it where giver and receiver meet."""
        radius = self.radius or 0.0
        return radius if self.cap is None else min(radius, 1 - 1 / self.cap)

    def _worst_case(self, problem: Problem) -> Tensor:
        if self.penalty is not None:
            return self._penalised(problem)
        if self.radius == 0:
            return problem.plain()
        kept, moved = top_share(problem, 1 - self._moved()), self._moved()
        if self.cap is None:
            best = compared(torch.eq, problem.losses, problem.top)
            return kept.addcmul_(best, problem.expect(best).reciprocal_(), value=moved)
        return kept.add_(top_share(problem, moved / (self.cap - 1)), alpha=self.cap - 1)

    def _penalised(self, problem: Problem) -> Tensor:
        losses, edge = problem.losses, problem.top - self._price()
        kept, gone = compared(torch.ge, losses, edge), compared(torch.lt, losses, edge)
        best = compared(torch.eq, losses, problem.top)
        received = (problem.expect(gone) / problem.expect(best)).add_(problem.poison)
        return kept.addcmul_(best, received)

    def _recipe(self) -> Recipe:
        if self.penalty is not None:
            return Recipe("near", (self.penalty,))
        if self.radius == 0:
            return Recipe("plain")
        kept, moved = (1 - self._moved(), 1.0), self._moved()
        if self.cap is None:
            return Recipe("top", (*kept, 0.0, 0.0, moved))
        return Recipe("top", (*kept, moved / (self.cap - 1), self.cap - 1))

    def _threshold(self, problem: Problem) -> Tensor:
        return quantile(problem, 1 - self._moved()) if self.penalty is None else problem.top - self.penalty

    def in_memory(self) -> str:
        if self.penalty is not None or self.cap is not None:
            return repr(self)
        return f"TotalVariation(radius={self.radius!r}, cap=1 + {self.radius!r} * min(B, 64))"

    def memory_size(self, step_size: int) -> int:
        receivers = self._capped_share() or max(1 / max(step_size, 1), 1 / 64)
        return max(super().memory_size(step_size), math.ceil(16 / receivers))

    def _capped_share(self) -> float | None:
        """kappa, the top share that receives the mass, where the user's cap fixes it."""
        return self._moved() / (self.cap - 1) if self.cap is not None and self._moved() > 0 else None

    def fit(self, losses: Tensor, weight: Tensor, *, unit: Tensor | float, step_size: Tensor) -> TopRule:
        ranked = Ranked.of(losses, weight)
        if self.penalty is None:
            top = self._capped_share() or _largest_share(step_size, losses)
            return TopRule.of(ranked, [1 - self._moved(), top], [1.0, self._moved() / top])
        # The receivers are the top share, so the price is paid against their mean, not the maximum.
        top = _largest_share(step_size, losses)
        # Where there is no weight there is no place either, and 0/0 of it.
        received = torch.where(weight > 0, weight * ranked.place(losses, 0.0).top_share(top), 0.0)
        edge = (received * losses).sum() / received.sum() - self.penalty / unit
        kept = (weight * (losses >= edge)).sum() / weight.sum()
        return TopRule.of(ranked, [kept, top], [1.0, (1 - kept) / top])

    def _divergence(self, ratio: Tensor) -> Tensor:
        return (ratio - 1).abs() / 2

    def _price(self) -> float:
        return self.penalty or 0.0


def _largest_share(step_size: Tensor, losses: Tensor) -> Tensor:
    """The top share that stands for the single largest loss of a step."""
    return step_size.to(losses.dtype).reciprocal().clamp(1 / 64, 1.0)


@dataclass(frozen=True, eq=False)
class TopRule:
    """ratio = sum of gain * share in the top mass, over one or two such masses, (k, 1) each."""

    ranked: Ranked
    masses: Tensor
    gains: Tensor

    @classmethod
    def of(cls, ranked: Ranked, masses: Sequence[Tensor | float], gains: Sequence[Tensor | float]) -> TopRule:
        def column(numbers: Sequence[Tensor | float]) -> Tensor:
            one = ranked.total.new_full
            return torch.stack([x if isinstance(x, Tensor) else one((), x) for x in numbers]).unsqueeze_(-1)

        return cls(ranked, column(masses), column(gains))

    def ratio(self, losses: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        return self.ranked.place(losses, weight).top_share(self.masses).mul_(self.gains).sum(0)
