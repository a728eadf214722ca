"""Which way a worst case is solved: by a kernel of our own, or by torch's own operations.

Where Triton is installed and runs, its kernels (`_triton/`) take CUDA tensors: rows of at most 4096 losses by one
launch, longer ones by a fixed number of passes. Each family is tried at its first use, and left to torch where it
fails. The C++ kernel takes all CPU tensors where it is asked for. Torch does the rest, Apple's GPUs for one.
The environment variable ROBUSTGRAD_KERNEL=torch|triton|cpp, read at import, chooses by hand: "torch" never uses
a kernel, "triton" insists on Triton being there, "cpp" builds the C++ kernel at import, unless it was built before.
Under Triton's interpreter (TRITON_INTERPRET=1) "triton" takes CPU tensors as well, slowly: that is for tests.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from . import _fused

_LONGEST = 4096  # losses in a row
_OLDEST = 7  # major compute capability that Triton supports


class Recipe(NamedTuple):
    """An ambiguity set as the kernels know it: a kind, and up to five numbers whose meaning it fixes."""

    kind: str
    numbers: tuple[float, ...] = ()


def chosen(name: str | None) -> str:
    """The kernel of that name, or the one that is there."""
    installed = find_spec("triton") is not None
    if not name:
        return "triton" if installed else "torch"
    _checks.choice("ROBUSTGRAD_KERNEL", name, ("torch", "triton", "cpp"))
    if name == "triton" and not installed:
        raise ImportError(
            'triton is missing, and ROBUSTGRAD_KERNEL is "triton". Install it with pip install "robustgrad[triton]", '
            "or unset ROBUSTGRAD_KERNEL."
        )
    return name


_NAME = os.environ.get("ROBUSTGRAD_KERNEL")
_KERNEL = chosen(_NAME)
# Beside the C++ kernel Triton's solves on GPUs as if nothing had been said.
_TRITON = _KERNEL == "triton" or (_KERNEL == "cpp" and chosen(None) == "triton")
_runs: dict[tuple[torch.device, str], bool] = {}
_INTERPRETED = _NAME == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def solves(losses: Tensor) -> bool:
    """Whether there are kernels where these losses are."""
    return _in_cpp(losses) or reaches(losses)


def takes(recipe: Recipe, losses: Tensor) -> bool:
    """Whether one of them solves such a set for rows of that length."""
    if _in_cpp(losses):
        return True
    long = losses.shape[-1] > _LONGEST
    if (long and recipe.kind == "plain") or losses.numel() == 0:
        return False
    family = f"{'long rows' if long else 'rows'}, {recipe.kind}"
    return tried(family, losses, lambda: _launch(losses.detach(), None, None, recipe.kind, list(recipe.numbers)))


def _in_cpp(losses: Tensor) -> bool:
    return _KERNEL == "cpp" and losses.is_cpu


def reaches(like: Tensor) -> bool:
    """Whether Triton's kernels are for tensors there."""
    return _TRITON and (like.is_cuda or (_INTERPRETED and like.is_cpu))


def tried(family: str, like: Tensor, launch: Callable[[], object]) -> bool:
    """Whether a family of kernels runs there, by its first launch.

    A trace, in which nothing can be tried, takes those that are known to run.
    """
    known = (like.device, family)
    if known not in _runs and not torch.compiler.is_compiling():
        _runs[known] = _supported(like.device) and _succeeds(family, like.device, launch)
    return _runs.get(known, False)


def _supported(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= _OLDEST


def _succeeds(family: str, device: torch.device, launch: Callable[[], object]) -> bool:
    """Triton is there with most builds of torch, the C compiler that it needs is not always."""
    try:
        launch()
    except torch.OutOfMemoryError:  # says nothing of the kernel
        raise
    except Exception as error:
        if _NAME == "triton":
            raise
        warnings.warn(
            f"The Triton kernel ({family}) does not run on {device}, so torch's own operations do its work: {error}. "
            "Triton needs a C compiler; set ROBUSTGRAD_KERNEL=torch to leave it out without this warning.",
            stacklevel=2,
        )
        return False
    return True


def solve(recipe: Recipe, losses: Tensor, base: Tensor | None, mask: Tensor | None) -> Tensor:
    """The ratio (..., n) in float64 of detached losses."""
    found: Tensor = _worst_ratio(losses, base, mask, *recipe)
    return found


def _launch(losses: Tensor, base: Tensor | None, mask: Tensor | None, kind: str, numbers: list[float]) -> Tensor:
    from ._triton import launch_long_rows, launch_rows

    launch = launch_long_rows.launch if losses.shape[-1] > _LONGEST else launch_rows.launch
    return launch(losses, base, mask, kind, numbers)


def _shape(losses: Tensor, base: Tensor | None, mask: Tensor | None, kind: str, numbers: list[float]) -> Tensor:
    return torch.empty_like(losses, dtype=torch.float64, memory_format=torch.contiguous_format)


# An operator of torch: torch.compile sees one call and need not look inside.
_library: Any = torch.library.Library("robustgrad", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch leaves it untyped
_library.define("worst_ratio(Tensor losses, Tensor? base, Tensor? mask, str kind, float[] numbers) -> Tensor")
_library.impl("worst_ratio", _launch, "CUDA")
if _INTERPRETED:
    _library.impl("worst_ratio", _launch, "CPU")
torch.library.register_fake("robustgrad::worst_ratio", _shape, lib=_library)
_worst_ratio = torch.ops.robustgrad.worst_ratio.default
if _KERNEL == "cpp":
    _fused.build()
