"""The memory pool as two kernels: `meet` asks the rule about new losses, `learn` takes a step in and fits it anew.

The rule is five numbers whose meaning the kind fixes, behind those of the units:

    0-4 settled, mean, variance, level, spread   5 samples of the last step that counted   6 whether there is a rule
    7-11 line: least, slope, height, top, scale   tilt: theta, normaliser, -, top, scale
         top, near: first mass and gain, second mass and gain, mass of the memory
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_rows import _distance, _expect, _line_of, _top_share, _unit
from ._triton_tilt import inverse_temperature


@triton.jit
def _share(mass, total, above, tied):
    return tl.minimum(tl.maximum(mass * total - above, 0.0), tied) / tied


@triton.jit
def _placed(own, weight, ring, mass, m, rule, N: tl.constexpr):
    """Gain times share of each new loss (R,), once it has joined the memory, in one or two top masses."""
    column = tl.arange(0, N)[None, :]
    kept = tl.load(ring + column, mask=column < m, other=0)
    counted = tl.load(mass + column, mask=column < m, other=0)
    above = tl.sum(tl.where(kept > own[:, None], counted, 0.0), 1)
    tied = tl.sum(tl.where(kept == own[:, None], counted, 0.0), 1) + weight
    total = tl.load(rule + 4) + weight
    first = tl.load(rule + 1) * _share(tl.load(rule), total, above, tied)
    return first + tl.load(rule + 3) * _share(tl.load(rule + 2), total, above, tied)


@triton.jit
def _asked(kind: tl.constexpr, own, weight, ring, mass, m, rule, N: tl.constexpr):
    """The ratio of new losses by the rule."""
    if kind == "plain":
        return tl.zeros_like(own) + 1.0
    if kind == "top" or kind == "near":
        return _placed(own, weight, ring, mass, m, rule, N)
    top = tl.load(rule + 3)
    drop = (tl.minimum(own, top) - top) / tl.load(rule + 4)
    if kind == "ball" or kind == "price":
        return tl.maximum((drop - tl.load(rule)) * tl.load(rule + 1) + tl.load(rule + 2), 0.0)
    return tl.minimum(tl.exp(tl.load(rule) * drop) / tl.load(rule + 1), 100.0)


# Slices of a batch begin anywhere: no kernel of its own for each alignment.
@triton.jit(do_not_specialize=["losses", "scores", "base", "mask", "alone", "seen", "lane", "n", "m"])
def meet(
    losses,
    scores,
    base,
    mask,
    alone,
    ring,
    mass,
    numbers,
    ratio,
    seen,
    nonfinite,
    lane,
    n,
    m,
    KIND: tl.constexpr,
    SCORED: tl.constexpr,
    BASED: tl.constexpr,
    MASKED: tl.constexpr,
    ALONE: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """The ratio of R new losses; takes note of scores, weights and ratios, and counts those that are not finite."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    real = row < n
    value = tl.load(losses + row, mask=real, other=0).to(tl.float64)
    good = value < float("inf")
    if SCORED:
        value = tl.load(scores + row, mask=real, other=0).to(tl.float64)
        good &= value < float("inf")
    weight = tl.zeros_like(value) + 1.0
    if BASED:
        weight = tl.load(base + row, mask=real, other=0).to(tl.float64)
    if MASKED:
        weight = tl.where(tl.load(mask + row, mask=real, other=0) != 0, weight, 0.0)
    value = tl.where(good, value, float("nan"))
    own = (value - tl.load(numbers + 3)) / tl.load(numbers + 4)
    unfilled = tl.zeros_like(value) + 1.0
    if ALONE:
        unfilled = tl.load(alone + row, mask=real, other=0)
    found = tl.where(tl.load(numbers + 6) > 0.0, _asked(KIND, own, weight, ring, mass, m, numbers + 7, N), unfilled)
    sound = good & (weight >= 0.0) & (weight < float("inf"))
    found = tl.where(weight == 0.0, 0.0, tl.where(sound, found, float("nan")))
    bad = real & (weight != 0.0) & (good == 0)
    tl.atomic_add(nonfinite, tl.sum(bad.to(tl.int64), 0))
    tl.store(ratio + row, found.to(ratio.dtype.element_ty), mask=real)
    tl.store(seen + row, value, mask=real)
    tl.store(seen + lane + row, weight, mask=real)
    tl.store(seen + 2 * lane + row, found, mask=real)


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
    on = weight > 0.0
    total = tl.sum(weight, 1, keep_dims=True)
    value = tl.where(on, value, -1.7976931348623157e308)
    top = tl.max(value, 1, keep_dims=True)
    reach = (tl.max(top) - tl.min(tl.where(on, value, float("inf")))) * spread
    filled = (tl.sum(on.to(tl.int32)) >= 64) & (reach > 1e-12 * tl.abs(level))
    tl.store(numbers + 5, sampled)
    tl.store(numbers + 6, filled.to(tl.float64))
    receivers = tl.minimum(tl.maximum(1.0 / tl.maximum(sampled, 1.0), 0.015625), 1.0)
    if KIND == "top" or KIND == "near":
        _fit_top(KIND, numbers + 7, value, on, weight, total, receivers, spread, first, second, third, fourth, fifth)
    elif KIND != "plain":
        _fit_drop(KIND, numbers + 7, value, top, on, weight, total, spread, first)
