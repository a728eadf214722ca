"""What the kernels for long rows share: how they read losses, their keys, and the sums that blocks leave."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import _keys, weigh

# Lanes of a block: those of `survey`, two sets of three times 16 for `search`, those of `gather` and of `moment`.
TOP: tl.constexpr = tl.constexpr(0)
BOTTOM: tl.constexpr = tl.constexpr(1)
FINITE: tl.constexpr = tl.constexpr(2)  # the smallest loss above -inf
TOTAL: tl.constexpr = tl.constexpr(3)
SPOILT: tl.constexpr = tl.constexpr(4)
TRIED: tl.constexpr = tl.constexpr(8)
MASS: tl.constexpr = tl.constexpr(136)  # from the threshold upwards
TIED: tl.constexpr = tl.constexpr(137)
REST: tl.constexpr = tl.constexpr(138)
BEST: tl.constexpr = tl.constexpr(139)  # on the maximum
LEAST: tl.constexpr = tl.constexpr(140)  # the smallest loss that is not below the threshold
RISE: tl.constexpr = tl.constexpr(144)
SPREAD: tl.constexpr = tl.constexpr(145)
THETA: tl.constexpr = tl.constexpr(146)
LANES: tl.constexpr = tl.constexpr(152)


@triton.jit
def entries(
    losses, base, mask, row, column, n, base_step, mask_step,
    FULL: tl.constexpr, BASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Losses, the lowest number where there is none; weights, 0 there; which take part, and which spoil the row."""
    real = column < n
    weight, bad = weigh(base, mask, row, column, real, base_step, mask_step, BASED, MASKED)
    on = weight != 0.0
    value = tl.load(losses + row * n + column, mask=real, other=0).to(tl.float64)
    wrong = on & ((value != value) | (value == float("inf")))
    value = tl.where(on & (wrong == 0), value, -float("inf"))
    # Where a loss of -inf stands: a power of two, which the key of every type holds to the bit.
    value = tl.maximum(value, -1.7976931348623157e308 if FULL else -8.034690221294951e59)
    return value, tl.where(bad, 0.0, weight), on, bad | wrong


@triton.jit
def key_of(value, SHIFT: tl.constexpr):
    """Without the bits that no loss of its type has."""
    return _keys(value) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The number of that key; the bits left out are 0, which for negative numbers the key holds inverted."""
    bits = tl.where(key < 0, (key << SHIFT) ^ 0x7FFFFFFFFFFFFFFF, key << SHIFT)
    if SHIFT > 0:
        bits = tl.where(key < 0, (bits >> SHIFT) << SHIFT, bits)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _lane(parts, lane, blocks, B: tl.constexpr, other):
    """One lane of every block, (B,)."""
    block = tl.arange(0, B)
    return tl.load(parts + block * LANES + lane, mask=block < blocks, other=other)


@triton.jit
def added(parts, lane, blocks, B: tl.constexpr):
    return tl.sum(_lane(parts, lane, blocks, B, 0.0))


@triton.jit
def largest(parts, lane, blocks, B: tl.constexpr):
    return tl.max(_lane(parts, lane, blocks, B, -float("inf")))


@triton.jit
def smallest(parts, lane, blocks, B: tl.constexpr):
    return tl.min(_lane(parts, lane, blocks, B, float("inf")))


@triton.jit
def weight_of(parts, blocks, B: tl.constexpr):
    """Total weight of the row."""
    total = added(parts, TOTAL, blocks, B)
    return tl.where(total > 0.0, total, 1.0)


@triton.jit
def _unit(top, finite):
    """The range of the finite losses: a ball sees no scale."""
    return tl.minimum(tl.maximum(top - finite, 2.2250738585072014e-308), 1.7976931348623157e308)


@triton.jit
def drop_of(kind: tl.constexpr, value, top, finite, FULL: tl.constexpr):
    """The distance below the maximum, with room for sums and squares."""
    drop = value - top
    if FULL and kind == "ball":
        drop = tl.maximum(drop / _unit(top, finite), -1099511627776.0)
    elif FULL:
        drop = tl.maximum(drop, -1.6349923815708423e296)
    return drop
