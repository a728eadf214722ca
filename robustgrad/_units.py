"""The level and spread of recent losses, so that losses of different steps can be compared."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

_HALF_LIFE = 256.0  # samples
_SETTLED = 0.9  # share of the running mean that stems from data rather than from its start at zero
_DRIFT = 0.25  # in spreads for the level, in logs for the spread


@dataclass(eq=False)
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

    def update(self, losses: Tensor, weight: Tensor) -> None:
        """Merge the samples of one step (Chan's formula), with a decay by the number of samples.

        Args:
            losses: (b,) finite wherever `weight` is positive.
            weight: (b,) base weights, 0 where a sample does not count.
        """
        total = weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
        mean = (weight * losses).sum() / total
        variance = (weight * (losses - mean).square()).sum() / total
        decay = torch.exp2(-(weight > 0).sum(dtype=weight.dtype) / _HALF_LIFE)
        old, new = decay * self.settled, 1 - decay
        joined = old + new
        part = new / joined.clamp_min(torch.finfo(weight.dtype).tiny)
        step = mean - self.mean
        self.settled = joined
        self.mean = self.mean + part * step
        self.variance = (1 - part) * self.variance + part * variance + part * (1 - part) * step.square()
        self._hold()

    def _hold(self) -> None:
        spread = torch.where(self.variance > 0, self.variance.sqrt(), 1.0)
        moved = (self.mean - self.level).abs() > _DRIFT * self.spread
        moved |= (spread / self.spread).log().abs() > _DRIFT
        moved |= self.settled < _SETTLED
        self.level = torch.where(moved, self.mean, self.level)
        self.spread = torch.where(moved, spread, self.spread)

    def into(self, losses: Tensor) -> Tensor:
        return (losses - self.level) / self.spread

    def out_of(self, standardised: Tensor) -> Tensor:
        return standardised * self.spread + self.level

    def to(self, device: torch.device) -> Units:
        return Units(**{name: value.to(device) for name, value in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
