"""Rows of more than 4096 losses on a GPU: a fixed number of launches, each a pass over the losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import five, power, readable, steps
from . import long_rows as kernels
from .long_tilt import normalise, reach, tilt
from .parts import LANES
from .search import search

# Of a loss as float64: the last bits that its type never has, and how many bits tell its integers apart.
_BITS = {torch.float64: (0, 64), torch.float32: (29, 35), torch.bfloat16: (45, 19), torch.float16: (42, 22)}
_SEARCHED = ("top", "ball", "price")
_STEPS = 24  # of the search for a tilt; ordinary losses need about 6, and passes after that do nothing
_BLOCKS = 256
_TILE = 256


def launch(losses: Tensor, base: Tensor | None, mask: Tensor | None, kind: str, numbers: list[float]) -> Tensor:
    """The ratio (..., n) in float64."""
    n = losses.shape[-1]
    rows = losses.numel() // n
    ratio = torch.empty(losses.shape, dtype=torch.float64, device=losses.device)
    if rows:
        first, second, third, fourth, fifth = five(numbers)
        passes = _Passes(losses.contiguous(), base, mask, kind, rows, 2 if fourth > 0.0 else 1)
        # Triton launches on the current device, which need not be that of the losses.
        with torch.cuda.device_of(losses):  # type: ignore[no-untyped-call]  # torch leaves it untyped
            passes.run(ratio, (first, second, third, fourth, fifth))
    return ratio


class _Passes:
    """The launches of one solve, with what they leave for each other."""

    def __init__(
        self, losses: Tensor, base: Tensor | None, mask: Tensor | None, kind: str, rows: int, thresholds: int
    ) -> None:
        n = losses.shape[-1]
        shift, bits = _BITS[losses.dtype]
        self.kind, self.rows, self.thresholds, self.n = kind, rows, thresholds, n
        self.passes = bits // 4 + 1 if kind in _SEARCHED else _STEPS if kind == "tilt" else 0
        self.blocks = max(1, min(-(-n // (8 * _TILE)), 2 * _BLOCKS // rows, _BLOCKS))
        self.parts = losses.new_empty(thresholds * rows * self.blocks * LANES.value, dtype=torch.float64)
        self.ends = losses.new_empty(thresholds * rows * 2 * (self.passes + 1), dtype=torch.int64)
        self.losses = (losses, *(losses if given is None else readable(given) for given in (base, mask)))
        self.steps = steps((base, mask), n)
        full = losses.dtype == torch.float64
        self.flags = {"FULL": full, "BASED": base is not None, "MASKED": mask is not None, "T": _TILE}
        self.reduced: dict[str, Any] = {"KIND": kind, "B": power(self.blocks, least=2)}
        self.keyed = {"SHIFT": shift}

    def run(self, ratio: Tensor, numbers: tuple[float, ...]) -> None:
        self.one(kernels.survey, self.parts)
        if self.kind == "tilt":
            self.tilt(numbers[0])
        else:
            self.threshold(numbers[0], numbers[2])
        self.one(kernels.write, self.parts, ratio, tail=numbers, **self.reduced)

    def threshold(self, first: float, third: float) -> None:
        searching = {"both": True, **self.reduced, **self.keyed}
        for step in range(self.passes):
            self.one(search, self.parts, self.ends, tail=(step, self.passes, first, third), **searching)
        self.one(kernels.gather, self.parts, self.ends, tail=(self.passes, first, third), **searching)
        for second in {"ball": (False, True), "price": (False,)}.get(self.kind, ()):
            self.one(kernels.moment, self.parts, SECOND=second, **self.reduced)

    def tilt(self, radius: float) -> None:
        blocks, states = self.reduced["B"], self.parts.new_empty(self.rows * 4 * self.passes)
        self.one(reach, self.parts, B=blocks)
        for step in range(self.passes):
            self.one(tilt, self.parts, states, tail=(step, self.passes, radius), B=blocks)
        self.one(normalise, self.parts, states, tail=(self.passes, radius), B=blocks)

    def grid(self, both: bool) -> tuple[int, int, int]:
        # Only the first may be more than 65,535.
        return self.rows, self.blocks, self.thresholds if both else 1

    def one(self, kernel: Any, *places: Tensor, tail: tuple[float, ...] = (), both: bool = False, **meta: Any) -> None:
        kernel[self.grid(both)](*self.losses, *places, self.n, *self.steps, *tail, **meta, **self.flags, num_warps=8)
