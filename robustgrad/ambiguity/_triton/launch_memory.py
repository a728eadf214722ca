"""The launches of the memory pool: one for a call, one for the end of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from . import five, power, readable
from .memory_learn import learn
from .memory_meet import meet

_TILE = 4096  # comparisons of a program


def launch_meet(
    losses: Tensor, scores: Tensor | None, base: Tensor | None, mask: Tensor | None, alone: Tensor | None,
    ring: Tensor, mass: Tensor, numbers: Tensor, seen: Tensor, nonfinite: Tensor, kind: str,
) -> Tensor:  # fmt: skip
    n, width = len(losses), power(len(ring)) if kind in ("top", "near") else 16
    rows = min(max(1, _TILE // width), power(n))
    ratio = torch.empty(n, dtype=torch.promote_types(losses.dtype, torch.float32), device=losses.device)
    with torch.cuda.device_of(losses):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        meet[(-(-n // rows),)](
            *(losses if one is None else readable(one) for one in (losses, scores, base, mask, alone)),
            *(ring, mass, numbers, ratio, seen, nonfinite),
            *(seen.stride(0), n, len(ring)),
            KIND=kind,
            **{flag: one is not None for flag, one in
               zip(("SCORED", "BASED", "MASKED", "ALONE"), (scores, base, mask, alone), strict=True)},
            R=rows,
            N=width,
            num_warps=4,
        )  # fmt: skip
    return ratio


def launch_learn(
    seen: Tensor, ring: Tensor, mass: Tensor, new_ring: Tensor, new_mass: Tensor, numbers: Tensor, kind: str,
    recipe: list[float],
) -> None:  # fmt: skip
    b, m = seen.shape[1], len(ring)
    kept = power(len(new_ring))
    with torch.cuda.device_of(ring):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        learn[(1,)](
            *(seen, ring, mass, new_ring, new_mass, numbers),
            *(seen.stride(0), m, b, m + b - len(new_ring)),
            *five(recipe),
            KIND=kind,
            N=power(m + b),
            KEPT=kept,
            num_warps=min(16, max(4, kept // 128)),
        )
