"""A memory takes a step in and fits its rule anew: one launch a step. `memory_meet.py` says what the rule is."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import _distance, _expect, _line_of, _top_share, _unit
from .tilt import inverse_temperature


@triton.jit
def _held(numbers, level_now, spread_now, settled, mean, variance):
    """Level and spread, kept until the running ones have clearly moved away; see `Units`."""
    spread = tl.where(variance > 0.0, tl.sqrt(variance), 1.0)
    drifted = tl.abs(mean - level_now) > 0.25 * spread_now
    drifted = drifted | (tl.abs(tl.log(spread / spread_now)) > 0.25) | (settled < 0.9)
    return tl.where(drifted, mean, level_now), tl.where(drifted, spread, spread_now)


@triton.jit
def _units(numbers, value, weight, sampled):
    """The units with a step merged in, stored; returns level and spread."""
    tiny: tl.constexpr = 2.2250738585072014e-308
    total = tl.maximum(tl.sum(weight), tiny)
    mean = tl.sum(weight * value) / total
    variance = tl.sum(weight * (value - mean) * (value - mean)) / total
    decay = tl.exp2(-sampled / 256.0)
    old, new = decay * tl.load(numbers), 1.0 - decay
    part = new / tl.maximum(old + new, tiny)
    before = tl.load(numbers + 1)
    step = mean - before
    variance = (1.0 - part) * tl.load(numbers + 2) + part * variance + part * (1.0 - part) * step * step
    mean = before + part * step
    level, spread = _held(numbers, tl.load(numbers + 3), tl.load(numbers + 4), old + new, mean, variance)
    tl.store(numbers, old + new)
    tl.store(numbers + 1, mean)
    tl.store(numbers + 2, variance)
    tl.store(numbers + 3, level)
    tl.store(numbers + 4, spread)
    return level, spread


@triton.jit
def _kept(there, counts, excess):
    """Where each entry goes: those that do not count first, in order otherwise, and the first `excess` drop out."""
    idle = (there & (counts == 0)).to(tl.int32)
    busy = counts.to(tl.int32)
    behind = tl.sum(idle) + tl.cumsum(busy, 1) - 1
    return tl.where(counts, behind, tl.cumsum(idle, 1) - 1) - excess


@triton.jit
def _store_rule(rule, first, second, third, fourth, fifth):
    tl.store(rule, tl.sum(first))
    tl.store(rule + 1, tl.sum(second))
    tl.store(rule + 2, tl.sum(third))
    tl.store(rule + 3, tl.sum(fourth))
    tl.store(rule + 4, tl.sum(fifth))


@triton.jit
def _fit_top(kind: tl.constexpr, rule, values, on, weight, total, receivers, unit, first, second, third, fourth, fifth):
    zero = tl.zeros_like(total)
    if kind == "near":
        values = tl.where(on, values, 0.0)
        received = weight * _top_share(values, on, weight, total, receivers)
        edge = tl.sum(received * values, 1, keep_dims=True) / tl.sum(received, 1, keep_dims=True) - first / unit
        kept = _expect(tl.where(values >= edge, 1.0, 0.0), weight, total)
        _store_rule(rule, kept, zero + 1.0, zero + receivers, (1.0 - kept) / receivers, total)
    elif fifth > 0.0:
        # The top share stands for the single largest loss.
        _store_rule(rule, zero + first, zero + second, zero + receivers, zero + fifth / receivers, total)
    else:
        _store_rule(rule, zero + first, zero + second, zero + third, zero + fourth, total)


@triton.jit
def _fit_drop(kind: tl.constexpr, rule, values, top, on, weight, total, spread, number):
    """A line or a tilting, for distances below the largest remembered loss."""
    scale, price = tl.zeros_like(total) + 1.0, number / spread
    if kind == "ball" or kind == "tilt":
        scale = _unit(values, top, on)
        drop = tl.maximum((values - top) / scale, -1099511627776.0)
    else:
        drop = _distance(values, top, True)
    if kind == "ball" or kind == "price":
        least, slope, height = _line_of(kind, drop, on, weight, total, number, price)
        _store_rule(rule, least, slope, height, top, scale)
    else:
        drop = tl.where(on, drop, 0.0)
        if kind == "tilt":
            theta = inverse_temperature(drop, weight, total, number)
        else:
            theta = 1.0 / (price + tl.zeros_like(total))
        _store_rule(rule, theta, _expect(tl.exp(theta * drop), weight, total), scale, top, scale)


@triton.jit
def _fit(kind: tl.constexpr, numbers, value, weight, sampled, level, spread, first, second, third, fourth, fifth):
    """Whether there is a rule, and the rule."""
    on = weight > 0.0
    total = tl.sum(weight, 1, keep_dims=True)
    value = tl.where(on, value, -1.7976931348623157e308)
    top = tl.max(value, 1, keep_dims=True)
    reach = (tl.max(top) - tl.min(tl.where(on, value, float("inf")))) * spread
    filled = (tl.sum(on.to(tl.int32)) >= 64) & (reach > 1e-12 * tl.abs(level))
    tl.store(numbers + 5, sampled)
    tl.store(numbers + 6, filled.to(tl.float64))
    receivers = tl.minimum(tl.maximum(1.0 / tl.maximum(sampled, 1.0), 0.015625), 1.0)
    if kind == "top" or kind == "near":
        _fit_top(kind, numbers + 7, value, on, weight, total, receivers, spread, first, second, third, fourth, fifth)
    elif kind != "plain":
        _fit_drop(kind, numbers + 7, value, top, on, weight, total, spread, first)


@triton.jit(do_not_specialize=["seen", "lane", "m", "b", "excess"])
def learn(
    seen,
    ring,
    mass,
    new_ring,
    new_mass,
    numbers,
    lane,
    m,
    b,
    excess,
    first: tl.float64,
    second: tl.float64,
    third: tl.float64,
    fourth: tl.float64,
    fifth: tl.float64,
    KIND: tl.constexpr,
    N: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Takes the b samples of a step into a memory of m, less `excess` old ones, and fits the rule; in place too."""
    column = tl.arange(0, N)[None, :]
    there, fresh = column < m + b, (column >= m) & (column < m + b)
    value = tl.load(seen + (column - m), mask=fresh, other=0)
    weight = tl.load(seen + lane + (column - m), mask=fresh, other=0)
    sound = fresh & (tl.abs(value) < float("inf")) & (weight > 0.0) & (weight < float("inf"))
    value, weight = tl.where(sound, value, 0.0), tl.where(sound, weight, 0.0)
    sampled = tl.load(numbers + 5)
    level, spread = tl.load(numbers + 3), tl.load(numbers + 4)
    if b > 0:
        sampled = tl.sum(sound.to(tl.float64))
        level, spread = _units(numbers, value, weight, sampled)
    value = (value - level) / spread
    value = tl.where(fresh, value, tl.load(ring + column, mask=column < m, other=0))
    weight = tl.where(fresh, weight, tl.load(mass + column, mask=column < m, other=0))
    place = _kept(there, weight > 0.0, excess)
    tl.debug_barrier()  # The new memory may lie where the old one does.
    tl.store(new_ring + place, value, mask=there & (place >= 0))
    tl.store(new_mass + place, weight, mask=there & (place >= 0))
    tl.debug_barrier()
    # In the order of the memory alone, so that a memory that was saved and restored fits the same to the bit.
    column = tl.arange(0, KEPT)[None, :]
    value = tl.load(new_ring + column, mask=column < m + b - excess, other=0)
    weight = tl.load(new_mass + column, mask=column < m + b - excess, other=0)
    _fit(KIND, numbers, value, weight, sampled, level, spread, first, second, third, fourth, fifth)
