"""A call inside a graph that torch.compile traces: one operator, which hides the pool and its state from it."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .token_units import Unit

_known: WeakValueDictionary[int, Any] = WeakValueDictionary()


def remember(ratios: object) -> None:
    """What gives the ratios; in a graph it stands as a number."""
    _known[id(ratios)] = ratios


def traced_ratio(
    ratios: object, losses: Tensor, surveying: bool, given: tuple[Tensor | None, ...], units: Unit | None
) -> Tensor:
    """The ratio of each loss, in its shape: the eager call, made when the graph runs.

    `given` holds scores, groups, base and mask. A survey is refused: a graph may leave out what it does not need.
    """
    if surveying:
        raise RuntimeError(
            "A window cannot be surveyed inside torch.compile. Compile the model alone and call the reweighter outside."
        )
    named = units if isinstance(units, str) else None
    spans = units if isinstance(units, Tensor) else None
    found: Tensor = torch.ops.robustgrad.ratio_of_call(id(ratios), losses.detach(), *given, named, spans)
    return found


def _call(number: int, losses: Tensor, *rest: Any) -> Tensor:
    # Copies: the graph reuses the memory of its tensors, the pool keeps what it is given.
    losses, *copies, named, spans = (x.clone() if isinstance(x, Tensor) else x for x in (losses, *rest))
    given = dict(zip(("scores", "groups", "base", "mask"), copies, strict=True))
    ratio: Tensor = _known[number]._ratio(losses, **given, units=named if spans is None else spans)
    return ratio.to(_dtype(losses), copy=True).contiguous()


def _shape(number: int, losses: Tensor, *rest: Any) -> Tensor:
    return torch.empty(losses.shape, dtype=_dtype(losses), device=losses.device)


def _dtype(losses: Tensor) -> torch.dtype:
    return torch.promote_types(losses.dtype, torch.float32)


_library: Any = torch.library.Library("robustgrad", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch leaves it untyped
_library.define(
    "ratio_of_call(int number, Tensor losses, Tensor? scores, Tensor? groups, Tensor? base, Tensor? mask, "
    "str? named, Tensor? spans) -> Tensor"
)
_library.impl("ratio_of_call", _call, "CompositeExplicitAutograd")
torch.library.register_fake("robustgrad::ratio_of_call", _shape, lib=_library)
