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
        rows = losses.detach().reshape(-1)
        wide = wide_dtype(losses.device)
        scores, groups = _row("scores", scores, losses), _row("groups", groups, losses)
        weight = _weight(_row("base", base, losses), _row("mask", mask, losses), rows)
        if scores is not None:
            _checks.floating("scores", scores)
        if groups is not None:
            _checks.integer_ids(groups, rows)
        worst = rows.to(wide) if scores is None else scores.to(wide)
        worst = worst.nan_to_num(torch.nan, torch.nan, -torch.inf)
        if scores is not None:
            worst = torch.where(rows < torch.inf, worst, torch.nan)
        return cls(worst, weight, groups)

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


def _weight(base: Tensor | None, mask: Tensor | None, rows: Tensor) -> Tensor | None:
    wide = wide_dtype(rows.device)
    weight = None
    if base is not None:
        _checks.base_weights(base, rows)
        weight = base.to(wide)
    if mask is not None:
        _checks.boolean_mask(mask, rows)
        weight = torch.where(mask, 1.0 if weight is None else weight, torch.zeros((), dtype=wide, device=mask.device))
    return weight


def _row(name: str, tensor: Tensor | None, losses: Tensor) -> Tensor | None:
    """The argument as (n,), detached; it may come as (n,) or in the shape of the losses."""
    if tensor is None:
        return None
    if isinstance(tensor, Tensor) and tensor.shape == losses.shape:
        tensor = tensor.detach().reshape(-1)
    _checks.fits(name, tensor, losses.detach().reshape(-1))
    return tensor.detach()
