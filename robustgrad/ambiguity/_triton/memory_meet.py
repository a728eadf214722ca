"""What a memory says of new losses: one launch a call.

The rule that is asked is five numbers whose meaning the kind fixes, behind those of the units:

    0-4 settled, mean, variance, level, spread   5 samples of the last step that counted   6 whether there is a rule
    7-11 line: least, slope, height, top, scale   tilt: theta, normaliser, -, top, scale
         top, near: first mass and gain, second mass and gain, mass of the memory
"""

from __future__ import annotations

import triton
import triton.language as tl


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
