"""The kernels for NVIDIA GPUs; nothing outside this folder imports Triton, and it is loaded where a kernel runs.

rows, tilt                            a worst case in one launch: whole rows in the registers of a program
long_rows, parts, search, long_tilt   rows of more than 4096 losses: each launch is a pass over them
memory_meet, memory_learn             the memory pool: one launch a call, one a step
launch_rows, launch_long_rows, launch_memory   their launches, as torch's operators call them
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor


def require(version: str) -> None:
    """Raise an ImportError for a Triton that narrows a kernel's numbers to float32, whatever it declares."""
    if tuple(map(int, version.split(".")[:2])) < (3, 4):
        raise ImportError(f"triton must be 3.4 or newer, got {version}: install a newer torch, which brings its own")


def readable(given: Tensor) -> Tensor:
    """As a kernel reads it: without gaps, and a mask as bytes."""
    given = given.contiguous()
    return given.view(torch.uint8) if given.dtype == torch.bool else given


def steps(given: tuple[Tensor | None, ...], n: int) -> list[int]:
    """From one row of each to the next: one row of a base or mask may serve all."""
    return [0 if one is None or one.dim() == 1 else n for one in given]


def power(n: int, least: int = 16) -> int:
    """The next power of two, at least `least`."""
    found: int = triton.next_power_of_2(n)
    return max(least, found)


def five(numbers: list[float]) -> list[float]:
    """A set's numbers, as many as a kernel takes."""
    return [*numbers, *[0.0] * (5 - len(numbers))]


require(triton.__version__)
