"""The threshold of a long row, looked for among the integers in the order of the losses, 16 at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    BOTTOM,
    FINITE,
    LANES,
    TOP,
    TRIED,
    drop_of,
    entries,
    key_of,
    largest,
    smallest,
    value_of,
    weight_of,
)


@triton.jit
def _candidates(low, high):
    """16 integers of [low, high], evenly spaced; the last is never below `high`."""
    step = ((high >> 1) - (low >> 1)) // 8 + 1
    return tl.minimum(low + (tl.arange(0, 16) + 1) * step - 1, high)


@triton.jit
def bracket(kind: tl.constexpr, ends, parts, survey, step, amount, blocks, SHIFT: tl.constexpr, B: tl.constexpr):
    """Where the threshold lies after `step` passes: the first active integer is in [low, high]."""
    top, total = largest(survey, TOP, blocks, B), weight_of(survey, blocks, B)
    low, high = key_of(tl.minimum(smallest(survey, BOTTOM, blocks, B), top), SHIFT), key_of(top, SHIFT)
    if step > 0:
        low, high = tl.load(ends + 2 * step - 2), tl.load(ends + 2 * step - 1)
        if low < high:
            tried = tl.arange(0, 16)[None, :]
            block = tl.arange(0, B)[:, None]
            sums = parts + block * LANES + TRIED + 64 * ((step - 1) % 2) + tried
            mass = tl.sum(tl.load(sums, mask=block < blocks, other=0.0), 0) / total
            rise = tl.sum(tl.load(sums + 16, mask=block < blocks, other=0.0), 0) / total
            square = tl.sum(tl.load(sums + 32, mask=block < blocks, other=0.0), 0) / total
            if kind == "top":
                active = mass * total < amount * total + 1e-300
            elif kind == "price":
                active = rise < amount
            else:
                # A loss whose ratio would be rounding alone is not active: it may stand for -inf.
                active = square >= (1 + 64 * 2.220446049250313e-16) * (1.0 + 2.0 * amount) * rise * rise
            known = _candidates(low, high)
            active = active | (known >= high)
            below = tl.max(tl.where(active, low - 1, known))
            high = tl.min(tl.where(active, known, high))
            low = below + 1
    return low, high


@triton.jit(do_not_specialize=["base_step", "mask_step", "step"])
def search(
    losses, base, mask, parts, ends, n, base_step, mask_step, step, passes, first: tl.float64, third: tl.float64,
    KIND: tl.constexpr, FULL: tl.constexpr, BASED: tl.constexpr, MASKED: tl.constexpr,
    SHIFT: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Sums above 16 thresholds that part the bracket, while there is one to part."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    which, rows = tl.program_id(2), tl.num_programs(0)
    amount = tl.where(which == 0, first, third)
    survey = parts + row * blocks * LANES
    top, finite = largest(survey, TOP, blocks, B), smallest(survey, FINITE, blocks, B)
    parts += (which * rows + row) * blocks * LANES
    ends += (which * rows + row) * 2 * (passes + 1)
    low, high = bracket(KIND, ends, parts, survey, step, amount, blocks, SHIFT, B)
    if block == 0:
        tl.store(ends + 2 * step, low)
        tl.store(ends + 2 * step + 1, high)
    if low < high:
        key = _candidates(low, high)[:, None]
        edge = drop_of(KIND, value_of(key, SHIFT), top, finite, FULL)
        mass, rise, square = tl.zeros((16, T), tl.float64), tl.zeros((16, T), tl.float64), tl.zeros((16, T), tl.float64)
        for tile in range(block, tl.cdiv(n, T), blocks):
            column = tile * T + tl.arange(0, T)
            value, weight, _, _ = entries(losses, base, mask, row, column, n, base_step, mask_step, FULL, BASED, MASKED)
            counted = tl.where(key_of(value, SHIFT)[None, :] > key, weight[None, :], 0.0)
            if KIND == "top":
                mass += counted
            else:
                above = tl.maximum(drop_of(KIND, value, top, finite, FULL)[None, :] - edge, 0.0)
                rise += counted * above
                square += counted * above * above
        here = parts + block * LANES + TRIED + 64 * (step % 2) + tl.arange(0, 16)
        tl.store(here, tl.sum(mass, 1))
        tl.store(here + 16, tl.sum(rise, 1))
        tl.store(here + 32, tl.sum(square, 1))
