"""The level and spread of recent losses, so that losses of different steps can be compared."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import _state_checks

_HALF_LIFE = 256.0  # samples
_SETTLED = 0.9  # share of the running mean that stems from data rather than from its start at zero
_DRIFT = 0.25  # in spreads for the level, in logs for the spread


@dataclass(frozen=True, eq=False)
class Units:
    """A running mean and variance, and the units held from them, each 0-dim.

    Losses shrink and tighten during training, so remembered ones are kept as (loss - level) / spread. The
    units in use are held until the running ones have clearly moved away: otherwise equal losses of
    different steps would stop being equal.
    """

    settled: Tensor
    mean: Tensor
    variance: Tensor
    level: Tensor
    spread: Tensor

    @classmethod
    def new(cls, like: Tensor) -> Units:
        zero, one = like.new_zeros(()), like.new_ones(())
        return cls(zero, zero, zero, zero, one)

    def updated(self, losses: Tensor, weight: Tensor) -> Units:
        """With the samples of one step merged in (Chan's formula), after a decay by their number.

        Args:
            losses: (b,) finite wherever `weight` is positive.
            weight: (b,) base weights, 0 where a sample does not count.
        """
        tiny = torch.finfo(weight.dtype).tiny
        total = weight.sum().clamp_min(tiny)
        mean = (weight * losses).sum() / total
        variance = (weight * (losses - mean).square()).sum() / total
        decay = torch.exp2(-(weight > 0).sum(dtype=weight.dtype) / _HALF_LIFE)
        old, new = decay * self.settled, 1 - decay
        part = new / (old + new).clamp_min(tiny)
        step = mean - self.mean
        variance = (1 - part) * self.variance + part * variance + part * (1 - part) * step.square()
        return self._held(old + new, self.mean + part * step, variance)

    def _held(self, settled: Tensor, mean: Tensor, variance: Tensor) -> Units:
        spread = torch.where(variance > 0, variance.sqrt(), 1.0)
        moved = (mean - self.level).abs() > _DRIFT * self.spread
        moved |= (spread / self.spread).log().abs() > _DRIFT
        moved |= settled < _SETTLED
        level, spread = torch.where(moved, mean, self.level), torch.where(moved, spread, self.spread)
        return Units(settled, mean, variance, level, spread)

    def into(self, losses: Tensor) -> Tensor:
        return (losses - self.level) / self.spread

    def out_of(self, standardised: Tensor) -> Tensor:
        return standardised * self.spread + self.level

    @classmethod
    def restored(cls, state: dict[str, Tensor], device: torch.device | None = None) -> Units:
        """A copy of what `state_dict` returned."""
        _state_checks.numbers(state, positive="spread")
        return cls(**{name: number.to(device, copy=True) for name, number in state.items()})

    def state_dict(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
