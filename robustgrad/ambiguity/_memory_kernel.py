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

reaches = _kernel.reaches


def takes(remembered: Tensor, recipe: Recipe | None) -> bool:
    """Whether the kernels keep a memory of these losses."""
    if recipe is None or not 0 < len(remembered) <= _LONGEST or not reaches(remembered):
        return False
    return _kernel.tried(f"memory, {recipe.kind}", remembered, lambda: _try(recipe, remembered.device))


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


def _try(recipe: Recipe, device: torch.device) -> None:
    """Both kernels, with one loss of weight 0."""
    ring, mass, seen = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in (1, 1, (3, 1)))
    numbers, nonfinite = seen.new_ones(NUMBERS), torch.zeros((), dtype=torch.int64, device=device)
    learn(recipe, seen[:2], ring, mass, 1, numbers)
    meet(recipe, (ring, None, None, None, None), ring, mass, numbers, seen, nonfinite)


def _meet(*given: Any) -> Tensor:
    from ._triton.launch_memory import launch_meet

    return launch_meet(*given)


def _learn(*given: Any) -> None:
    from ._triton.launch_memory import launch_learn

    launch_learn(*given)


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
