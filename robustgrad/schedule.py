"""A set that changes during training: warm-up, and a size that validation drives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from . import _checks, _state_checks
from ._balls import resized, size
from .ambiguity import AmbiguitySet


class Schedule(ABC):
    """What a Reweighter takes in place of a set: it names the set of each optimizer step.

    A Reweighter runs a copy of its own, `reweighter.ambiguity`, so one schedule may serve many. Its state is
    part of `reweighter.state_dict()`. Steps count that had losses; where no loop ever says `step()`, each
    call counts, or, with a memory, each quarter of it.
    """

    @property
    @abstractmethod
    def current(self) -> AmbiguitySet:
        """The set of the present step: it changes in `advance` only, never within a step."""

    @property
    def given(self) -> AmbiguitySet | Schedule:
        """What the user configured."""
        return self

    @abstractmethod
    def advance(self) -> None:
        """The next optimizer step begins."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to load without state
        """Go on where another schedule of the same configuration was."""

    def in_memory(self) -> str:
        return repr(self)


class Constant(Schedule):
    """One set throughout."""

    def __init__(self, ambiguity: AmbiguitySet) -> None:
        self._ambiguity = ambiguity

    @property
    def current(self) -> AmbiguitySet:
        return self._ambiguity

    @property
    def given(self) -> AmbiguitySet:
        return self._ambiguity

    def advance(self) -> None:
        pass


@dataclass
class WarmUp(Schedule):
    """Grow the set from plain averaging: step t has min(1, t / steps) of its size.

    The size is the radius, or 1/alpha - 1 for CVaR. Assumption: early losses say more about what the model
    has not learned yet than about which samples are hard; nothing is known about how long that lasts.

    Args:
        ambiguity: the set at the end; one with a radius or alpha.
        steps: optimizer steps until then, at least 1. The first step is plain averaging.
    Raises: ValueError: a set without a size, or `steps` below 1.

    Example:
        >>> from robustgrad import Reweighter, TotalVariation
        >>> from robustgrad.schedule import WarmUp
        >>> reweighter = Reweighter(WarmUp(TotalVariation(0.1), steps=100))
        >>> reweighter.ambiguity.current
        TotalVariation(radius=0.0)
    """

    ambiguity: AmbiguitySet
    steps: int
    _step: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        size(self.ambiguity)
        _checks.whole("steps", self.steps, 1, "Leave the warm-up out to begin with the whole set.")

    @property
    def current(self) -> AmbiguitySet:
        return _share(self.ambiguity, self._step / self.steps)

    def advance(self) -> None:
        self._step = min(self._step + 1, self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = min(max(_state_checks.part(state, "step", int), 0), self.steps)


@dataclass
class Adaptive(Schedule):
    """Spend as much of a set as in-distribution validation allows.

    After each `observe`, the size grows by the factor `grow` while the validation loss is at most `tolerance`
    above the lowest one seen, and shrinks by `shrink` where it is not (additive bound, multiplicative steps,
    as trust regions are driven). It takes effect with the next optimizer step.

    Assumption: the validation samples stem from the training distribution, and what a larger size costs shows
    in their mean loss. Nothing is learned about the shift to come: the answer is the largest affordable set,
    not the right one. A validation loss that rises because the model overfits shrinks the set as well.

    Args:
        ambiguity: the largest set; one with a radius or alpha.
        tolerance: >= 0, in units of the validation loss: what robustness may cost.
        start: in (0, 1], the share of the size to begin with.
        grow: > 1, shrink: in (0, 1): factors of one observation.

    Example:
        >>> from robustgrad import ChiSquare, Reweighter
        >>> from robustgrad.schedule import Adaptive
        >>> reweighter = Reweighter(Adaptive(ChiSquare(1.0), tolerance=0.01, start=0.5, grow=1.5))
        >>> reweighter.ambiguity.observe(0.60)  # mean loss on validation samples, the same number on every rank
        >>> reweighter.ambiguity.share
        0.75
    """

    ambiguity: AmbiguitySet
    _: KW_ONLY
    tolerance: float
    start: float = 0.1
    grow: float = 1.25
    shrink: float = 0.5
    share: float = field(default=0.0, init=False, repr=False)
    _used: float = field(default=0.0, init=False, repr=False)
    _best: float = field(default=math.inf, init=False, repr=False)

    def __post_init__(self) -> None:
        size(self.ambiguity)
        _checks.number("tolerance", self.tolerance, 0.0, math.inf, "It is in units of the validation loss.")
        _checks.number("start", self.start, 0.0, 1.0, "It is a share of the largest size.", open_low=True)
        _checks.number("grow", self.grow, 1.0, math.inf, "It is a factor, such as 1.25.", open_low=True)
        _checks.number("shrink", self.shrink, 0.0, 1.0, "It is a factor, such as 0.5.", open_low=True, open_high=True)
        self.share = self._used = self.start

    @property
    def current(self) -> AmbiguitySet:
        return _share(self.ambiguity, self._used)

    def observe(self, loss: float) -> None:
        """Take in a mean loss on validation samples. Raises: ValueError or TypeError: it is not finite."""
        loss = _checks.number("loss", loss, -math.inf, math.inf, "Give the mean loss on validation samples.")
        self._best = min(self._best, loss)
        within = loss <= self._best + self.tolerance
        self.share = min(1.0, self.share * (self.grow if within else self.shrink))

    def advance(self) -> None:
        self._used = self.share

    def state_dict(self) -> dict[str, Any]:
        return {"share": self.share, "used": self._used, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        shares = {name: _state_checks.part(state, name, float) for name in ("share", "used")}
        for name, share in shares.items():
            _checks.number(name, share, 0.0, 1.0, "Load an earlier checkpoint.")
        self.share, self._used = shares["share"], shares["used"]
        self._best = _state_checks.part(state, "best", float)
        if math.isnan(self._best):
            raise TypeError("best must be a number, got nan")


def _share(ambiguity: AmbiguitySet, share: float) -> AmbiguitySet:
    # The whole set is the set itself, not one that rounding has touched.
    return ambiguity if share == 1.0 else resized(ambiguity, share * size(ambiguity))
