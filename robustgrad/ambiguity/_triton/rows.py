"""The kernel: whole rows of losses in the registers of one program."""

from __future__ import annotations

import triton
import triton.language as tl

from .tilt import inverse_temperature


@triton.jit
def _expect(values, weight, total):
    """Mean under the base of each row of (R, N), as (R, 1)."""
    return tl.sum(weight * values, 1, keep_dims=True) / total


@triton.jit
def _keys(values):
    """Integers (int64) in the order of the values (float64)."""
    bits = values.to(tl.int64, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)


@triton.jit
def _active(kind: tl.constexpr, edge, values, weight, total, amount, price):
    """Whether a loss of value `edge` is above the threshold that is looked for."""
    if kind == "quantile":
        # The largest loss is active even where nothing is asked for.
        return tl.sum(tl.where(values > edge, weight, 0.0), 1, keep_dims=True) < amount * total + 1e-300
    mass, rest, rise, spread = _sums(edge, values, weight, total)
    if kind == "price":
        return rise < price
    # A loss whose ratio would be rounding alone is not active: it may stand for -inf.
    return spread >= (1 + 64 * 2.220446049250313e-16) * (2 * amount * mass - rest) * rise * rise


@triton.jit
def _sums(edge, values, weight, total):
    """Mass from `edge` upwards and below, E(l - edge)_+, and mass squared times the variance above."""
    counted = tl.where(values >= edge, weight, 0.0)
    above = tl.where(values >= edge, values - edge, 0.0)
    mass = tl.sum(counted, 1, keep_dims=True) / total
    rest = tl.sum(weight - counted, 1, keep_dims=True) / total
    rise = _expect(above, counted, total)
    centred = above - rise / tl.where(mass > 0.0, mass, 1.0)
    return mass, rest, rise, mass * _expect(centred * centred, counted, total)


@triton.jit
def _least(kind: tl.constexpr, values, on, weight, total, amount, price):
    """The smallest active value of each row: a bisection on the integers in the order of the values.

    Values up to `low` are not active, those above `high` are. Both bounds move on to a value of the row, so
    that ordinary rows need about log2(n) + 8 steps, and any row at most 64.
    """
    keys = tl.where(on, _keys(values), -0x7FFFFFFFFFFFFFFF)
    low = tl.min(tl.where(on, keys, 0x7FFFFFFFFFFFFFFF), 1, keep_dims=True) - 1
    high = tl.max(keys, 1, keep_dims=True) - 1
    while tl.max(tl.where(low < high, 1, 0)) > 0:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        beyond = on & (keys > middle)
        edge = tl.min(tl.where(beyond, values, float("inf")), 1, keep_dims=True)
        active = _active(kind, edge, values, weight, total, amount, price) & (low < high)
        under = tl.maximum(tl.max(tl.where(beyond, low, keys), 1, keep_dims=True), low)
        low, high = tl.where(active | (low >= high), low, _keys(edge)), tl.where(active, under, high)
    return tl.min(tl.where(on & (keys > low), values, float("inf")), 1, keep_dims=True)


@triton.jit
def _top_share(values, on, weight, total, amount):
    """How much of each loss lies in the top `amount` of the base."""
    edge = _least("quantile", values, on, weight, total, amount, 0.0)
    above, tied = tl.where(values > edge, 1.0, 0.0), tl.where(values == edge, 1.0, 0.0)
    boundary = (amount - _expect(above, weight, total)) / _expect(tied, weight, total)
    return above + tied * tl.minimum(tl.maximum(boundary, 0.0), 1.0)


@triton.jit
def _line_of(kind: tl.constexpr, drop, on, weight, total, radius, price):
    """Smallest active drop, slope and height there of the ratio that spends the radius, or pays the price."""
    least = _least(kind, drop, on, weight, total, radius, price)
    mass, rest, rise, spread = _sums(least, drop, weight, total)
    if kind == "price":
        slope = 1.0 / (price + tl.zeros_like(rise))
    else:
        # Saturated means spread 0: then the slope must be steep whatever is left of the budget.
        budget = tl.maximum(2 * radius * mass - rest, 4.930380657631324e-32)
        slope = tl.sqrt(budget / tl.maximum(spread, 1.4916681462400413e-154))
    return least, slope, (1.0 - rise * slope) / mass


@triton.jit
def _line(kind: tl.constexpr, drop, on, weight, total, radius, price):
    """The ratio that is linear above a threshold."""
    least, slope, height = _line_of(kind, drop, on, weight, total, radius, price)
    return tl.where(drop >= least, tl.maximum((drop - least) * slope + height, 0.0), 0.0)


@triton.jit
def _unit(values, top, on):
    """The range of the finite losses of each row."""
    finite = tl.where(on & (values > -1.7976931348623157e308), values - top, 0.0)
    unit = -tl.min(finite, 1, keep_dims=True)
    return tl.minimum(tl.maximum(unit, 2.2250738585072014e-308), 1.7976931348623157e308)


