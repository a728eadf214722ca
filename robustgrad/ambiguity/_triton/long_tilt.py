"""The inverse temperature of a KL ball over long rows: each step of the search is a pass over the losses."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    BEST,
    FINITE,
    LANES,
    LEAST,
    MASS,
    RISE,
    SPREAD,
    THETA,
    TOP,
    TRIED,
    added,
    drop_of,
    entries,
    largest,
    smallest,
    weight_of,
)
from .tilt import BEYOND, bracket_of, curve_of, expm1, moved


@triton.jit(do_not_specialize=["base_step", "mask_step"])
def reach(
    losses, base, mask, parts, n, base_step, mask_step,
    FULL: tl.constexpr, BASED: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Mass on the maximum; mean distance below it, mean square, and the distance to the next loss."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    parts += row * blocks * LANES
    top, finite = largest(parts, TOP, blocks, B), smallest(parts, FINITE, blocks, B)
    best, depth, square = tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64)
    gap = tl.full((T,), float("inf"), tl.float64)
    for tile in range(block, tl.cdiv(n, T), blocks):
        column = tile * T + tl.arange(0, T)
        value, weight, on, _ = entries(losses, base, mask, row, column, n, base_step, mask_step, FULL, BASED, MASKED)
        drop = drop_of("ball", value, top, finite, FULL)
        under = tl.where(drop < 0.0, weight, 0.0)
        best += weight - under
        depth -= under * drop
        square += under * drop * drop
        gap = tl.where(on & (drop < 0.0), tl.minimum(gap, -drop), gap)
    here = parts + block * LANES
    tl.store(here + BEST, tl.sum(best))
    tl.store(here + RISE, tl.sum(depth))
    tl.store(here + SPREAD, tl.sum(square))
    tl.store(here + LEAST, tl.min(gap))


@triton.jit
def _state(parts, states, step, radius, blocks, FULL: tl.constexpr, B: tl.constexpr):
    """Bracket and guess of log theta after `step` passes, and whether it has settled."""
    total = weight_of(parts, blocks, B)
    best_mass, depth = added(parts, BEST, blocks, B) / total, added(parts, RISE, blocks, B) / total
    best_mass = tl.where(best_mass > 0.0, best_mass, 1.0)
    saturated = radius >= -tl.log(best_mass)
    left = tl.where(saturated, 1.0, -tl.log(best_mass) - radius)
    if step == 0:
        finite, top = smallest(parts, FINITE, blocks, B), largest(parts, TOP, blocks, B)
        lowest = smallest(parts, TOP + 1, blocks, B)
        span, gap = -drop_of("ball", lowest, top, finite, FULL), smallest(parts, LEAST, blocks, B)
        square = added(parts, SPREAD, blocks, B) / total
        low, high, u = bracket_of(span, gap, square, best_mass, depth, radius, left)
        settled = saturated
    else:
        at = states + 4 * step - 4
        low, high, u = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        settled = tl.load(at + 3) > 0.0
        if settled == 0:
            lane = TRIED + 4 * ((step - 1) % 2)
            others, first = added(parts, lane, blocks, B) / total, added(parts, lane + 1, blocks, B) / total
            second, growth = added(parts, lane + 2, blocks, B) / total, added(parts, lane + 3, blocks, B) / total
            h, slope = curve_of(tl.exp(u), others, first, second, growth, best_mass, depth, radius < 1e-4)
            low, high, u, settled = moved(h, slope, tl.log(radius) - tl.log(left), low, high, u, settled)
    return low, high, u, settled, saturated, depth


@triton.jit
def _store(at, first, second, third, fourth):
    tl.store(at, first)
    tl.store(at + 1, second)
    tl.store(at + 2, third)
    tl.store(at + 3, fourth)


@triton.jit(do_not_specialize=["base_step", "mask_step", "step"])
def tilt(
    losses, base, mask, parts, states, n, base_step, mask_step, step, passes, radius: tl.float64,
    FULL: tl.constexpr, BASED: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sums of the curve at the guess, while it has not settled."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    parts += row * blocks * LANES
    states += row * 4 * passes
    low, high, u, settled, _saturated, depth = _state(parts, states, step, radius, blocks, FULL, B)
    if block == 0:
        _store(states + 4 * step, low, high, u, settled.to(tl.float64))
    if settled == 0:
        top, finite = largest(parts, TOP, blocks, B), smallest(parts, FINITE, blocks, B)
        theta = tl.exp(u)
        rise = tl.minimum(theta * depth, 30.0)
        others, first = tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64)
        second, growth = tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64)
        for tile in range(block, tl.cdiv(n, T), blocks):
            column = tile * T + tl.arange(0, T)
            value, weight, _, _ = entries(losses, base, mask, row, column, n, base_step, mask_step, FULL, BASED, MASKED)
            drop = drop_of("ball", value, top, finite, FULL)
            y = drop * theta + rise
            tilted = tl.where(drop < 0.0, weight, 0.0) * tl.exp(y)
            others += tilted
            first += tilted * drop
            second += tilted * drop * drop
            growth += weight * expm1(y)
        here = parts + block * LANES + TRIED + 4 * (step % 2)
        _store(here, tl.sum(others), tl.sum(first), tl.sum(second), tl.sum(growth))


@triton.jit(do_not_specialize=["base_step", "mask_step"])
def normalise(
    losses, base, mask, parts, states, n, base_step, mask_step, passes, radius: tl.float64,
    FULL: tl.constexpr, BASED: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The inverse temperature that was found, and the normaliser there."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    parts += row * blocks * LANES
    found = _state(parts, states + row * 4 * passes, passes, radius, blocks, FULL, B)
    theta = tl.where(found[4], BEYOND, tl.exp(found[2]))
    top, finite = largest(parts, TOP, blocks, B), smallest(parts, FINITE, blocks, B)
    mass = tl.zeros((T,), tl.float64)
    for tile in range(block, tl.cdiv(n, T), blocks):
        column = tile * T + tl.arange(0, T)
        value, weight, _, _ = entries(losses, base, mask, row, column, n, base_step, mask_step, FULL, BASED, MASKED)
        mass += weight * tl.exp(drop_of("ball", value, top, finite, FULL) * theta)
    tl.store(parts + block * LANES + MASS, tl.sum(mass))
    tl.store(parts + block * LANES + THETA, theta)
