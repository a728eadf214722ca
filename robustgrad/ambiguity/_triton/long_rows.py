"""The kernels for long rows: each launch is one pass over the losses, shared out over blocks.

A pass leaves the sums of its blocks in `parts`; the next adds them up, always in the same order, in every block. A
threshold is searched among the integers in the order of the losses, 16 at a time: whatever the losses, a fixed number
of passes finds it to the bit, so that nothing has to be looked at on the host; passes after it is found do nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    BEST,
    BOTTOM,
    FINITE,
    LANES,
    LEAST,
    MASS,
    REST,
    RISE,
    SPOILT,
    SPREAD,
    THETA,
    TIED,
    TOP,
    TOTAL,
    added,
    drop_of,
    entries,
    largest,
    smallest,
    value_of,
    weight_of,
)
from .search import bracket


@triton.jit(do_not_specialize=["base_step", "mask_step"])
def survey(
    losses, base, mask, parts, n, base_step, mask_step,
    FULL: tl.constexpr, BASED: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    lowest: tl.constexpr = -1.7976931348623157e308 if FULL else -8.034690221294951e59
    top = tl.full((T,), lowest, tl.float64)
    bottom, finite = tl.full((T,), float("inf"), tl.float64), tl.full((T,), float("inf"), tl.float64)
    total, spoilt = tl.zeros((T,), tl.float64), tl.zeros((T,), tl.int32)
    for tile in range(block, tl.cdiv(n, T), blocks):
        column = tile * T + tl.arange(0, T)
        value, weight, on, bad = entries(losses, base, mask, row, column, n, base_step, mask_step, FULL, BASED, MASKED)
        top = tl.maximum(top, value)
        bottom = tl.where(on, tl.minimum(bottom, value), bottom)
        finite = tl.where(on & (value > lowest), tl.minimum(finite, value), finite)
        total += weight
        spoilt = spoilt | bad.to(tl.int32)
    here = parts + (row * blocks + block) * LANES
    tl.store(here + TOP, tl.max(top))
    tl.store(here + BOTTOM, tl.min(bottom))
    tl.store(here + FINITE, tl.min(finite))
    tl.store(here + TOTAL, tl.sum(total))
    tl.store(here + SPOILT, tl.max(spoilt).to(tl.float64))


@triton.jit
def _edge(
    kind: tl.constexpr, ends, parts, survey, passes, top, amount, blocks, SHIFT: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """The threshold: known beforehand, or what the search has found."""
    if kind == "softmax":
        return top
    if kind == "near":
        return top - amount
    return value_of(bracket(kind, ends, parts, survey, passes, amount, blocks, SHIFT, B)[0], SHIFT)


@triton.jit(do_not_specialize=["base_step", "mask_step"])
def gather(
    losses, base, mask, parts, ends, n, base_step, mask_step, passes, first: tl.float64, third: tl.float64,
    KIND: tl.constexpr, FULL: tl.constexpr, BASED: tl.constexpr, MASKED: tl.constexpr,
    SHIFT: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """What lies above the threshold and on it."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    which, rows = tl.program_id(2), tl.num_programs(0)
    amount = tl.where(which == 0, first, third)
    survey = parts + row * blocks * LANES
    top, finite = largest(survey, TOP, blocks, B), smallest(survey, FINITE, blocks, B)
    parts += (which * rows + row) * blocks * LANES
    ends += (which * rows + row) * 2 * (passes + 1)
    edge = _edge(KIND, ends, parts, survey, passes, top, amount, blocks, SHIFT, B)
    mass, tied, rest = tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64)
    best, least = tl.zeros((T,), tl.float64), tl.full((T,), float("inf"), tl.float64)
    for tile in range(block, tl.cdiv(n, T), blocks):
        column = tile * T + tl.arange(0, T)
        value, weight, on, _ = entries(losses, base, mask, row, column, n, base_step, mask_step, FULL, BASED, MASKED)
        if KIND == "softmax":
            mass += weight * tl.exp(drop_of(KIND, value, top, finite, FULL) / first)
        else:
            mass += tl.where(value >= edge, weight, 0.0)
        tied += tl.where(value == edge, weight, 0.0)
        rest += tl.where(value < edge, weight, 0.0)
        best += tl.where(value == top, weight, 0.0)
        least = tl.where(on & (value >= edge), tl.minimum(least, value), least)
    here = parts + block * LANES
    tl.store(here + MASS, tl.sum(mass))
    tl.store(here + TIED, tl.sum(tied))
    tl.store(here + REST, tl.sum(rest))
    tl.store(here + BEST, tl.sum(best))
    tl.store(here + LEAST, tl.min(least))


