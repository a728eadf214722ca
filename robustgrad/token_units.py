"""Losses by token, (b, t): what shares one ratio is a token, a span of tokens or a sequence."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _checks
from .ambiguity.groups import group_slots
from .samples import Samples

Unit = Literal["token", "sequence"] | Tensor


class Units(NamedTuple):
    """The units of one call as samples, and the unit (b, t) that each token belongs to."""

    samples: Samples
    of_token: Tensor

    @classmethod
    def of_call(
        cls,
        losses: Tensor,
        units: Unit,
        scores: Tensor | None = None,
        groups: Tensor | None = None,
        base: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Units:
        """A unit's loss is the mean of its tokens under `base`, its weight the sum of theirs.

        Raises: ValueError or TypeError: an argument that does not fit.
        """
        _checks.token_units(losses, units, scores, groups)
        by_token = scores if scores is not None and scores.shape == losses.shape else None
        tokens = Samples.of_call(losses, by_token, None, base, mask)
        if isinstance(units, Tensor):
            return _spans(tokens, units)
        places = torch.arange(losses.numel(), device=losses.device).reshape(losses.shape)
        if units == "token":
            return cls(tokens, places)
        sequences = _sequences(tokens, losses.shape)
        given = None if scores is None or by_token is not None else scores
        if given is not None or groups is not None:
            real = sequences.weights > 0
            sequences = Samples.of_call(
                sequences.scores if given is None else given, None, groups, sequences.weights, real
            )
        return cls(sequences, places // losses.shape[1])


def _sequences(tokens: Samples, shape: torch.Size) -> Samples:
    weights, scores = tokens.weights.reshape(shape), tokens.scores.reshape(shape)
    return _means(torch.where(weights > 0, weights * scores, 0.0).sum(-1), weights.sum(-1))


def _spans(tokens: Samples, ids: Tensor) -> Units:
    """As many slots as tokens, most of them of weight 0: how many spans there are is known to the device only."""
    slot = group_slots(ids.detach().reshape(-1))
    weights = tokens.weights
    zero = torch.zeros_like(weights)
    total = zero.index_add(0, slot, torch.where(weights > 0, weights * tokens.scores, 0.0))
    return Units(_means(total, zero.index_add(0, slot, weights)), slot.reshape(ids.shape))


def _means(total: Tensor, weight: Tensor) -> Samples:
    return Samples(total / torch.where(weight > 0, weight, 1.0), weight)
