"""The shift curve: the expected loss if any share x of the prompts changes, with a confidence band."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from ..ambiguity import TotalVariation

SHARES = tuple(i / 20 for i in range(11))  # 0, 5%, ..., 50%
_AT_ONCE = 2**21  # losses of all resamples that are solved together


@dataclass(frozen=True)
class ShiftCurve:
    """`values[i]` is the worst expected loss if a share `shares[i]` of the prompts changes.

    `low` and `high` are a bootstrap interval at `level` over `unit` ("samples" or "groups"); of a difference
    of two curves likewise.
    """

    shares: tuple[float, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    level: float
    unit: str
    cap: float | None = None

    @property
    def rows(self) -> Iterator[tuple[float, float, float, float]]:
        return zip(self.shares, self.values, self.low, self.high, strict=True)


def shift_curve(
    losses: Tensor,
    minus: Tensor | None = None,
    *,
    base: Tensor | None = None,
    slots: Sequence[int] | None = None,
    shares: Sequence[float] = SHARES,
    cap: float | None = None,
    level: float = 0.9,
    resamples: int = 200,
    seed: int = 0,
) -> ShiftCurve:
    """Expected loss if the worst possible share x of the prompts changes, for each x in `shares`.

        value(x) = max_q <q, losses>   s.t.  (1/2) sum |q - base| <= x     (and q <= cap * base)

    The band is the percentile bootstrap. It covers the noise of the sample means, not what lies beyond
    the largest loss at hand: without `cap` all the mass that moves goes to that one sample, no resample
    holds a larger one, and so the band is too narrow on its upper side. With a cap the top share
    x / (cap - 1) receives the mass, which can be estimated.

    Args:
        losses: (n,) finite.
        minus: (n,) losses of another model on the same samples: the curve is then the difference of the two,
            with the same resamples for both, so that its band is paired.
        base: (n,) >= 0, how much each sample stands for; None is equal.
        slots: n integers, the group of each sample: whole groups are resampled, for samples that are not
            independent (many of one prompt), or to ask what other groups of the kind would give.
        shares: ascending or not, each in [0, 1].
        cap: > 1, the largest factor by which any prompt's frequency grows; None for no limit.
        level: in (0, 1). resamples: at least 20. seed: of the bootstrap.
    Raises: ValueError or TypeError: an argument of the wrong shape, type or range.

    >>> import torch
    >>> curve = shift_curve(torch.tensor([0.0, 0.0, 1.0, 1.0]), shares=[0.0, 0.25])
    >>> curve.values
    (0.5, 0.75)
    """
    _checks.finite_losses("losses", losses)
    _checks.number("level", level, 0.0, 1.0, "Use 0.9.", open_low=True, open_high=True)
    _checks.whole("resamples", resamples, 20, "Use 200.")
    if minus is not None:
        _checks.finite_losses("minus", minus)
        _checks.same_samples("minus", minus, "losses", losses)
    sets = [TotalVariation(share, cap=cap) for share in shares]
    rows = [one.detach().cpu().double() for one in (losses, minus) if one is not None]
    weight = torch.ones(len(losses), dtype=torch.float64) if base is None else base.detach().cpu().double()

    def values(weights: Tensor) -> Tensor:
        """(resamples, shares)"""
        curves = [torch.stack([_value(one, row, weights) for one in sets], -1) for row in rows]
        return curves[0] if minus is None else curves[0] - curves[1]

    drawn = torch.cat([values(weight * counts) for counts in _resamples(weight, slots, resamples, seed)])
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = drawn.quantile(tails, 0).tolist()
    middle = values(weight[None])[0].tolist()
    unit = "samples" if slots is None else "groups"
    return ShiftCurve(tuple(shares), tuple(middle), tuple(low), tuple(high), level, unit, cap)


def _value(ambiguity: TotalVariation, losses: Tensor, weights: Tensor) -> Tensor:
    return ambiguity.solve(losses.expand_as(weights), base=weights).value


def _resamples(weight: Tensor, slots: Sequence[int] | None, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each sample was drawn, (some, n) at a time."""
    n, generator = len(weight), torch.Generator().manual_seed(seed)
    slot = torch.arange(n) if slots is None else torch.tensor(slots)
    units = int(slot.max()) + 1
    some = max(1, _AT_ONCE // n)
    for start in range(0, resamples, some):
        drawn = torch.randint(units, (min(some, resamples - start), units), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
        counts = counts[:, slot]
        # A resample of nothing but samples of weight 0 says nothing.
        yield counts[(counts * weight).sum(1) > 0]
