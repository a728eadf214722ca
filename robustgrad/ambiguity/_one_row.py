"""One ordinary row on the CPU, by numpy and without a copy of the losses: a call of torch costs twice as much.

Ordinary is a row of finite losses that differ, all of them taking part with the same weight, and whose squares are
safe. Any other is None here, and left to torch. Kinds and numbers are those of the kernels (`Recipe`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._checks import readable
from ._elimination import BLOCK, LONG, Array, Given, line_of_long_row, line_of_whole_row
from ._kernel import Recipe
from ._linear import Limit, Line
from ._tilted_row import inverse_temperature, tilted

_NARROWEST, _WIDEST = 1e-70, 1e100  # range of losses whose squares are safe
_FLAT = 1e-3  # rise of a line to the largest loss, as a share of where it begins


def solve(recipe: Recipe, losses: Tensor) -> Tensor | None:
    """The ratio (n,) in float64 of detached losses (n,), if they are such a row."""
    if losses.dim() != 1 or not readable(losses) or recipe.kind not in _WAYS:
        return None
    wide = losses if losses.dtype in (torch.float32, torch.float64) else losses.float()
    # In Python's numbers: the difference of two of float32 may not fit into one.
    least, top = (end.numpy().item() for end in wide.aminmax())
    if not _NARROWEST < top - least < _WIDEST:
        return None
    ratio = _WAYS[recipe.kind](wide.numpy(), least, top, *recipe.numbers)
    return None if ratio is None else torch.from_numpy(ratio)


def _top(
    given: Given,
    least: float,
    top: float,
    mass: float,
    gain: float,
    more: float = 0.0,
    gain_of_more: float = 0.0,
    moved: float = 0.0,
) -> Array:
    ratio = _top_share(given, mass, gain)
    if more:
        ratio += _top_share(given, more, gain_of_more)
    if moved:
        best = given == top
        ratio[best] += moved * len(given) / np.count_nonzero(best)
    return ratio


def _top_share(given: Given, mass: float, gain: float) -> Array:
    """`gain` above the quantile of the heaviest-loss `mass`, less for the ties on it, and 0 below."""
    n = len(given)
    k = min(max(math.ceil(mass * n), 1), n)
    edge = np.partition(given, n - k)[n - k]
    above, tied = given > edge, given == edge
    share = (mass * n - np.count_nonzero(above)) / np.count_nonzero(tied)
    # Without a product where there is none.
    ratio: Array = above.astype(np.float64) if gain == 1.0 else above * gain
    ratio[tied] = gain * min(max(share, 0.0), 1.0)
    return ratio


def _near(given: Given, least: float, top: float, price: float) -> Array:
    kept, best = given >= np.float64(top - price), given == top
    ratio = kept.astype(np.float64)
    ratio[best] += (len(given) - np.count_nonzero(kept)) / np.count_nonzero(best)
    return ratio


def _ball(given: Given, least: float, top: float, radius: float) -> Array:
    return _linear(given, least, top, Limit(radius))


def _price(given: Given, least: float, top: float, price: float) -> Array | None:
    # Where the line is so steep that it overflows, torch's infinities are in order.
    return _linear(given, least, top, Limit(0.0, price)) if (top - least) / _WIDEST < price else None


def _linear(given: Given, least: float, top: float, limit: Limit) -> Array:
    found = line_of_long_row(given, least, top, limit) if len(given) >= LONG else None
    if found is not None:
        return _on_line(given, top, found)
    drop = np.subtract(given, top, dtype=np.float64)
    return _on_line(drop, 0.0, line_of_whole_row(drop, None, limit))


def _on_line(losses: Given, top: float, line: Line) -> Array:
    least, ratio = np.float64(line.least), np.empty(len(losses))
    # Where the budget is just used up the line is flat, and only the order tells who is active.
    flat = line.slope * (top - line.least) < _FLAT * line.height
    for start in range(0, len(losses), BLOCK):
        part = ratio[start : start + BLOCK]
        np.subtract(losses[start : start + BLOCK], least, out=part)
        active = part >= 0.0 if flat else None
        part *= line.slope
        part += line.height
        if active is None:
            np.maximum(part, 0.0, out=part)
        else:
            part *= active
    return ratio


def _tilt(given: Given, least: float, top: float, radius: float) -> Array:
    return tilted(given, top, inverse_temperature(given, least, top, radius))


def _softmax(given: Given, least: float, top: float, temperature: float) -> Array:
    return tilted(given, top, 1 / temperature)


_WAYS: dict[str, Callable[..., Array | None]] = {
    "top": _top,
    "near": _near,
    "ball": _ball,
    "price": _price,
    "tilt": _tilt,
    "softmax": _softmax,
}
