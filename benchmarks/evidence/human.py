"""Tier B: the labels that people gave, on every evaluation set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from preference_pairs import Pair

from robustgrad.prompt_groups import PromptGroups

from .features import Features
from .sets import Sets
from .tasks import Judged, Task, length_signs, numbered


def human_task(
    sets: Sets, features: dict[str, Features], seeds: Sequence[int], groups: PromptGroups, seen: dict[str, Features]
) -> Task:
    """All training pairs as they are labelled; the seeds differ in their batches and in where they start."""
    count = len(sets.train)
    return Task(
        pool=seen["train"],
        domains=numbered([pair.domain for pair in sets.train])[1],
        membership=groups.membership(features["train"].prompt),
        index=[torch.arange(count)] * len(seeds),
        swapped=[torch.zeros(count, dtype=torch.bool)] * len(seeds),
        validation=[seen["validation"]] * len(seeds),
        evals={name: _judged(pairs, seen[name]) for name, pairs in sets.evals.items()},
    )


def _judged(pairs: list[Pair], features: Features) -> Judged:
    weight = torch.full((len(pairs),), 1 / len(pairs))
    return Judged(features, [pair.domain for pair in pairs], length_signs(pairs), weight)
