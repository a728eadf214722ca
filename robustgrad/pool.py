"""Which losses compete, what every pool shares, and the simplest one: the samples of one call."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ambiguity import AmbiguitySet, WorstCase, group_means

_FORGOTTEN = 2**15  # losses waiting for an optimizer step that does not come


class Samples(NamedTuple):
    """Samples of one call or many, detached.

    `scores` (n,) float64, what the adversary maximises; `weight` (n,) base weights, 0 where masked, or None
    where all are equal; `groups` (n,) integer ids or None.
    """

    scores: Tensor
    weight: Tensor | None = None
    groups: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        return torch.ones_like(self.scores) if self.weight is None else self.weight

    def counted(self) -> Samples:
        """Finite samples as they are, the others with score and weight 0."""
        weights = self.weights
        sound = torch.isfinite(self.scores) & torch.isfinite(weights) & (weights > 0)
        return Samples(torch.where(sound, self.scores, 0.0), torch.where(sound, weights, 0.0), self.groups)

    def grouped(self) -> Tensor:
        """Scores, replaced by the mean of each sample's group where there are groups."""
        return self.scores if self.groups is None else group_means(self.scores, self.groups, self.weight)

    def at(self, index: Tensor) -> Samples:
        return Samples(**{name: tensor[index] for name, tensor in self.state_dict().items()})

    def to(self, device: torch.device) -> Samples:
        return Samples(**{name: tensor.to(device) for name, tensor in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    @staticmethod
    def join(parts: list[Samples]) -> Samples:
        equal = all(part.weight is None for part in parts)
        groups = [part.groups for part in parts if part.groups is not None]
        return Samples(
            torch.cat([part.scores for part in parts]),
            None if equal else torch.cat([part.weights for part in parts]),
            torch.cat(groups) if groups else None,
        )


class Pool(ABC):
    """Gives each sample of a call its ratio, and remembers what it gave during the current optimizer step.

    `mark` says that an optimizer step happened. It takes effect at the next call, so a mark may come more
    than once, and whatever is asked in between is about the step that has just ended.
    """

    def __init__(self, ambiguity: AmbiguitySet) -> None:
        self.ambiguity = ambiguity
        self.expects_steps = False
        self._marked = False
        self._step: list[Samples] = []
        self._ratios: list[Tensor] = []

    def mark(self) -> None:
        self.expects_steps = True
        self._marked = bool(self._step)

    def ratio(self, samples: Samples) -> Tensor:
        """Ratio of each sample, (n,): NaN where the sample is NaN or +inf, 0 where its weight is 0."""
        self.check(samples)
        if self.started and self._device != samples.scores.device:
            self._move(samples.scores.device)
        if self._marked or self._overdue():
            self._finish_step()
            self._step, self._ratios, self._marked = [], [], False
        ratio = self._ratio(samples)
        self._step.append(samples)
        self._ratios.append(ratio)
        return ratio

    @property
    def started(self) -> bool:
        return bool(self._step)

    @property
    def _device(self) -> torch.device:
        return self._step[-1].scores.device

    def _move(self, device: torch.device) -> None:
        """Follow the model: a checkpoint, for one, is loaded on the CPU."""
        self._step = [samples.to(device) for samples in self._step]
        self._ratios = [ratio.to(device) for ratio in self._ratios]

    def check(self, samples: Samples) -> None:  # noqa: B027 - most pools take anything
        """Raise if the samples do not fit those of earlier calls."""

    def _overdue(self) -> bool:
        """Whether a step ends although no mark came."""
        if not self.expects_steps:
            return self._ends_unmarked()
        if self._waiting() < max(_FORGOTTEN, 64 * self._capacity()):
            return False
        warnings.warn(
            f"{self._waiting()} losses came without an optimizer step and are now taken as one step. "
            "Call step() of the RobustOptimizer, or reweighter.step(), after each optimizer step.",
            stacklevel=5,
        )
        return True

    def _waiting(self) -> int:
        return sum(len(samples.scores) for samples in self._step)

    def metrics(self) -> dict[str, Tensor]:
        """About the samples of the current step, the finite ones; see `Reweighter.metrics`."""
        weight = Samples.join(self._step).counted().weights
        ratio = torch.where(weight > 0, torch.cat(self._ratios), 0.0)
        scaled, pool = weight * ratio, self._competing()
        squares = scaled.square().sum()
        return {
            "value": pool.value,
            "mean": pool.mean,
            "gap": pool.value - pool.mean,
            "divergence": pool.divergence,
            "threshold": pool.threshold,
            "cap": pool.max_ratio,
            "pool_size": self._size(),
            "ess": scaled.sum().square() / torch.where(squares == 0, 1.0, squares),
            "max_ratio": ratio.max(),
            "plain": self._plain(),
        }

    def state_dict(self) -> dict[str, Any]:
        waiting: dict[str, Tensor] = {}
        if self._step:
            waiting = Samples.join(self._step).state_dict() | {"ratio": torch.cat(self._ratios)}
        return {"waiting": waiting, "marked": self._marked, "expects_steps": self.expects_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        waiting = {name: x.clone() for name, x in state["waiting"].items()}
        self._ratios = [waiting.pop("ratio")] if waiting else []
        self._step = [Samples(**waiting)] if waiting else []
        self._marked, self.expects_steps = state["marked"], state["expects_steps"]

    @abstractmethod
    def _capacity(self) -> int: ...

    @abstractmethod
    def _ends_unmarked(self) -> bool: ...

    @abstractmethod
    def _finish_step(self) -> None: ...

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


class BatchPool(Pool):
    """The samples of each call compete among themselves: the papers' literal algorithm.

    A pool of one sample is plain averaging, and few samples saturate a set; it says so once.
    """

    _warned = False

    def _capacity(self) -> int:
        return 0

    def _ends_unmarked(self) -> bool:
        return True

    def _finish_step(self) -> None:
        pass

    def _ratio(self, samples: Samples) -> Tensor:
        self._warn(len(samples.scores))
        return self.ambiguity.solve_unchecked(samples.grouped(), samples.weight).wide_ratio

    def _warn(self, n: int) -> None:
        least = self.ambiguity.saturating_size
        if self._warned or n > least:
            return
        self._warned = True
        effect = "is plain averaging" if n == 1 else "puts all weight on its largest loss"
        larger = f", or calls of more than {least:.0f} samples" if least < math.inf else ""
        warnings.warn(
            f"{self.ambiguity!r} over a batch pool of {n} {effect}: nothing is robust about such a step. "
            f'Use pool="memory" (the default){larger}.',
            stacklevel=5,
        )

    def _competing(self) -> WorstCase:
        last = self._step[-1].counted()
        return self.ambiguity.solve_unchecked(last.grouped(), last.weight)

    def _size(self) -> Tensor:
        return (self._step[-1].counted().weights > 0).sum()

    def _plain(self) -> Tensor:
        return self._size() <= 1
