"""Which samples and which groups carry the worst case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .evaluation import Evaluation


@dataclass(frozen=True)
class WorstSample:
    """`ratio` is weight / base weight; `neighbours` the mean loss of the nearest samples by embedding."""

    index: int
    loss: float
    weight: float
    ratio: float
    group: str | None = None
    text: str | None = None
    neighbours: float | None = None


@dataclass(frozen=True)
class GroupShare:
    """`share` of the samples by their base weight, `worst_share` in the worst case."""

    group: str
    samples: int
    share: float
    mean_loss: float
    worst_share: float


def worst_samples(
    evaluation: Evaluation, weights: Tensor, base: Tensor, neighbours: Tensor | None, count: int
) -> tuple[WorstSample, ...]:
    """The samples of the largest weight, of equals those of the largest loss first."""
    by_loss = evaluation.losses.argsort(descending=True, stable=True)
    order = by_loss[weights[by_loss].argsort(descending=True, stable=True)][:count].tolist()
    return tuple(
        WorstSample(
            i,
            evaluation.losses[i].item(),
            weights[i].item(),
            (weights[i] / base[i]).item() if base[i] > 0 else 0.0,
            None if evaluation.groups is None else str(evaluation.groups[i]),
            None if evaluation.texts is None else str(evaluation.texts[i]),
            None if neighbours is None else neighbours[i].item(),
        )
        for i in order
    )


def group_shares(evaluation: Evaluation, weights: Tensor, base: Tensor) -> tuple[GroupShare, ...]:
    """The groups, those first that gain most in the worst case."""
    if evaluation.groups is None or evaluation.slots is None:
        return ()
    names = list(dict.fromkeys(evaluation.groups))
    slots = torch.tensor(evaluation.slots)

    def totals(values: Tensor) -> list[float]:
        total: list[float] = torch.zeros(len(names), dtype=torch.float64).index_add_(0, slots, values).tolist()
        return total

    sums = zip(
        names,
        totals(torch.ones_like(base)),
        totals(base),
        totals(base * evaluation.losses),
        totals(weights),
        strict=True,
    )
    rows = [
        GroupShare(str(name), int(count), share, loss / share if share else 0.0, worst)
        for name, count, share, loss, worst in sums
    ]
    return tuple(sorted(rows, key=lambda row: row.share - row.worst_share))
