"""Errors about numbered groups and their sizes."""

from __future__ import annotations

from torch import Tensor

from .. import _checks


def group_counts(counts: Tensor) -> None:
    """(G,) sizes of the groups; their values are read on the CPU only."""
    empty = counts.device.type == "cpu" and not bool((counts > 0).all())
    if counts.dim() != 1 or len(counts) == 0 or empty:
        got = counts.tolist() if counts.device.type == "cpu" else tuple(counts.shape)
        raise ValueError(f"counts must be (G,) numbers above 0, got {got}. Drop groups without samples.")


def group_ids(groups: Tensor, losses: Tensor, count: int) -> None:
    """Integers 0 .. count - 1, for the samples of `losses`; their values are read on the CPU only."""
    _checks.integer_ids(groups, losses)
    if groups.device.type == "cpu" and len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise ValueError(
            f"groups must be ids in 0 .. {count - 1}, got {int(groups.min())} .. {int(groups.max())}. "
            "Number the groups as in counts."
        )
