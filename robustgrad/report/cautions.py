"""Reasons to doubt a worst case: label noise, lone samples, a weight that rests on few."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NEAREST = 10
_ROWS = 1024  # of the distance matrix at a time


@dataclass(frozen=True)
class Noise:
    """Samples that both models get confidently wrong: `share` of the base weight, `worst_share` of the worst case."""

    samples: int
    share: float
    worst_share: float
    wrong: float

    @property
    def overweighted(self) -> bool:
        return self.worst_share >= 0.25 and self.worst_share >= 3 * self.share

    def __str__(self) -> str:
        return (
            f"{self.worst_share:.0%} of the worst-case weight lies on the {self.share:.1%} of the samples "
            f"({self.samples}) that both models get confidently wrong (loss of at least {self.wrong:.3g}). "
            "Such samples are often mislabeled: read them before training on their weights; a smaller radius or a "
            "cap bounds their say."
        )


def noise(first: Tensor, second: Tensor, weights: Tensor, base: Tensor, wrong: float) -> Noise:
    both = (first >= wrong) & (second >= wrong)
    return Noise(int(both.sum()), base[both].sum().item(), weights[both].sum().item(), wrong)


def neighbour_losses(losses: Tensor, embeddings: Tensor) -> Tensor:
    """Mean loss of the nearest samples by direction of the embedding, without the sample itself, (n,)."""
    rows = torch.nn.functional.normalize(embeddings.detach().float(), dim=1)
    count = min(_NEAREST, len(rows) - 1)
    means = []
    for start in range(0, len(rows), _ROWS):
        near = rows[start : start + _ROWS] @ rows.T
        own = torch.arange(len(near))
        near[own, own + start] = -torch.inf
        means.append(losses[near.topk(count, 1).indices].mean(1))
    return torch.cat(means)


def smooth_share(losses: Tensor, neighbours: Tensor, weights: Tensor, base: Tensor) -> float | None:
    """What part of the worst case's excess over the mean is there among the neighbours too; None without excess.

    Near 1: whole regions of prompts are hard. Near 0: lone samples, as mislabeled ones are.
    """
    excess = ((weights - base) * losses).sum().item()
    return ((weights - base) * neighbours).sum().item() / excess if excess > 1e-12 else None


def cautions(name: str, weights: Tensor, base: Tensor, ess: float, smooth: float | None) -> list[str]:
    """In words, those that apply to this model."""
    found = []
    largest = weights.max().item()
    if largest > 0.05:
        found.append(
            f"{name}: one sample has {largest:.0%} of the worst-case weight. Its loss alone moves the value: use a "
            "cap, or another set."
        )
    samples = 1 / base.square().sum().item()  # effective number before
    if ess < 0.1 * samples:
        found.append(
            f"{name}: the worst case rests on {ess:.0f} of {samples:.0f} samples (effective numbers). Gradients "
            "weighted like this are that much noisier: a smaller radius keeps more."
        )
    if smooth is not None and smooth < 0.25:
        found.append(
            f"{name}: only {smooth:.0%} of the worst case's excess loss is shared by the {_NEAREST} nearest "
            "prompts. The weight sits on lone samples, as label noise does, and not on a kind of prompt."
        )
    return found
