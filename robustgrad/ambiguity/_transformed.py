"""A solve inside torch.func: under vmap the batch is more rows, and nothing is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Solve = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def transformed() -> bool:
    """Whether a transformation of torch.func is under way: tensors have no values then, or many in the place of one."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


class Transformed(torch.autograd.Function):
    """Transformed.apply(solve, losses, base, mask) is solve(losses, base, mask) on tensors without a wrapping."""

    @staticmethod
    def forward(solve: Solve, losses: Tensor, base: Tensor | None, mask: Tensor | None) -> Tensor:
        return solve(losses, base, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        return None, None, None, None

    @staticmethod
    def vmap(
        info: Any, places: tuple[int | None, ...], solve: Solve, losses: Tensor, base: Any, mask: Any
    ) -> tuple[Tensor, int]:
        rows = losses.expand(info.batch_size, *losses.shape) if places[1] is None else losses.movedim(places[1], 0)
        others = (_of_rows(given, place, rows) for given, place in ((base, places[2]), (mask, places[3])))
        return Transformed.apply(solve, rows, *others), 0  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _of_rows(given: Tensor | None, place: int | None, rows: Tensor) -> Tensor | None:
    """The base or mask of all rows; one that all share is expanded."""
    if given is None or place is None:
        return given if given is None else given.expand_as(rows)
    given = given.movedim(place, 0)
    return given.reshape(len(given), *[1] * (rows.dim() - given.dim()), *given.shape[1:]).expand_as(rows)
