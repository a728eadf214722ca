"""The problem an ambiguity set is given: losses, base and mask, checked and widened."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._checks import readable

# Where a loss of -inf stands, in ranges of the finite losses below the largest: its square fits into float32.
ABYSS = 2.0**40
# The same among losses that were widened: below all of them, with room for its powers in float64.
_BELOW_WIDENED = -1e60


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on the one backend that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def all_equal(weight: Tensor) -> bool:
    """Whether the weights are seen to be equal, and positive: then the base is uniform."""
    if not readable(weight):
        return False
    low, high = weight.aminmax()
    return bool(0.0 < low.item() == high.item())


class Problem(NamedTuple):
    """One or many worst-case problems, checked and widened.

    `losses` (..., n) holds `lowest` instead of -inf and on excluded entries; `base` (..., n) sums to 1
    and is 0 on excluded entries, or is None for the uniform distribution over all n; `valid` (..., n) is
    None where no entry is excluded; `top` (..., 1) is the maximum, NaN for rows that have no answer.
    """

    given: Tensor
    losses: Tensor
    base: Tensor | None
    valid: Tensor | None
    top: Tensor

    @staticmethod
    def check(losses: Tensor, base: Tensor | None = None, mask: Tensor | None = None) -> None:
        _checks.floating("losses", losses)
        if losses.dim() == 0 or losses.shape[-1] == 0:
            raise ValueError(
                f"losses must have shape (..., n) with n >= 1, got {tuple(losses.shape)}. "
                "Skip the call for an empty batch, and use losses.reshape(1) for a single sample."
            )
        if mask is not None:
            _checks.boolean_mask(mask, losses)
        if base is not None:
            _checks.base_weights(base, losses)

    @classmethod
    def unchecked(cls, losses: Tensor, base: Tensor | None = None, mask: Tensor | None = None) -> Problem:
        given = losses.detach()
        wide = given.to(wide_dtype(given.device), copy=True)
        share, valid, bad_base = _distribution(wide, base, mask)
        if valid is not None:
            wide = torch.where(valid, wide, -torch.inf)
        # One pass for both ends: +inf is as bad as NaN, and both survive amax.
        wide = wide.nan_to_num_(torch.nan, torch.nan, _lowest(given.dtype, wide.dtype))
        top = wide.amax(-1, keepdim=True)
        return cls(given, wide, share, valid, top if bad_base is None else torch.where(bad_base, torch.nan, top))

    @property
    def poison(self) -> Tensor:
        """(..., 1) NaN for rows that have no answer and 0 otherwise."""
        return self.top - self.top

    def _widened(self) -> bool:
        """Whether no square of a loss can leave the range of `losses`."""
        return self.losses.dtype == torch.float64 != self.given.dtype

    @classmethod
    def remembered(cls, losses: Tensor, weight: Tensor) -> Problem:
        return cls.unchecked(losses, None if all_equal(weight) else weight)

    def mass(self, selected: Tensor) -> Tensor:
        """Base mass of the selected entries, (..., 1)."""
        if self.base is None:
            return selected.sum(-1, keepdim=True, dtype=self.losses.dtype) / self.losses.shape[-1]
        return torch.where(selected, self.base, 0.0).sum(-1, keepdim=True)

    def expect(self, values: Tensor) -> Tensor:
        """Mean of `values` under the base, (..., 1)."""
        if self.base is None:
            return values.mean(-1, keepdim=True)
        return (self.base * values).sum(-1, keepdim=True)

    def distance(self) -> Tensor:
        """losses - max, with room for sums."""
        drop = self.losses - self.top
        return drop if self._widened() else drop.clamp_min(torch.finfo(drop.dtype).min / 2**40)

    def below_top(self) -> tuple[Tensor, Tensor | float]:
        """(losses - max) / unit, not positive, and the unit: 1 where their squares are safe, or else the
        range of the finite losses, (..., 1).

        What stands for -inf lies so far below that the finite losses look tied from there.
        """
        drop = self.losses - self.top
        if self._widened() or _is_moderate(drop):
            return drop, 1.0
        limits = torch.finfo(drop.dtype)
        finite = torch.where(self.losses > limits.min, drop, 0.0)
        unit = (-finite.amin(-1, keepdim=True)).clamp(limits.tiny, limits.max)
        return (drop / unit).clamp_min(-ABYSS), unit

    def plain(self) -> Tensor:
        """Ratio 1 everywhere."""
        return torch.ones_like(self.losses) + self.poison

    def finish(self, ratio: Tensor) -> Tensor:
        """0 on excluded entries."""
        return ratio if self.valid is None else torch.where(self.valid, ratio, 0.0)


def compared(compare: Callable[..., Tensor], losses: Tensor, other: Tensor) -> Tensor:
    """1 where it holds and else 0, in the losses' own type: sums and products of booleans cost twice as much."""
    return compare(losses, other, out=torch.empty_like(losses))


def _lowest(given: torch.dtype, wide: torch.dtype) -> float:
    return _BELOW_WIDENED if wide == torch.float64 != given else torch.finfo(wide).min


def _is_moderate(drop: Tensor) -> bool:
    """Whether one row is seen to have no -inf and squares that are safe."""
    return drop.dim() == 1 and readable(drop) and 1e-70 < -drop.amin().item() < 1e100


def _distribution(
    losses: Tensor, base: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The normalised base, the entries that take part, and the rows whose base is no distribution."""
    if base is None and mask is None:
        return None, None, None
    share = torch.ones_like(losses) if base is None else base.detach().to(losses.dtype).expand_as(losses)
    bad = None if base is None else ~((share >= 0) & (share < torch.inf)).all(-1, keepdim=True)
    if mask is not None:
        share = torch.where(mask, share, 0.0)
    # An entry of base weight 0 is not part of the population: excluded, as if masked.
    valid = share != 0
    total = share.sum(-1, keepdim=True)
    return share / torch.where(total > 0, total, 1.0), valid, bad
