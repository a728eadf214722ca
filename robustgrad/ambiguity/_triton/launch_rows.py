"""The worst case in one kernel launch: how rows are shared out over programs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import five, power, readable, steps
from .rows import solve_rows

_TILE = 1024  # losses in a program, where rows are shorter
_PER_THREAD = 4


class Tile(NamedTuple):
    """How many rows of how many losses a program takes, and in how many warps."""

    rows: int
    losses: int
    warps: int

    @classmethod
    def of(cls, rows: int, n: int) -> Tile:
        width = power(n)
        height = min(max(1, _TILE // width), power(rows, least=1))
        return cls(height, width, min(16, max(1, height * width // (32 * _PER_THREAD))))


def launch(losses: Tensor, base: Tensor | None, mask: Tensor | None, kind: str, numbers: list[float]) -> Tensor:
    """The ratio (..., n) in float64, by one launch."""
    n = losses.shape[-1]
    ratio = torch.empty(losses.shape, dtype=torch.float64, device=losses.device)
    rows = losses.numel() // n
    if rows == 0:
        return ratio
    tile = Tile.of(rows, n)
    arguments = (
        losses.contiguous(),
        *(losses if given is None else readable(given) for given in (base, mask)),
        ratio,
        rows,
        n,
        *steps((base, mask), n),
        *five(numbers),
    )
    # Triton launches on the current device, which need not be that of the losses.
    with torch.cuda.device_of(losses):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        solve_rows[(triton.cdiv(rows, tile.rows),)](
            *arguments,
            KIND=kind,
            FULL=losses.dtype == torch.float64,
            BASED=base is not None,
            MASKED=mask is not None,
            R=tile.rows,
            N=tile.losses,
            num_warps=tile.warps,
        )
    return ratio
