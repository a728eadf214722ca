"""The report on one trained model, or on two that are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import _checks
from ..ambiguity import AmbiguitySet, TotalVariation
from .cautions import Noise, cautions, neighbour_losses, noise, smooth_share
from .curve import SHARES, ShiftCurve, shift_curve
from .evaluation import Evaluation
from .suggestions import Suggestion, suggestions
from .worst import GroupShare, WorstSample, group_shares, worst_samples


@dataclass(frozen=True, eq=False)
class ModelReport:
    """One model: `mean` loss, worst-case `value`, `ess` and `max_ratio` of the worst case, and what carries it.

    `smooth_share`: how much of the worst case's excess the nearest prompts share; None without embeddings.
    """

    name: str
    losses: Tensor
    base: Tensor
    weights: Tensor
    mean: float
    value: float
    ess: float
    max_ratio: float
    curve: ShiftCurve
    samples: tuple[WorstSample, ...]
    groups: tuple[GroupShare, ...]
    smooth_share: float | None


@dataclass(frozen=True, eq=False)
class Report:
    """`gain` is how much lower the second model's shift curve is than the first's, positive where it is better."""

    ambiguity: AmbiguitySet
    models: tuple[ModelReport, ...]
    gain: ShiftCurve | None
    noise: Noise | None
    cautions: tuple[str, ...]
    suggestions: tuple[Suggestion, ...]


def report(
    before: Evaluation,
    after: Evaluation | None = None,
    *,
    ambiguity: AmbiguitySet | None = None,
    shares: Sequence[float] = SHARES,
    cap: float | None = None,
    unit: str = "samples",
    level: float = 0.9,
    resamples: int = 200,
    top: int = 20,
    wrong: float = math.log(10),
    seed: int = 0,
) -> Report:
    """What a shift of prompts costs a trained model, and who pays; with two models, what the second one gains.

    Args:
        before, after: one model, or two on the same samples in the same order.
        ambiguity: whose worst case is taken apart; None is TotalVariation(0.1, cap=5): 10% of the prompts
            may change, none becomes more than 5 times as frequent.
        shares, cap, level, resamples, seed: of the shift curve; see `shift_curve`.
        unit: what the confidence band resamples: "samples" or "groups".
        top: how many samples to list.
        wrong: the loss from which on a sample counts as confidently wrong. The default, log 10, is that of a
            log loss whose model gives the right answer at most one chance in ten.
    Raises: ValueError or TypeError: samples of the two that differ, or another argument that does not fit.

    >>> import torch
    >>> found = report(Evaluation(torch.arange(100.0)), ambiguity=TotalVariation(0.1))
    >>> round(found.models[0].value - found.models[0].mean, 2)
    9.45
    """
    _checks.choice("unit", unit, ("samples", "groups"))
    _checks.whole("top", top, 1, "It is a number of samples.")
    ambiguity = TotalVariation(0.1, cap=5) if ambiguity is None else ambiguity
    _checks.instance("ambiguity", ambiguity, AmbiguitySet, "an ambiguity set", "Use TotalVariation(0.1).")
    if after is not None:
        _check_same(before, after)
    before, after = before.on_cpu(), None if after is None else after.on_cpu()
    options: dict[str, Any] = {"shares": shares, "cap": cap, "level": level, "resamples": resamples, "seed": seed}
    options |= {"slots": _slots(before, unit), "base": before.base}
    given = [before] if after is None else [before, after]
    models = tuple(_model(one, ambiguity, shift_curve(one.losses, **options), top) for one in given)
    gain = None if after is None else shift_curve(before.losses, after.losses, **options)
    last = models[-1]
    both = None if after is None else noise(before.losses, after.losses, last.weights, last.base, wrong)
    said = [text for one in models for text in cautions(one.name, one.weights, one.base, one.ess, one.smooth_share)]
    said += [str(both)] if both is not None and both.overweighted else []
    return Report(
        ambiguity, models, gain, both, tuple(said), suggestions(ambiguity, last.losses, last.base, last.groups)
    )


def _model(evaluation: Evaluation, ambiguity: AmbiguitySet, curve: ShiftCurve, top: int) -> ModelReport:
    losses = evaluation.losses
    worst = ambiguity.solve(losses, base=evaluation.base)
    base = TotalVariation(0.0).solve(losses, base=evaluation.base).weights
    near = None if evaluation.embeddings is None else neighbour_losses(losses, evaluation.embeddings)
    return ModelReport(
        evaluation.name,
        losses,
        base,
        worst.weights,
        worst.mean.item(),
        worst.value.item(),
        worst.ess.item(),
        worst.max_ratio.item(),
        curve,
        worst_samples(evaluation, worst.weights, base, near, top),
        group_shares(evaluation, worst.weights, base),
        None if near is None else smooth_share(losses, near, worst.weights, base),
    )


def _slots(evaluation: Evaluation, unit: str) -> list[int] | None:
    if unit == "samples":
        return None
    if evaluation.groups is None:
        raise ValueError('groups must be given with unit="groups", got none. Use unit="samples".')
    return evaluation.slots


def _check_same(before: Evaluation, after: Evaluation) -> None:
    _checks.same_samples("losses of after", after.losses, "losses of before", before.losses)
    for name in ("groups", "texts"):
        one, other = getattr(before, name), getattr(after, name)
        if one is None or other is None:
            continue
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            if left != right:
                raise ValueError(
                    f"{name} of the two models must be the same, got {left!r} and {right!r} at sample {i}. Evaluate "
                    "both on the same samples, in the same order."
                )
