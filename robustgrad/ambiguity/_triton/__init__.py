"""The kernels for NVIDIA GPUs; nothing outside this folder imports Triton, and it is loaded where a kernel runs.

rows, tilt                            a worst case in one launch: whole rows in the registers of a program
long_rows, parts, search, long_tilt   rows of more than 4096 losses: each launch is a pass over them
memory                                the memory pool: one launch a call, one a step
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


require(triton.__version__)
