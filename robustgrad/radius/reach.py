"""From a sentence to a set, and from one set to another that reaches as far."""

from __future__ import annotations

import math

from torch import Tensor

from .. import _checks
from .._balls import largest, plain
from ..ambiguity import AmbiguitySet, CVaR, TotalVariation


def may_change(share: float | None = None, *, times: float | None = None) -> AmbiguitySet:
    """The set that a sentence about prompts names.

    "Up to 10% of the prompts may change" is `may_change(0.1)`, TotalVariation(0.1).
    "No prompt becomes more than 5 times as frequent" is `may_change(times=5)`, CVaR(1/5).
    Both together are `may_change(0.1, times=5)`, TotalVariation(0.1, cap=5).

    Assumption: the prompts that come are among those at hand, with other frequencies; a prompt of a kind that
    the data do not hold at all is in none of the sets.

    Args:
        share: in [0, 1], the share of the prompts that may be exchanged for others.
        times: > 1 the largest factor by which any prompt's frequency grows.
    Raises: ValueError: neither is given, or one is outside its range.

    >>> may_change(0.1)
    TotalVariation(radius=0.1)
    """
    if times is not None:
        _checks.number("times", times, 1.0, math.inf, "It is a factor; leave it out for no limit.", open_low=True)
    if share is not None:
        _checks.number("share", share, 0.0, 1.0, "10% is 0.1.")
        return TotalVariation(share, cap=times)
    if times is None:
        raise ValueError("may_change takes share= or times= or both, got neither. For 10% of the prompts give 0.1.")
    return CVaR(1 / times)


def equal_reach(
    ambiguity: AmbiguitySet, kind: type[AmbiguitySet], losses: Tensor, *, base: Tensor | None = None
) -> AmbiguitySet:
    """The set of another kind whose worst case has the same mean loss, on these losses.

        find the radius of `kind` with  max_{q in kind(radius)} <q, losses>  =  <q*, losses>,
        q* the worst case in `ambiguity`

    The smallest such set. It depends on the losses: what is equal early in training is not equal later.
    By divergence alone sets cannot be converted to one another, only bounded (Pinsker: TV <= sqrt(KL / 2)).

    Args:
        ambiguity: any set, penalties included.
        kind: TotalVariation, ChiSquare, KL or CVaR.
        losses: (n,) finite, of a model like the one to be trained.
        base: (n,) >= 0, reference weights; None is uniform.
    Raises: ValueError or TypeError: an argument of the wrong shape, type or range, or losses that are not finite.
    Source: bisection on the worst-case value, which is monotone in the radius.

    >>> import torch
    >>> found = equal_reach(CVaR(0.5), TotalVariation, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    >>> round(found.radius, 6)
    0.375
    """
    _checks.finite_losses("losses", losses)
    wide = losses.detach().double()

    def reach(one: AmbiguitySet) -> float:
        return float((one.solve(wide, base=base).weights * wide).sum())

    target = reach(ambiguity) - 1e-12 * float(wide.max() - wide.min())
    return largest(plain(kind), lambda one: reach(one) < target)
