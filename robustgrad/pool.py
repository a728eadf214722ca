"""Which losses compete, what every pool shares, and the simplest one: the samples of one call."""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor

from . import _state_checks
from .ambiguity import AmbiguitySet, WorstCase
from .ambiguity.base import effective_size
from .distributed import Ranks
from .samples import Given, Samples
from .schedule import Constant, Schedule

_FORGOTTEN = 2**15  # losses waiting for an optimizer step that does not come


class Pool(ABC):
    """Gives each sample of a call its ratio, and remembers what it gave during the current optimizer step.

    `mark` says that an optimizer step happened. It takes effect at the next call, so a mark may come more
    than once, and whatever is asked in between is about the step that has just ended.
    """

    def __init__(self, ambiguity: AmbiguitySet | Schedule, ranks: Ranks) -> None:
        self.schedule = Constant(ambiguity) if isinstance(ambiguity, AmbiguitySet) else copy.deepcopy(ambiguity)
        self.ranks = ranks
        self.expects_steps = False
        self._marked = False
        self._step: list[Samples] = []

    @property
    def ambiguity(self) -> AmbiguitySet:
        """The set of the present step."""
        return self.schedule.current

    def mark(self) -> None:
        self.expects_steps = True
        self._marked = bool(self._step)

    def ratio(self, samples: Samples) -> Tensor:
        """Ratio of each sample, (n,): NaN where the sample is NaN or +inf, 0 where its weight is 0."""
        self.check(samples)
        self._begin(samples.scores.device)
        ratio = self._ratio(samples)
        self._record(samples._replace(ratio=ratio))
        return ratio

    def quick_ratio(self, given: Given, nonfinite: Tensor) -> Tensor | None:
        """`ratio` by kernels, where they take the call: in float32, or float64 for such losses.

        Adds to `nonfinite` how many samples are NaN or +inf.
        """
        return None

    def _begin(self, device: torch.device) -> None:
        """Before a call on that device: follow it there, and finish a step that has ended."""
        if self.started and self._device != device:
            self._move(device)
        if self.started and (self._marked or self._overdue()):
            self.schedule.advance()
            self._finish_step()
            self._step, self._marked = [], False

    @property
    def surveying(self) -> bool:
        """Whether calls are only taken note of, and get ratio 1."""
        return False

    @property
    def started(self) -> bool:
        return bool(self._step)

    @property
    def _latest(self) -> Samples:
        """Of the last call that had samples."""
        return next(samples for samples in reversed(self._step) if len(samples.scores))

    @property
    def _device(self) -> torch.device:
        return self._step[-1].scores.device

    def _record(self, samples: Samples) -> None:
        self._step.append(samples)

    def _move(self, device: torch.device) -> None:
        """Follow the model: a checkpoint, for one, is loaded on the CPU."""
        self._step = [samples.to(device) for samples in self._step]

    def check(self, samples: Samples) -> None:  # noqa: B027 - most pools take anything
        """Raise if the samples do not fit those of earlier calls."""

    def _overdue(self) -> bool:
        """Whether a step ends although no mark came."""
        if not self.expects_steps:
            return self._ends_unmarked()
        waiting = self._waiting()
        if waiting < self._most_waiting():
            return False
        remedy = "Call step() of the RobustOptimizer, or reweighter.step(), after each optimizer step."
        if self.ranks.group is not None:
            # The others may not be there to exchange the losses with.
            raise RuntimeError(f"an optimizer step must end, got {waiting} losses of this rank without. {remedy}")
        warnings.warn(
            f"{waiting} losses came without an optimizer step and are now taken as one step. {remedy}",
            stacklevel=7,
        )
        return True

    def _waiting(self) -> int:
        return sum(len(samples.scores) for samples in self._step)

    def _most_waiting(self) -> int:
        """How many losses an optimizer step is waited for."""
        return _FORGOTTEN

    def _ends_unmarked(self) -> bool:
        return True

    def metrics(self) -> dict[str, Tensor]:
        """About the samples of the current step, the finite ones; see `Reweighter.metrics`."""
        if not self._waiting():
            return {}
        step = Samples.join(self._step).counted()
        weight, pool = step.weights, self._competing()
        ratio = torch.where(weight > 0, cast(Tensor, step.ratio), 0.0)
        return {
            "value": pool.value,
            "mean": pool.mean,
            "gap": pool.value - pool.mean,
            "divergence": pool.divergence,
            "threshold": pool.threshold,
            "cap": pool.max_ratio,
            "pool_size": self._size(),
            "ess": effective_size(weight * ratio),
            "max_ratio": ratio.max(),
            "plain": self._plain(),
        }

    def state_dict(self) -> dict[str, Any]:
        waiting = Samples.join(self._step).state_dict() if self._step else {}
        flags = {"marked": self._marked, "expects_steps": self.expects_steps}
        return {"waiting": waiting, "schedule": self.schedule.state_dict(), **flags}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = [Samples.restored(state["waiting"])] if state["waiting"] else []
        self._marked = _state_checks.part(state, "marked", bool)
        self.expects_steps = _state_checks.part(state, "expects_steps", bool)
        self.schedule.load_state_dict(state["schedule"])

    def _finish_step(self) -> None:  # noqa: B027 - a pool without a memory takes nothing along
        """Take in the samples of the step that has ended."""

    @abstractmethod
    def _ratio(self, samples: Samples) -> Tensor: ...

    @abstractmethod
    def _competing(self) -> WorstCase:
        """The worst case of the losses that compete at present."""

    @abstractmethod
    def _size(self) -> Tensor:
        """How many losses compete at present."""

    @abstractmethod
    def _plain(self) -> Tensor:
        """Whether the last call was plain averaging."""


class SolvedPool(Pool):
    """What competes is solved exactly, all at once: each sample is among the losses of its own pool."""

    _together: Samples | None = None  # of all ranks

    def _solved(self, samples: Samples) -> Tensor:
        """The ratio of each of these samples, which compete with those of all ranks."""
        self._together, own = self.ranks.gather(samples)
        if len(self._together.scores) == 0:
            return torch.empty_like(samples.scores)
        return self.ambiguity.solve_unchecked(self._together.grouped(), self._together.weight).wide_ratio[own]

    def _everything(self) -> Samples:
        # A checkpoint holds no more than what this rank contributed.
        return (Samples.join(self._step) if self._together is None else self._together).counted()

    def _competing(self) -> WorstCase:
        together = self._everything()
        return self.ambiguity.solve_unchecked(together.grouped(), together.weight)

    def _size(self) -> Tensor:
        return (self._everything().weights > 0).sum()

    def _plain(self) -> Tensor:
        return self._size() <= 1


class BatchPool(SolvedPool):
    """The samples of each call, over all ranks, compete among themselves: the papers' literal algorithm.

    A pool of one sample is plain averaging, and few samples saturate a set; it says so once.
    """

    _warned = False

    def _ratio(self, samples: Samples) -> Tensor:
        ratio = self._solved(samples)
        if self._together is not None:
            self._warn(len(self._together.scores))
        return ratio

    def _warn(self, n: int) -> None:
        least = self.ambiguity.saturating_size
        if self._warned or n == 0 or n > least:
            return
        self._warned = True
        effect = "is plain averaging" if n == 1 else "puts all weight on its largest loss"
        larger = f", or calls of at least {math.floor(least) + 1} samples" if least < math.inf else ""
        warnings.warn(
            f"{self.ambiguity!r} over a batch pool of {n} {effect}: nothing is robust about such a step. "
            f'Use pool="memory" (the default){larger}.',
            stacklevel=7,
        )
