"""What robust DPO is compared with: each baseline as the loss of a batch, for `dpo.py --baseline NAME`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustgrad import ChiSquare
from robustgrad.baselines import (
    GroupDRO,
    doro_ratio,
    dpo_pro,
    dr_dpo_loss,
    hardest_fraction_ratio,
    inverse_frequency_ratio,
    kldpo_ratio,
)
from robustgrad.gradient_penalty import squared_norm_losses
from robustgrad.objectives import dpo, ipo


class Baseline(NamedTuple):
    """`losses` of pairs from four log-probabilities, and `total`, 0-dim, of them, their groups and the embeddings."""

    name: str
    total: Callable[[Tensor, Tensor, list[Tensor]], Tensor]
    losses: Callable[..., Tensor] = dpo
    state: Any = None  # what has a state_dict

    def __str__(self) -> str:
        return self.name


def by_ratio(ratio: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, list[Tensor]], Tensor]:
    return lambda losses, groups, inputs: (ratio(losses, groups) * losses).mean()


def soft_labels(chosen: Tensor, *others: Tensor, beta: float) -> Tensor:
    """DPO-PRO changes nothing where labels are certain: here each is right with probability 0.9."""
    return dpo_pro(chosen, *others, preference=torch.full_like(chosen, 0.9), radius=0.1, beta=beta)


NAMES = (
    "dr-dpo", "kldpo-released", "wdpo-released", "group-dro", "gr-dpo", "gr-ipo", "dpo-pro", "doro",
    "hardest-fraction", "inverse-frequency",
)  # fmt: skip


def make_baseline(name: str, domains: Sequence[str]) -> Baseline:
    """Args: domains: of all training pairs; groups are numbered in their sorted order."""
    sizes = Counter(domains)
    counts = [sizes[domain] for domain in sorted(sizes)]
    if name in ("group-dro", "gr-dpo", "gr-ipo"):
        group_dro = GroupDRO(counts, step_size=0.1, group_loss="mean" if name == "group-dro" else "scaled")
        return Baseline(name, by_ratio(group_dro.ratio), ipo if name == "gr-ipo" else dpo, group_dro)
    ratios = {
        "kldpo-released": lambda losses, groups: kldpo_ratio(losses, temperature=0.5, form="released"),
        "doro": lambda losses, groups: doro_ratio(losses, ChiSquare(0.5), trimmed=0.1),
        "hardest-fraction": lambda losses, groups: hardest_fraction_ratio(losses, fraction=0.25, factor=3.0),
        "inverse-frequency": lambda losses, groups: inverse_frequency_ratio(groups, counts=counts),
    }
    if name in ratios:
        return Baseline(name, by_ratio(ratios[name]))
    if name == "dr-dpo":
        return Baseline(name, lambda losses, groups, inputs: dr_dpo_loss(losses, temperature=1.0))
    if name == "wdpo-released":
        penalised = partial(squared_norm_losses, coefficient=0.05)
        return Baseline(name, lambda losses, groups, inputs: penalised(losses, inputs).mean())
    return Baseline(name, lambda losses, groups, inputs: losses.mean(), soft_labels)
