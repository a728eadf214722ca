"""Tier A: real prompts and responses, labelled by scoring functions that are known.

A response scores by how much nearer its embedding is to some sentences than to others: two such scores, `helps` and
`cares`. The majority domain prefers the response that helps. The minority domain prefers by

    cos(conflict * 180 deg) * helps + sin(conflict * 180 deg) * cares

so conflict 0 is none, 1/2 asks for something else, 1 for the opposite. A linear head on the responses can learn
either domain, not both where they conflict; one that sees the prompt can. A share `noise` of the training labels is
wrong; labels of evaluation sets are right. With the labels the population's losses, and their worst case, are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from preference_pairs import Pair
from torch import Tensor

from robustgrad.prompt_groups import PromptGroups

from .features import Features, embed
from .sets import Sets
from .tasks import Judged, Task, length_signs, numbered

_HELPS = (
    ("Here are the steps: first do this, then do that, and check the result.", "Use this method, it works well."),
    ("I'm not sure, what do you think?", "I don't know anything about that, sorry."),
)
_CARES = (
    ("That could hurt someone, please be careful and get help.", "I'm worried about you, that sounds dangerous."),
    ("Ha ha, go for it, who cares!", "Sure, that is funny, let us have some fun."),
)


@dataclass(frozen=True)
class Truth:
    """One cell of the experiment."""

    share: float = 0.1  # of the minority domain
    conflict: float = 1.0
    noise: float = 0.0


def directions(features: Features) -> tuple[Tensor, Tensor]:
    """`helps` and `cares` as vectors (d,), of spread 1 over the pairs and without correlation."""
    gap = features.chosen - features.rejected
    helps, cares = (_between(near, far) for near, far in (_HELPS, _CARES))
    helps = helps / (gap @ helps).square().mean().sqrt()
    cares = cares - ((gap @ cares) * (gap @ helps)).mean() * helps
    return helps, cares / (gap @ cares).square().mean().sqrt()


def _between(near: Sequence[str], far: Sequence[str]) -> Tensor:
    return embed(near, "right").mean(0) - embed(far, "right").mean(0)


class _Part(NamedTuple):
    """Pairs of a file that are of the two domains."""

    rows: Tensor
    domain: Tensor  # 0 the majority, 1 the minority
    helps: Tensor  # by how much the first response is ahead
    cares: Tensor
    longer: Tensor

    def wrong_way(self, truth: Truth) -> Tensor:
        """(n,) bool, where the response that comes first is the worse one."""
        angle = truth.conflict * math.pi
        minor = math.cos(angle) * self.helps + math.sin(angle) * self.cares
        return torch.where(self.domain == 1, minor, self.helps) < 0


class KnownPairs:
    """The pairs of the two most frequent domains under the known scores, however they came labelled."""

    def __init__(self, sets: Sets, features: dict[str, Features], evaluated: str) -> None:
        self.domains = numbered([pair.domain for pair in sets.train])[0][:2]
        self.helps, self.cares = directions(features["train"])
        self.evaluated = evaluated
        self.train = self._part(sets.train, features["train"])
        self._prompts = features["train"].prompt[self.train.rows]
        self.validation = self._part(sets.validation, features["validation"])
        self._later = features["validation"].prompt[self.validation.rows]
        self.test = self._part(sets.evals[evaluated], features[evaluated])

    def _part(self, pairs: list[Pair], features: Features) -> _Part:
        rows = torch.tensor([i for i, pair in enumerate(pairs) if pair.domain in self.domains])
        kept = [pairs[i] for i in rows.tolist()]
        domain = torch.tensor([self.domains.index(pair.domain) for pair in kept])
        gap = (features.chosen - features.rejected)[rows]
        return _Part(rows, domain, gap @ self.helps, gap @ self.cares, length_signs(kept))

    def largest(self, shares: Sequence[float]) -> int:
        """How many training pairs there are for every one of the shares."""
        major, minor = (int((self.train.domain == which).sum()) for which in (0, 1))
        return min(min(int(major / (1 - share)), int(minor / share)) for share in shares)

    def minority_by_group(self, groups: PromptGroups, share: float) -> list[float]:
        """The share of the minority among the training prompts of each soft group, in order of size."""
        domain = self.train.domain
        weight = (torch.tensor([1 - share, share]) / domain.bincount(minlength=2))[domain]
        joint = groups.membership(self._prompts) * weight[:, None]
        shares = joint[domain == 1].sum(0) / joint.sum(0)
        return [round(value, 4) for value in shares.sort().values.tolist()]

    def training_prompts(self) -> Tensor:
        """Embeddings, of the rows of a task's pool."""
        return self._prompts

    def target_prompts(self) -> Tensor:
        """Embeddings of validation prompts, as many of one domain as of the other: a shift to come, unlabeled."""
        domain = self.validation.domain
        return self._later[_mixture(domain, 0.5, 2 * int(domain.bincount(minlength=2).min()), 0)]

    def task(
        self, truth: Truth, seeds: Sequence[int], size: int, groups: PromptGroups, seen: dict[str, Features]
    ) -> Task:
        """`size` training pairs a seed; the labels come from the embeddings, whatever features the model has `seen`."""
        train = self.train
        index = [_mixture(train.domain, truth.share, size, seed) for seed in seeds]
        return Task(
            pool=seen["train"].at(train.rows).swapped(train.wrong_way(truth)),
            domains=train.domain,
            membership=groups.membership(self._prompts),
            index=index,
            swapped=[_flips(size, truth.noise, seed) for seed in seeds],
            validation=[self._validation(truth, seed, seen["validation"]) for seed in seeds],
            evals={self.evaluated: self._judged(truth, seen[self.evaluated])},
        )

    def _validation(self, truth: Truth, seed: int, seen: Features) -> Features:
        """Of the same mixture and as noisy as the training pairs."""
        part = self.validation
        sizes = part.domain.bincount(minlength=2)
        size = min(int(sizes[0] / (1 - truth.share)), int(sizes[1] / truth.share))
        rows = _mixture(part.domain, truth.share, size, seed)
        labelled = seen.at(part.rows).swapped(part.wrong_way(truth))
        return labelled.at(rows).swapped(_flips(size, truth.noise, 500 + seed))

    def _judged(self, truth: Truth, seen: Features) -> Judged:
        part, shares = self.test, torch.tensor([1 - truth.share, truth.share])
        wrong = part.wrong_way(truth)
        weight = (shares / part.domain.bincount(minlength=2))[part.domain]
        names = [self.domains[which] for which in part.domain.tolist()]
        return Judged(seen.at(part.rows).swapped(wrong), names, torch.where(wrong, -1, 1) * part.longer, weight)


def _mixture(domain: Tensor, share: float, size: int, seed: int) -> Tensor:
    """(size,) different rows, a share `share` of them from domain 1; in random order."""
    generator = torch.Generator().manual_seed(seed)
    minor = max(1, round(share * size))
    rows = []
    for which, count in ((0, size - minor), (1, minor)):
        own = (domain == which).nonzero().flatten()
        rows.append(own[torch.randperm(len(own), generator=generator)[:count]])
    together = torch.cat(rows)
    return together[torch.randperm(len(together), generator=generator)]


def _flips(count: int, noise: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(7000 + seed)
    return torch.rand(count, generator=generator) < noise
