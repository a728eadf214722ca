"""What every ambiguity set shares: how it is asked, and the worst case it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import _kernel, _one_row
from ._problem import Problem
from ._transformed import Transformed, transformed


class Asked(NamedTuple):
    """A problem as it was given; what only diagnostics need to know of it is worked out when they ask."""

    losses: Tensor
    base: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, losses: Tensor, base: Tensor | None, mask: Tensor | None) -> Asked:
        return cls(losses.detach(), None if base is None else base.detach(), mask)


@dataclass(frozen=True, eq=False)
class WorstCase:
    """The worst distribution in an ambiguity set, and what it costs.

    Everything is detached, on the device of the losses, and float32 (float64 for float64 losses). What is
    beside the ratio is computed when it is read.
    Entries that are masked or have base weight 0 have weight and ratio 0. A row with a NaN or +inf
    loss is NaN throughout; a row with no valid entry has weights, ratio and ess 0.
    """

    ambiguity: AmbiguitySet
    asked: Problem | Asked
    wide_ratio: Tensor

    @property
    def problem(self) -> Problem:
        return self.asked if isinstance(self.asked, Problem) else Problem.unchecked(*self.asked)

    def _out(self, tensor: Tensor) -> Tensor:
        given = self.asked[0]  # the losses as they were
        # Half the cost of a call of `to`.
        return tensor.double() if given.dtype == torch.float64 else tensor.float()

    def _wide_weights(self) -> Tensor:
        base = self.problem.base
        return self.wide_ratio / self.wide_ratio.shape[-1] if base is None else self.wide_ratio * base

    @property
    def ratio(self) -> Tensor:
        """(..., n) weights / base, mean 1 under the base: what a sample's gradient is multiplied by."""
        return self._out(self.wide_ratio)

    @property
    def weights(self) -> Tensor:
        """(..., n) the worst distribution; sums to 1."""
        return self._out(self._wide_weights())

    @property
    def value(self) -> Tensor:
        """(...) optimum of the set's problem: the worst-case mean, less the penalty where there is one."""
        return self._out(self._mean(self._wide_weights()) - self.ambiguity._price() * self._divergence())

    @property
    def mean(self) -> Tensor:
        """(...) mean under the base: what plain averaging would see."""
        base, losses = self.problem.base, self.problem.losses
        return self._out(self._mean(torch.full_like(losses, 1 / losses.shape[-1]) if base is None else base))

    def _mean(self, weights: Tensor) -> Tensor:
        given = self.problem.given.to(weights.dtype)
        # Entries without weight may hold -inf or, masked, anything.
        return torch.where(weights == 0, 0.0, weights * given).sum(-1)

    @property
    def divergence(self) -> Tensor:
        """(...) distance of the worst distribution from the base, in the set's own convention."""
        return self._out(self._divergence())

    def _divergence(self) -> Tensor:
        return self.problem.expect(self.ambiguity._divergence(self.wide_ratio)).squeeze(-1)

    @property
    def ess(self) -> Tensor:
        """(...) effective sample size (sum q)^2 / sum q^2 (Kish): n when all weights are equal."""
        return self._out(effective_size(self._wide_weights()))

    @property
    def max_ratio(self) -> Tensor:
        """(...) largest multiple that any one gradient is scaled by."""
        return self._out(self.wide_ratio.amax(-1))

    @property
    def threshold(self) -> Tensor:
        """(...) the loss at which the set's rule bends; each set says which loss that is."""
        return self._out((self.ambiguity._threshold(self.problem) + self.problem.poison).squeeze(-1))


def effective_size(weights: Tensor) -> Tensor:
    """(...) of weights (..., n) of any scale; 0 where all of them are."""
    squares = weights.square().sum(-1)
    return weights.sum(-1).square() / squares.clamp_min(torch.finfo(squares.dtype).tiny)


class Rule(Protocol):
    """A fitted worst case as a formula: the ratio of a loss that was not among those fitted."""

    def ratio(self, losses: Tensor, weight: Tensor | float = ...) -> Tensor: ...


