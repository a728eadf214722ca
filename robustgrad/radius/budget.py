"""The largest radius within a budget: of effective samples, or of in-distribution loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from torch import Tensor

from .. import _checks
from .._balls import largest, plain
from ..ambiguity import AmbiguitySet


def within_ess(kind: type[AmbiguitySet], losses: Tensor, *, ess: float, base: Tensor | None = None) -> AmbiguitySet:
    """The largest set of a kind whose worst case keeps an effective sample size of at least `ess`.

        max radius  s.t.  (sum q*)^2 / sum q*^2 >= ess,  q* the worst case at that radius

    Assumption: the losses are like those to come, and the gradient needs as many samples as `ess` says
    (its noise grows as 1 / ess). The budget says nothing about which shift to expect. Give the losses that
    compete in a step (a batch times its accumulation), or read `ess` as a share of their number.

    For chi-square the answer is (n / ess - 1) / 2 while no sample lost all its weight, and no smaller after.

    Args:
        kind: TotalVariation, ChiSquare, KL or CVaR.
        losses: (n,) finite.
        ess: in [1, n].
        base: (n,) >= 0, reference weights; None is uniform.
    Raises: ValueError or TypeError: an argument of the wrong shape, type or range; an `ess` that even plain
        averaging over the base does not have.

    >>> import torch
    >>> from robustgrad import ChiSquare
    >>> round(within_ess(ChiSquare, torch.arange(100.0), ess=80.0).radius, 6)
    0.125
    """
    _checks.finite_losses("losses", losses)
    _checks.number("ess", ess, 1.0, len(losses), "It is a number of samples.")
    start = plain(kind)
    wide = losses.detach().double()

    def enough(one: AmbiguitySet) -> bool:
        return float(one.solve(wide, base=base).ess) >= ess * (1 - 1e-12)

    if not enough(start):
        most = float(start.solve(wide, base=base).ess)
        raise ValueError(f"ess must be at most {most:g}, that of the base weights, got {ess:g}. Ask for less.")
    return largest(start, enough)


def within_loss(measured: Mapping[float, float | Sequence[float]], *, tolerance: float) -> float:
    """The largest radius that was measured to cost at most a share `tolerance` of the plain loss.

    The in-distribution loss of a model trained at a radius is known only once it was trained: it cannot be
    read off the losses of another model. So this takes measurements, tries them in ascending order, stops
    before the first that is too dear, and never interpolates.

    Assumption: the measurements stem from the distribution and the training length that matter. With several
    seeds a radius passes if the mean of the paired differences plus two standard errors does; one number
    per radius carries no such protection against luck.

    Args:
        measured: in-distribution loss by radius, 0.0 (plain) included: a number, or one number a seed, in the
            same order of seeds for each radius.
        tolerance: >= 0; 0.01 allows 1% above plain.
    Raises: ValueError: no measurement at 0.0, numbers of seeds that differ, or a loss that is not finite.

    >>> within_loss({0.0: 0.600, 0.05: 0.601, 0.1: 0.604, 0.2: 0.630}, tolerance=0.01)
    0.1
    """
    _checks.number("tolerance", tolerance, 0.0, math.inf, "0.01 allows 1% above plain.")
    by_radius = {radius: _by_seed(radius, losses) for radius, losses in sorted(measured.items())}
    if 0.0 not in by_radius:
        raise ValueError(f"measured must hold 0.0, the plain loss, got radii {list(by_radius)}. Measure it as well.")
    plain_losses, chosen = by_radius[0.0], 0.0
    for radius, losses in by_radius.items():
        if len(losses) != len(plain_losses):
            raise ValueError(
                f"measured must have one loss a seed for each radius, got {len(losses)} at {radius:g} and "
                f"{len(plain_losses)} at 0. Give the same seeds everywhere."
            )
        if _dearest(losses, plain_losses) > tolerance * abs(fmean(plain_losses)):
            break
        chosen = radius
    return chosen


def _by_seed(radius: float, losses: float | Sequence[float]) -> list[float]:
    _checks.number("radius", radius, 0.0, math.inf, "Use 0.0 for plain averaging.")
    row = list(losses) if isinstance(losses, Sequence) else [losses]
    return [_checks.number("loss", loss, -math.inf, math.inf, f"Measured at radius {radius:g}.") for loss in row]


def _dearest(losses: list[float], plain_losses: list[float]) -> float:
    """What the radius costs, at worst within the noise of the seeds."""
    costs = [loss - other for loss, other in zip(losses, plain_losses, strict=True)]
    error = stdev(costs) / math.sqrt(len(costs)) if len(costs) > 1 else 0.0
    return fmean(costs) + 2 * error
