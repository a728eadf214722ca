"""What a run trains on and is judged by: pairs by seed, their labels, and the sets that choose nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from preference_pairs import Pair
from torch import Tensor

from .features import Features

BATCH = 64


@dataclass(frozen=True)
class Judged:
    """An evaluation set: its pairs as (n, d) features, in the order of its labels."""

    pairs: Features
    domains: list[str]
    longer: Tensor  # (n,) 1 where the better response is the longer one, -1 where it is the shorter, or 0
    weight: Tensor  # (n,) the share of the population that each pair stands for


@dataclass(frozen=True)
class Task:
    """Training pairs are rows of `pool`, the same for all seeds; which of them, in which order of the two responses
    is a matter of the seed."""

    pool: Features
    domains: Tensor  # (N,) ids of the rows of the pool
    membership: Tensor  # (N, K)
    index: list[Tensor]  # by seed, (n,) rows of the pool
    swapped: list[Tensor]  # by seed, (n,) bool
    validation: list[Features]  # by seed
    evals: dict[str, Judged]

    def counts(self, seed: int) -> Tensor:
        return self.domains[self.index[seed]].bincount(minlength=int(self.domains.max()) + 1).clamp_min(1)


def length_signs(pairs: Sequence[Pair]) -> Tensor:
    """(n,) float, 1 where the first response is the longer one, -1 where the second is, 0 where none is."""
    return torch.tensor([float(len(pair.chosen) - len(pair.rejected)) for pair in pairs]).sign()


def order_of_steps(count: int, steps: int, seed: int) -> Tensor:
    """(steps, BATCH) places among `count` pairs: each pair comes once before any comes twice."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rounds = -(-steps * BATCH // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return order[: steps * BATCH].reshape(steps, BATCH)


def numbered(names: Sequence[str]) -> tuple[list[str], Tensor]:
    """The names, most frequent first, and the number of each entry."""
    unique = sorted(set(names), key=lambda name: (-names.count(name), name))
    return unique, torch.tensor([unique.index(name) for name in names])


def first_of_each(domains: Sequence[str], most: int) -> Tensor:
    """The rows of the first `most` pairs of each domain, in their order."""
    seen: dict[str, int] = {}
    rows = []
    for row, name in enumerate(domains):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= most:
            rows.append(row)
    return torch.tensor(rows)


def part_of(judged: Judged, rows: Tensor) -> Judged:
    """Some pairs of an evaluation set, weighted to the same shares of the domains."""
    domains = [judged.domains[i] for i in rows.tolist()]
    share = {name: sum(w for w, d in zip(judged.weight.tolist(), judged.domains, strict=True) if d == name)
             for name in set(domains)}  # fmt: skip
    weight = torch.tensor([share[name] / domains.count(name) for name in domains])
    return Judged(judged.pairs.at(rows), domains, judged.longer[rows], weight / weight.sum())