class PlainRule:
    """Of a ball without radius: ratio 1, for a loss of -inf too."""

    def ratio(self, losses: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        return torch.ones_like(losses)


class AmbiguitySet(ABC):
    """A divergence ball (or penalty) around the base distribution. Frozen, hashable, picklable."""

    def solve(self, losses: Tensor, *, base: Tensor | None = None, mask: Tensor | None = None) -> WorstCase:
        """Worst distribution over the given losses.

            max_q <q, losses>   s.t.  D(q || base) <= radius,  sum q = 1,  q >= 0

        (or with a penalty on D in the objective). Exact, and without a host sync: values are looked at on
        the CPU alone, where that waits for nothing, and never while torch.compile traces.
        On CUDA rows of up to 4096 losses take one launch of a Triton kernel, longer ones a fixed number
        of passes, at most 28, where Triton is installed and runs. The environment variable
        ROBUSTGRAD_KERNEL=torch|triton|cpp, read at import, chooses by hand: "cpp" builds a C++ kernel for CPU
        tensors, and only that calls a compiler.

        Args:
            losses: (..., n) float16, bfloat16, float32 or float64; higher is worse. Rows are separate
                problems. Solved in float64 (float32 on MPS).
            base: (..., n) or (n,) the reference distribution, any positive scale; None is uniform.
                An entry of weight 0 is left out, as if masked.
            mask: (..., n) or (n,) bool, True where the entry is real. Masked losses may hold anything.
        Returns: WorstCase, detached. Equal losses get equal ratios. A loss of -inf gets weight 0 as
            soon as the set allows it.
        Raises: TypeError or ValueError, naming the argument, before anything is computed. The values of
            `base` are read on the CPU only; elsewhere a negative or non-finite base makes its row NaN.
        """
        Problem.check(losses, base, mask)
        return self.solve_unchecked(losses, base, mask)

    def solve_unchecked(self, losses: Tensor, base: Tensor | None = None, mask: Tensor | None = None) -> WorstCase:
        """`solve` for losses, base weights and a mask that were checked before."""
        if transformed():
            asked = Asked.of(losses, base, mask)
            ratio = Transformed.apply(self._wide_ratio, *asked)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return WorstCase(self, asked, ratio)
        recipe = self._recipe()
        if recipe is not None:
            asked = Asked.of(losses, base, mask)
            if _kernel.solves(losses) and _kernel.takes(recipe, losses):
                return WorstCase(self, asked, _kernel.solve(recipe, *asked))
            if base is None and mask is None and (ratio := _one_row.solve(recipe, asked.losses)) is not None:
                return WorstCase(self, asked, ratio)
        problem = Problem.unchecked(losses, base, mask)
        return WorstCase(self, problem, problem.finish(self._worst_case(problem)))

    def _wide_ratio(self, losses: Tensor, base: Tensor | None, mask: Tensor | None) -> Tensor:
        return self.solve_unchecked(losses, base, mask).wide_ratio

    @abstractmethod
    def fit(self, losses: Tensor, weight: Tensor, *, unit: Tensor | float, step_size: Tensor) -> Rule:
        """Fit the worst case of remembered losses as a rule for new ones.

        Args:
            losses: (m,) remembered losses, finite wherever `weight` is positive.
            weight: (m,) their base weights, 0 on slots that hold no loss yet.
            unit: what one unit of `losses` is worth in the units of the penalty or temperature.
            step_size: 0-dim, samples per optimizer step.
        """

    def in_memory(self) -> str:
        """The set that a memory of recent losses solves for new ones, where that is another."""
        return repr(self)

    def memory_size(self, step_size: int) -> int:
        """How many losses to remember for a fit, with `step_size` samples per optimizer step."""
        return max(512, 4 * step_size)

    @property
    @abstractmethod
    def saturating_size(self) -> float:
        """Pools of at most this many equally weighted losses give all the weight to the largest one."""

    @abstractmethod
    def _worst_case(self, problem: Problem) -> Tensor:
        """The ratio (..., n), right for rows that have an answer and for entries that take part."""

    def _recipe(self) -> _kernel.Recipe | None:
        """The set as the kernel knows it, if it does."""
        return None

    @abstractmethod
    def _threshold(self, problem: Problem) -> Tensor:
        """The threshold (..., 1), computed anew: only diagnostics read it."""

    @abstractmethod
    def _divergence(self, ratio: Tensor) -> Tensor:
        """Integrand of the divergence: its mean under the base is D."""

    def _price(self) -> float:
        """Multiplier of the divergence in the objective; 0 for balls."""
        return 0.0

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given if v is not None)})"
