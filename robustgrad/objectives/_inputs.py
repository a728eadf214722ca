"""What the objectives share: their inputs in float32 or wider, and entries that belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _token_checks


def widened(*tensors: Tensor) -> list[Tensor]:
    """All in their common type, float32 at least: a difference of half-precision numbers loses most digits."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def per_sample(**tensors: Tensor) -> list[Tensor]:
    """Each (n,), for the samples of the first one; widened."""
    (first, leader), *others = tensors.items()
    _checks.per_sample(first, leader)
    for name, tensor in others:
        _checks.same_samples(name, tensor, first, leader)
    return widened(*tensors.values())


def per_entry(**tensors: Tensor) -> list[Tensor]:
    """Each of the shape of the first one, which may be any; widened."""
    (first, leader), *others = tensors.items()
    _checks.floating(first, leader)
    for name, tensor in others:
        _token_checks.same_entries(name, tensor, first, leader)
    return widened(*tensors.values())