@triton.jit
def _scaled(values, top, on, FULL: tl.constexpr):
    """The distance below the maximum in units whose squares are safe: a ball sees no scale."""
    drop = values - top
    if not FULL:
        return drop
    return tl.maximum(drop / _unit(values, top, on), -1099511627776.0)


@triton.jit
def _distance(values, top, FULL: tl.constexpr):
    drop = values - top
    if FULL:
        return tl.maximum(drop, -1.6349923815708423e296)
    return drop


@triton.jit
def _ratio(kind: tl.constexpr, values, top, on, weight, total, number, FULL: tl.constexpr):
    """The ratio where the loss is real and the row has an answer; all kinds with one number or none."""
    if kind == "plain":
        found = tl.zeros_like(values) + 1.0
    elif kind == "near":
        found = tl.where(values >= top - number, 1.0, 0.0)
        best = tl.where(values == top, 1.0, 0.0)
        found += best * (_expect(1.0 - found, weight, total) / _expect(best, weight, total))
    elif kind == "ball":
        found = _line("ball", _scaled(values, top, on, FULL), on, weight, total, number, 0.0)
    elif kind == "price":
        found = _line("price", _distance(values, top, FULL), on, weight, total, 0.0, number)
    else:
        drop = _distance(values, top, FULL) / number
        if kind == "tilt":
            drop = tl.where(on, _scaled(values, top, on, FULL), 0.0)
            drop *= inverse_temperature(drop, weight, total, number)
        found = tl.exp(drop)
        found /= _expect(found, weight, total)
    return found


@triton.jit
def weigh(base, mask, row, column, real, base_step, mask_step, BASED: tl.constexpr, MASKED: tl.constexpr):
    """Base weights, 0 where masked, and which of them no distribution has."""
    weight = tl.where(real, 1.0, 0.0).to(tl.float64)
    bad = tl.zeros_like(weight) > 0
    if BASED:
        weight = tl.load(base + row * base_step + column, mask=real, other=0).to(tl.float64)
        bad = ((weight >= 0.0) & (weight < float("inf"))) == 0
    if MASKED:
        weight = tl.where(tl.load(mask + row * mask_step + column, mask=real, other=0) != 0, weight, 0.0)
    return weight, bad


@triton.jit
def _weights(base, mask, row, column, real, base_step, mask_step, BASED: tl.constexpr, MASKED: tl.constexpr):
    """Base weights with their sum, the losses that take part, and the rows whose base is no distribution."""
    weight, bad = weigh(base, mask, row, column, real, base_step, mask_step, BASED, MASKED)
    on = weight != 0.0
    weight = tl.where(bad, 0.0, weight)
    total = tl.sum(weight, 1, keep_dims=True)
    total = tl.where(total > 0.0, total, 1.0)
    if BASED:
        weight, total = weight / total, tl.full(total.shape, 1.0, tl.float64)
    return weight, total, on, tl.max(bad.to(tl.int32), 1, keep_dims=True) > 0


# Their values would make no better code, only more of it to compile.
@triton.jit(do_not_specialize=["rows", "base_step", "mask_step"])
def solve_rows(
    losses,
    base,
    mask,
    ratio,
    rows,
    n,
    base_step,
    mask_step,
    first: tl.float64,
    second: tl.float64,
    third: tl.float64,
    fourth: tl.float64,
    fifth: tl.float64,
    KIND: tl.constexpr,
    FULL: tl.constexpr,
    BASED: tl.constexpr,
    MASKED: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """R rows of up to N losses; what the five numbers mean depends on the kind."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None].to(tl.int64)
    column = tl.arange(0, N)[None, :]
    real = (row < rows) & (column < n)
    weight, total, on, bad = _weights(base, mask, row, column, real, base_step, mask_step, BASED, MASKED)
    values = tl.load(losses + row * n + column, mask=real, other=0).to(tl.float64)
    wrong = on & ((values != values) | (values == float("inf")))
    bad |= tl.max(wrong.to(tl.int32), 1, keep_dims=True) > 0
    values = tl.where(on & (wrong == 0), values, -float("inf"))
    # Where a loss of -inf stands: below all others, with room for its powers.
    values = tl.maximum(values, -1.7976931348623157e308 if FULL else -1e60)
    top = tl.max(values, 1, keep_dims=True)
    if KIND == "top":
        found = second * _top_share(values, on, weight, total, first)
        if fourth > 0.0:
            found += fourth * _top_share(values, on, weight, total, third)
        best = tl.where(values == top, 1.0, 0.0)
        found += best * (fifth / _expect(best, weight, total))
    else:
        found = _ratio(KIND, values, top, on, weight, total, first, FULL)
    found = tl.where(on, tl.where(bad, float("nan"), found), 0.0)
    tl.store(ratio + row * n + column, found, mask=real)
