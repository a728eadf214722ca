"""The gradient hook that multiplies what arrives at each loss by its ratio."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HOOKED = "_robustgrad_hooked"


def attached(losses: Tensor) -> bool:
    return hasattr(losses, _HOOKED)


def attach(losses: Tensor, ratio: Tensor, mask: Tensor | None) -> None:
    """Multiply the gradient of `losses` by `ratio`, of the same number of entries; exactly 0 where masked."""
    ratio = ratio.to(torch.float64 if losses.dtype == torch.float64 else torch.float32)
    keep = None if mask is None else mask.reshape(losses.shape)
    # Asked of the type: asking the node itself would unpack what it saved.
    saved = not torch.compiler.is_compiling() and hasattr(type(losses.grad_fn), "_saved_result")
    hook = _scale(ratio.reshape(losses.shape), keep, saved)
    losses.register_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    setattr(losses, _HOOKED, True)


def _scale(ratio: Tensor, keep: Tensor | None, saved: bool) -> Callable[[Tensor], Tensor]:
    """The hook. It holds the ratio but not the losses: a tensor that held itself would never be freed.

    An operation that saved its own output (exp, sqrt) uses the losses in its backward: differentiating
    that again would come through the hook a second time and square the ratio.
    """

    def multiply(grad: Tensor) -> Tensor:
        if saved and torch.is_grad_enabled():
            raise RuntimeError(
                "losses must not be the saved output of the operation that made them where create_graph=True: "
                "the second derivative would carry the squared ratio. Pass losses * 1 and use what comes back."
            )
        # Multiplied in the wider of the two types; autograd wants the gradient's own back.
        scaled = (grad * ratio).to(grad.dtype)
        return scaled if keep is None else torch.where(keep, scaled, 0.0)

    return multiply
