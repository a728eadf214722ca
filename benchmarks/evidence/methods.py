"""The methods that are compared: from the losses of a batch to what is descended. All come from the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, TotalVariation
from robustgrad.baselines import (
    GroupDRO,
    doro_ratio,
    dr_dpo_loss,
    hardest_fraction_ratio,
    inverse_frequency_ratio,
)
from robustgrad.objectives import bradley_terry
from robustgrad.prompt_groups import soft_group_means
from robustgrad.schedule import Adaptive, Schedule


class Batch(NamedTuple):
    """The pairs of a step: leads and losses (n,) with gradient, and what is known of their prompts."""

    leads: Tensor
    losses: Tensor
    domains: Tensor  # (n,) ids 0 .. G - 1
    membership: Tensor  # (n, K) of the prompts in soft groups


Method = Callable[[Batch], Tensor]  # a scalar to descend, once a step
Make = Callable[[Tensor], Method]  # of one run, from the sizes of the domains in its training set


class Robust:
    """The product: a `Reweighter` that sees the losses in calls of `micro`, all at once where that is None."""

    def __init__(self, ambiguity: AmbiguitySet | Schedule, *, micro: int | None = None, pool: str = "memory") -> None:
        self.reweighter, self.micro = Reweighter(ambiguity, pool=pool), micro

    def __call__(self, batch: Batch) -> Tensor:
        self.reweighter.step()  # that of the call before has happened
        parts = batch.losses.split(self.micro or len(batch.losses))
        return torch.stack([self.reweighter(part).sum() for part in parts]).sum() / len(batch.losses)


class Driven(Robust):
    """A set that was chosen for this run, or a schedule; validation may drive it."""

    def observe(self, validation_loss: float) -> None:
        if isinstance(self.reweighter.ambiguity, Adaptive):
            self.reweighter.ambiguity.observe(validation_loss)

    @property
    def at_the_end(self) -> dict[str, object]:
        """For the row of the run."""
        ambiguity = self.reweighter.ambiguity
        last = ambiguity.current if isinstance(ambiguity, Schedule) else ambiguity
        return {"set": type(last).__name__, "radius": last.radius}


class RobustDomains(Robust):
    """The worst case over the known domains, through `groups=`."""

    def __call__(self, batch: Batch) -> Tensor:
        self.reweighter.step()
        return self.reweighter(batch.losses * 1, groups=batch.domains).mean()


class RobustClusters(Robust):
    """The same over clusters of the prompts' embeddings, each prompt in one: no domain is known."""

    def __call__(self, batch: Batch) -> Tensor:
        self.reweighter.step()
        return self.reweighter(batch.losses * 1, groups=batch.membership.argmax(-1)).mean()


class RobustSoftGroups(Robust):
    """And over soft groups: smooth in the embedding."""

    def __call__(self, batch: Batch) -> Tensor:
        self.reweighter.step()
        means, masses = soft_group_means(batch.losses, batch.membership)
        return (self.reweighter(means, base=masses, groups=torch.arange(len(means))) * masses).sum()


def weighted(ratio: Callable[[Batch], Tensor]) -> Make:
    """A baseline that gives ratios (n,)."""
    return lambda counts: lambda batch: (ratio(batch) * batch.losses).mean()


def by_frequency(counts: Tensor) -> Method:
    return lambda batch: (inverse_frequency_ratio(batch.domains, counts=counts) * batch.losses).mean()


def by_group_dro(counts: Tensor) -> Method:
    group_dro = GroupDRO(counts)
    return lambda batch: (group_dro.ratio(batch.losses, batch.domains) * batch.losses).mean()


def smoothed_labels(batch: Batch) -> Tensor:
    return bradley_terry(batch.leads, torch.zeros_like(batch.leads), label_smoothing=0.1).mean()


def robust(ambiguity: AmbiguitySet, kind: type[Robust] = Robust, **options: object) -> Make:
    return lambda counts: kind(ambiguity, **options)


METHODS: dict[str, Make] = {
    "plain": lambda counts: lambda batch: batch.losses.mean(),
    "TV .1": robust(TotalVariation(0.1)),
    "TV .2": robust(TotalVariation(0.2)),
    "TV .4": robust(TotalVariation(0.4)),
    "chi-square .1": robust(ChiSquare(0.1)),
    "chi-square 1": robust(ChiSquare(1.0)),
    "KL .1": robust(KL(0.1)),
    "CVaR .5": robust(CVaR(0.5)),
    "TV .1, soft prompt groups": robust(TotalVariation(0.1), RobustSoftGroups),
    "TV .1, prompt clusters": robust(TotalVariation(0.1), RobustClusters),
    "TV .1, known domains": robust(TotalVariation(0.1), RobustDomains),
    "group DRO": by_group_dro,
    "inverse frequency": by_frequency,
    "hardest 20% x2": weighted(lambda batch: hardest_fraction_ratio(batch.losses, fraction=0.2, factor=2.0)),
    "Dr. DPO 1": lambda counts: lambda batch: dr_dpo_loss(batch.losses, temperature=1.0),
    "DORO .1, CVaR .5": weighted(lambda batch: doro_ratio(batch.losses, CVaR(0.5), trimmed=0.1)),
    "label smoothing .1": lambda counts: smoothed_labels,
}
# One of each kind, for the cells that vary one factor.
KEY_METHODS = {
    name: METHODS[name]
    for name in (
        "plain",
        "TV .1",
        "TV .4",
        "chi-square .1",
        "CVaR .5",
        "TV .1, soft prompt groups",
        "TV .1, known domains",
        "group DRO",
        "inverse frequency",
        "Dr. DPO 1",
        "DORO .1, CVaR .5",
    )
}

_BALLS = {"TV": TotalVariation, "chi-square": ChiSquare, "KL": KL}
_GRID = {
    "TV": (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1),
    "chi-square": (0, 0.01, 0.03, 0.1, 0.3, 1),
    "KL": (0, 0.01, 0.03, 0.1, 0.3, 1),
}
# Each set at many radii; radius 0 is plain averaging by another way.
RADII: dict[str, Make] = {
    f"{name} {radius:g}".replace(" 0.", " ."): robust(_BALLS[name](radius))
    for name, radii in _GRID.items()
    for radius in radii
}
TV_RADII = {name: make for name, make in RADII.items() if name.startswith("TV ") and name not in ("TV 0", "TV 1")}

# The same adversary on soft groups of prompts: a radius that moves groups moves less than one that moves prompts.
GROUP_RADII: dict[str, Make] = {
    f"TV {radius:g}, soft prompt groups".replace(" 0.", " ."): robust(TotalVariation(radius), RobustSoftGroups)
    for radius in (0.1, 0.2, 0.4, 0.7)
}

_POOLED = {"TV .1": TotalVariation(0.1), "chi-square .1": ChiSquare(0.1)}
# What competes: with the last few hundred losses, or within each micro-batch.
POOLS: dict[str, Make] = {
    "plain": METHODS["plain"],
    **{
        f"{name}, {pool} {micro}": robust(ambiguity, micro=micro, pool=pool)
        for name, ambiguity in _POOLED.items()
        for pool in ("memory", "batch")
        for micro in (1, 8)
    },
}