@triton.jit(do_not_specialize=["base_step", "mask_step"])
def moment(
    losses, base, mask, parts, n, base_step, mask_step,
    KIND: tl.constexpr, FULL: tl.constexpr, BASED: tl.constexpr, MASKED: tl.constexpr,
    SECOND: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """E(l - least)_+ of the active losses or, that known, their variance: one after the other, so nothing cancels."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    parts += row * blocks * LANES
    top, finite = largest(parts, TOP, blocks, B), smallest(parts, FINITE, blocks, B)
    least = smallest(parts, LEAST, blocks, B)
    origin = drop_of(KIND, least, top, finite, FULL)
    if SECOND:
        origin += added(parts, RISE, blocks, B) / added(parts, MASS, blocks, B)
    sums = tl.zeros((T,), tl.float64)
    for tile in range(block, tl.cdiv(n, T), blocks):
        column = tile * T + tl.arange(0, T)
        value, weight, _, _ = entries(losses, base, mask, row, column, n, base_step, mask_step, FULL, BASED, MASKED)
        above = tl.where(value >= least, drop_of(KIND, value, top, finite, FULL) - origin, 0.0)
        sums += weight * (above * above if SECOND else above)
    tl.store(parts + block * LANES + (SPREAD if SECOND else RISE), tl.sum(sums))


@triton.jit
def _boundary(parts, blocks, total, amount, B: tl.constexpr):
    """The threshold of the top `amount`, and how much of the losses on it lies in there."""
    above = (added(parts, MASS, blocks, B) - added(parts, TIED, blocks, B)) / total
    boundary = (amount - above) / (added(parts, TIED, blocks, B) / total)
    return smallest(parts, LEAST, blocks, B), tl.minimum(tl.maximum(boundary, 0.0), 1.0)


@triton.jit
def _share(value, edge, boundary):
    """How much of each loss lies in the top."""
    return tl.where(value > edge, 1.0, tl.where(value == edge, boundary, 0.0))


@triton.jit
def _line(kind: tl.constexpr, parts, blocks, total, number, B: tl.constexpr):
    """Slope of the line, and its height at the smallest active loss."""
    mass, rise = added(parts, MASS, blocks, B) / total, added(parts, RISE, blocks, B) / total
    if kind == "price":
        slope = 1.0 / number
    else:
        spread = mass * (added(parts, SPREAD, blocks, B) / total)
        # Saturated means spread 0: then the slope must be steep whatever is left of the budget.
        budget = tl.maximum(2.0 * number * mass - added(parts, REST, blocks, B) / total, 4.930380657631324e-32)
        slope = tl.sqrt(budget / tl.maximum(spread, 1.4916681462400413e-154))
    return slope, (1.0 - rise * slope) / mass


@triton.jit
def _formula(kind: tl.constexpr, parts, blocks, total, number, B: tl.constexpr):
    """The two numbers by which `_ratio` tells the ratio of a loss."""
    mass = added(parts, MASS, blocks, B) / total
    if kind == "near":
        return number, added(parts, REST, blocks, B) / added(parts, BEST, blocks, B)
    if kind == "softmax":
        return number, mass
    if kind == "tilt":
        return smallest(parts, THETA, blocks, B), mass
    return _line(kind, parts, blocks, total, number, B)


@triton.jit
def _ratio(kind: tl.constexpr, value, top, finite, least, this, that, FULL: tl.constexpr):
    """All kinds but `top`."""
    if kind == "near":
        return tl.where(value >= top - this, 1.0, 0.0) + tl.where(value == top, that, 0.0)
    if kind == "tilt":
        return tl.exp(drop_of("ball", value, top, finite, FULL) * this) / that
    drop = drop_of(kind, value, top, finite, FULL)
    if kind == "softmax":
        return tl.exp(drop / this) / that
    from_least = drop - drop_of(kind, least, top, finite, FULL)
    return tl.where(value >= least, tl.maximum(from_least * this + that, 0.0), 0.0)


@triton.jit(do_not_specialize=["base_step", "mask_step"])
def write(
    losses, base, mask, parts, ratio, n, base_step, mask_step,
    first: tl.float64, second: tl.float64, third: tl.float64, fourth: tl.float64, fifth: tl.float64,
    KIND: tl.constexpr, FULL: tl.constexpr, BASED: tl.constexpr, MASKED: tl.constexpr,
    T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The ratio."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    other = parts + (tl.num_programs(0) + row) * blocks * LANES
    parts += row * blocks * LANES
    top, finite = largest(parts, TOP, blocks, B), smallest(parts, FINITE, blocks, B)
    total, bad = weight_of(parts, blocks, B), largest(parts, SPOILT, blocks, B) > 0.0
    best = added(parts, BEST, blocks, B) / total
    if KIND == "top":
        edge, boundary = _boundary(parts, blocks, total, first, B)
        other_edge, other_boundary = edge, boundary
        if fourth > 0.0:
            other_edge, other_boundary = _boundary(other, blocks, total, third, B)
    else:
        least = smallest(parts, LEAST, blocks, B)
        this, that = _formula(KIND, parts, blocks, total, first, B)
    for tile in range(block, tl.cdiv(n, T), blocks):
        column = tile * T + tl.arange(0, T)
        value, _, on, _ = entries(losses, base, mask, row, column, n, base_step, mask_step, FULL, BASED, MASKED)
        if KIND == "top":
            found = second * _share(value, edge, boundary) + fourth * _share(value, other_edge, other_boundary)
            found += tl.where(value == top, fifth / best, 0.0)
        else:
            found = _ratio(KIND, value, top, finite, least, this, that, FULL)
        found = tl.where(on, tl.where(bad, float("nan"), found), 0.0)
        tl.store(ratio + row * n + column, found, mask=column < n)
