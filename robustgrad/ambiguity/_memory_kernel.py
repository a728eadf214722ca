"""A memory of losses on a GPU: one launch for a call, one for the end of a step.

The kernels take memories of at most 4096 losses, which with those of a step are at most 8192, where Triton is
installed and runs; torch does the rest. `_kernel.py` says how that is chosen. What they keep stays where it is, so
that a CUDA graph that was captured goes on from where its last replay ended.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _kernel
from ._kernel import Recipe

NUMBERS = 12  # units, samples of the last step, whether there is a rule, and the rule
_LONGEST = 4096
_MOST = 8192
_TILE = 4096  # comparisons of a program


runs = _kernel.runs


def takes(remembered: Tensor, recipe: Recipe | None) -> bool:
    """Whether the kernels keep a memory of these losses."""
    return recipe is not None and 0 < len(remembered) <= _LONGEST and runs(remembered)


def learns(remembered: int, step: int, recipe: Recipe | None) -> bool:
    """Whether they take in a step of so many."""
    return recipe is not None and remembered <= _LONGEST and remembered + step <= _MOST


def meet(
    recipe: Recipe, given: tuple[Tensor | None, ...], ring: Tensor, mass: Tensor, numbers: Tensor, seen: Tensor,
    nonfinite: Tensor,
) -> Tensor:  # fmt: skip
    """The ratio (n,) of new losses; writes their scores, weights and ratios into `seen` (3, n).

    `given` holds losses, scores, base and mask, and the ratio of each loss while there is no rule yet.
    """
    found: Tensor = torch.ops.robustgrad.meet_memory(*given, ring, mass, numbers, seen, nonfinite, recipe.kind)
    return found


def learn(
    recipe: Recipe, seen: Tensor, ring: Tensor, mass: Tensor, capacity: int, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """Ring and mass with a step's scores and weights (2, b) taken in, at most `capacity`; fits `numbers` anew."""
    kept = min(len(ring) + seen.shape[1], capacity)
    into = (ring, mass) if kept == len(ring) else (ring.new_empty(kept), mass.new_empty(kept))
    torch.ops.robustgrad.learn_memory(seen, ring, mass, *into, numbers, *recipe)
    return into


def _meet(
    losses: Tensor, scores: Tensor | None, base: Tensor | None, mask: Tensor | None, alone: Tensor | None,
    ring: Tensor, mass: Tensor, numbers: Tensor, seen: Tensor, nonfinite: Tensor, kind: str,
) -> Tensor:  # fmt: skip
    from ._triton_memory import meet as kernel

    n, width = len(losses), _power(len(ring)) if kind in ("top", "near") else 16
    rows = min(max(1, _TILE // width), _power(n))
    ratio = torch.empty(n, dtype=torch.promote_types(losses.dtype, torch.float32), device=losses.device)
    with torch.cuda.device_of(losses):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        kernel[(-(-n // rows),)](
            *(losses if one is None else _bytes(one.contiguous()) for one in (losses, scores, base, mask, alone)),
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


def _learn(
    seen: Tensor, ring: Tensor, mass: Tensor, new_ring: Tensor, new_mass: Tensor, numbers: Tensor, kind: str,
    recipe: list[float],
) -> None:  # fmt: skip
    from ._triton_memory import learn as kernel

    b, m = seen.shape[1], len(ring)
    kept = _power(len(new_ring))
    with torch.cuda.device_of(ring):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        kernel[(1,)](
            *(seen, ring, mass, new_ring, new_mass, numbers),
            *(seen.stride(0), m, b, m + b - len(new_ring)),
            *recipe,
            *[0.0] * (5 - len(recipe)),
            KIND=kind,
            N=_power(m + b),
            KEPT=kept,
            num_warps=min(16, max(4, kept // 128)),
        )


def _power(n: int) -> int:
    """The next power of two, 16 or more."""
    return max(16, 1 << (n - 1).bit_length())


def _bytes(given: Tensor) -> Tensor:
    return given.view(torch.uint8) if given.dtype == torch.bool else given


_library: Any = torch.library.Library("robustgrad", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch leaves it untyped
_library.define(
    "meet_memory(Tensor losses, Tensor? scores, Tensor? base, Tensor? mask, Tensor? alone, Tensor ring, Tensor mass, "
    "Tensor numbers, Tensor(a!) seen, Tensor(b!) nonfinite, str kind) -> Tensor"
)
_library.define(
    "learn_memory(Tensor seen, Tensor ring, Tensor mass, Tensor(a!) new_ring, Tensor(b!) new_mass, "
    "Tensor(c!) numbers, str kind, float[] numbers_of_kind) -> ()"
)
for _device in ("CUDA", "CPU"):
    _library.impl("meet_memory", _meet, _device)
    _library.impl("learn_memory", _learn, _device)
