"""Reward heads on frozen features, one for each seed, side by side.

The seeds share nothing: the loss is a sum over them and AdamW acts entry by entry, so each head is what it would
be alone, and a step costs little more than that of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .features import Features

HIDDEN = 64
# By the loss of plain training on the validation set.
LEARNING_RATE = {"linear": 0.003, "bag of words": 0.003, "mlp": 0.002}

Parameters = list[Tensor]  # each (s, ...), one slice a seed


def initial(capacity: str, width: int, seeds: Sequence[int]) -> Parameters:
    """A linear head starts at 0, where every loss is log 2."""
    if capacity != "mlp":
        return [torch.zeros(len(seeds), width, 1)]
    made = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        into = torch.randn(3 * width, HIDDEN, generator=generator) * (3 * width) ** -0.5
        made.append((into, torch.zeros(1, HIDDEN), torch.randn(HIDDEN, 1, generator=generator) * HIDDEN**-0.5))
    return [torch.stack(parts) for parts in zip(*made, strict=True)]


def leads(parameters: Parameters, pairs: Features) -> Tensor:
    """Reward of the chosen minus reward of the rejected response, (s, n), for pairs (n, d) or (s, n, d).

    A linear head sees the response; the other one also the prompt, and what the two have in common.
    """
    if len(parameters) == 1:
        return _scaled(pairs.chosen - pairs.rejected).matmul(parameters[0]).squeeze(-1)
    return _reward(parameters, pairs.prompt, pairs.chosen) - _reward(parameters, pairs.prompt, pairs.rejected)


def _reward(parameters: Parameters, prompt: Tensor, response: Tensor) -> Tensor:
    into, offset, out = parameters
    prompt, response = _scaled(prompt), _scaled(response)
    seen = torch.cat([prompt, response, prompt * response], -1)
    return (seen.matmul(into) + offset).relu().matmul(out).squeeze(-1)


def _scaled(embedding: Tensor) -> Tensor:
    """Entries of size 1."""
    return embedding * embedding.shape[-1] ** 0.5
