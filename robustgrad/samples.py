"""The samples of a call, as the pools see them: detached, widened, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _state_checks
from .ambiguity import group_means
from .ambiguity._problem import wide_dtype


class Samples(NamedTuple):
    """Samples of one call or many, detached.

    `scores` (n,) float64, what the adversary maximises, NaN where it is NaN or +inf; `weight` (n,) base
    weights, 0 where masked, or None where all are equal; `groups` (n,) integer ids or None; `ratio` (n,)
    what the samples were given, once they were.
    """

    scores: Tensor
    weight: Tensor | None = None
    groups: Tensor | None = None
    ratio: Tensor | None = None

    @classmethod
    def of_call(
        cls,
        losses: Tensor,
        scores: Tensor | None = None,
        groups: Tensor | None = None,
        base: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Samples:
        """Raises: ValueError or TypeError: an argument that does not fit the losses."""
        return Given.of_call(losses, scores, groups, base, mask).samples()

    @property
    def bad(self) -> Tensor:
        """(n,) bool, where a sample that counts is NaN or +inf."""
        bad = self.scores.isnan()
        return bad if self.weight is None else bad & (self.weight != 0)

    @property
    def weights(self) -> Tensor:
        return torch.ones_like(self.scores) if self.weight is None else self.weight

    def counted(self) -> Samples:
        """Finite samples as they are, the others with score and weight 0."""
        weights = self.weights
        sound = torch.isfinite(self.scores) & torch.isfinite(weights) & (weights > 0)
        return self._replace(scores=torch.where(sound, self.scores, 0.0), weight=torch.where(sound, weights, 0.0))

    def grouped(self) -> Tensor:
        """Scores, replaced by the mean of each sample's group where there are groups."""
        return self.scores if self.groups is None else group_means(self.scores, self.groups, self.weight)

    def at(self, index: Tensor | slice) -> Samples:
        return Samples(**{name: tensor[index] for name, tensor in self.state_dict().items()})

    def to(self, device: torch.device) -> Samples:
        return Samples(**{name: tensor.to(device) for name, tensor in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    @classmethod
    def restored(cls, state: dict[str, Tensor], device: torch.device | None = None) -> Samples:
        """A copy of what `state_dict` returned."""
        _state_checks.rows(state)
        return cls(**{name: tensor.to(device, copy=True) for name, tensor in state.items()})

    @staticmethod
    def join(parts: list[Samples]) -> Samples:
        equal = all(part.weight is None for part in parts)
        groups = [part.groups for part in parts if part.groups is not None]
        ratios = [part.ratio for part in parts if part.ratio is not None]
        return Samples(
            torch.cat([part.scores for part in parts]),
            None if equal else torch.cat([part.weights for part in parts]),
            torch.cat(groups) if groups else None,
            torch.cat(ratios) if ratios else None,
        )


class Given(NamedTuple):
    """What a call was given, checked: each (n,), detached, in its own type."""

    losses: Tensor
    scores: Tensor | None
    groups: Tensor | None
    base: Tensor | None
    mask: Tensor | None

    @classmethod
    def of_call(
        cls, losses: Tensor, scores: Tensor | None, groups: Tensor | None, base: Tensor | None, mask: Tensor | None
    ) -> Given:
        """Raises: ValueError or TypeError: an argument that does not fit the losses."""
        rows = losses.detach().reshape(-1)
        scores, groups = _row("scores", scores, losses), _row("groups", groups, losses)
        base, mask = _row("base", base, losses), _row("mask", mask, losses)
        if base is not None:
            _checks.base_weights(base, rows)
        if mask is not None:
            _checks.boolean_mask(mask, rows)
        if scores is not None:
            _checks.floating("scores", scores)
        if groups is not None:
            _checks.integer_ids(groups, rows)
        return cls(rows, scores, groups, base, mask)

    def samples(self) -> Samples:
        wide = wide_dtype(self.losses.device)
        worst = (self.losses if self.scores is None else self.scores).to(wide)
        worst = worst.nan_to_num(torch.nan, torch.nan, -torch.inf)
        if self.scores is not None:
            worst = torch.where(self.losses < torch.inf, worst, torch.nan)
        weight = None if self.base is None else self.base.to(wide)
        if self.mask is not None:
            zero = torch.zeros((), dtype=wide, device=self.mask.device)
            weight = torch.where(self.mask, 1.0 if weight is None else weight, zero)
        return Samples(worst, weight, self.groups)


def _row(name: str, tensor: Tensor | None, losses: Tensor) -> Tensor | None:
    """The argument as (n,), detached; it may come as (n,) or in the shape of the losses."""
    if tensor is None:
        return None
    if isinstance(tensor, Tensor) and tensor.shape == losses.shape:
        tensor = tensor.detach().reshape(-1)
    _checks.fits(name, tensor, losses.detach().reshape(-1))
    return tensor.detach()
