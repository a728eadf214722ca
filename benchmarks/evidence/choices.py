"""The ways of `robustgrad.radius` to choose a set, each from what it may see. No choice looks at an evaluation set."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from robustgrad import ChiSquare, TotalVariation
from robustgrad.ambiguity import AmbiguitySet
from robustgrad.radius import (
    against_noise,
    equal_reach,
    leave_one_domain_out,
    may_change,
    prompt_shift,
    within_ess,
    within_loss,
)
from robustgrad.schedule import Adaptive, Schedule, WarmUp

TRIED = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)  # radii that a choice by training tries
_SHARE, _ESS, _TOLERANCE, _RESAMPLES = 0.1, 0.8, 0.05, 100


class Seen(NamedTuple):
    """What is known of one seed before its model is trained."""

    pairs: int  # that it trains on
    steps: int
    losses: Tensor  # (n,) of plain training, on the validation pairs
    by_radius: Callable[[float], float]  # mean of them after training at a radius of total variation
    without: Callable[[float, int], float]  # mean loss on a domain of a model that trained at a radius without it
    prompts: Tensor  # (pairs, d) embeddings
    target: Tensor  # (m, d) of the prompts to come, unlabeled: half of them of each domain


Choice = Callable[[Seen], AmbiguitySet | Schedule]


def _by_loss(seen: Seen) -> TotalVariation:
    return TotalVariation(within_loss({r: seen.by_radius(r) for r in TRIED}, tolerance=_TOLERANCE))


def _by_prompts(seen: Seen) -> TotalVariation:
    shift = prompt_shift(seen.prompts, seen.target, resamples=_RESAMPLES)
    return TotalVariation(shift.total_variation.value)


CHOICES: dict[str, Choice] = {
    "10% may change": lambda seen: may_change(_SHARE),
    "10% may change, as chi-square": lambda seen: equal_reach(may_change(_SHARE), ChiSquare, seen.losses),
    "ess of 80%": lambda seen: within_ess(TotalVariation, seen.losses, ess=_ESS * len(seen.losses)),
    "validation loss within 5%": _by_loss,
    "target prompts": _by_prompts,
    "leave one domain out": lambda seen: TotalVariation(leave_one_domain_out(seen.without, TRIED, [0, 1]).by_mean),
    "confidence 95%": lambda seen: against_noise(ChiSquare, seen.pairs),
    "warm-up to TV .1": lambda seen: WarmUp(TotalVariation(0.1), steps=seen.steps // 2),
    "adaptive up to TV .4": lambda seen: Adaptive(TotalVariation(0.4), tolerance=_TOLERANCE / 2, start=0.25),
}
