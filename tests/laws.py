"""One `assert_*` per law of an ambiguity set; a test chooses the set, the losses and how they are solved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import oracle
import torch
from comparing import (
    FIELDS,
    Solve,
    alone,
    arrays,
    close,
    close_ratio,
    close_value,
    most_allowed,
    primal,
    spent,
    stack,
    tolerance,
    undecided,
    value_tolerance,
    widened,
)
from inputs import Case
from torch import Tensor

from robustgrad.ambiguity import AmbiguitySet, CVaR, TotalVariation


def assert_feasible(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    """A distribution, within radius and cap; ratio = weights / base; 0 where the sample takes no part."""
    worst, about, p = solve(ambiguity, case), (ambiguity, case), case.reference
    weights, ratio = worst.weights.double(), worst.ratio.double()
    assert (weights >= 0).all() and (ratio >= 0).all(), about
    assert (weights[~case.valid] == 0).all(), about
    assert case.mask is None or (worst.ratio[~case.mask] == 0).all(), about
    exact = 2e-7 if worst.weights.dtype == torch.float32 else 1e-12
    assert abs(weights.sum() - 1) <= exact, (about, weights.sum())
    assert abs((p * ratio).sum() - 1) <= exact, (about, (p * ratio).sum())
    close(worst.weights / worst.weights.max(), p * ratio / (p * ratio).max(), about)
    tol = tolerance(worst.ratio)
    assert spent(ambiguity, case, worst) <= most_allowed(ambiguity, tol), (about, worst.ratio)
    cap = getattr(ambiguity, "cap", None) or np.inf
    assert ratio.max() <= cap * (1 + tol), (about, ratio.max())


def assert_optimal(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    """Ratio and value of the oracle, and no gap between what the ratio reaches and the dual bound."""
    worst, (ratio, value) = solve(ambiguity, case), oracle.solve(ambiguity, *arrays(case))
    if not undecided(ambiguity, case):
        close_ratio(case.reference, worst.ratio, ratio, (ambiguity, case))
    close_value(ambiguity, case, worst.value, value)
    gap = oracle.dual_bound(ambiguity, *arrays(case)) - primal(ambiguity, case, worst)
    assert abs(gap) <= value_tolerance(ambiguity, case, worst.value), (ambiguity, case, gap)


def assert_summaries(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    """Value, divergence, ess and max_ratio describe the weights; every field has its shape and dtype."""
    worst, about, wide = solve(ambiguity, case), (ambiguity, case), widened(case.losses.dtype)
    for name in FIELDS:
        tensor = getattr(worst, name)
        assert tensor.dtype == wide, (about, name, tensor.dtype)
        assert tensor.shape == (case.losses.shape if name in ("weights", "ratio") else ()), (about, name)
        assert not tensor.isnan().any(), (about, name, tensor)
    if isinstance(ambiguity, (CVaR, TotalVariation)) and not oracle.price_of(ambiguity):
        losses = case.losses[case.valid]
        assert losses.min() <= worst.threshold <= losses.max(), (about, worst.threshold)
    weights = worst.weights.double()
    close(worst.ess, weights.sum() ** 2 / (weights**2).sum(), about)
    close(worst.max_ratio, worst.ratio[case.valid].max(), about)
    close(worst.divergence, np.float64(spent(ambiguity, case, worst)), about)
    close_value(ambiguity, case, worst.value, primal(ambiguity, case, worst))


def assert_between_mean_and_maximum(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    value, losses, on = solve(ambiguity, case).value, case.losses.double(), case.valid
    mean, tol = case.reference[on] @ losses[on], value_tolerance(ambiguity, case, value)
    assert mean - tol <= value.double() <= losses[on].max() + tol, (ambiguity, case, value.item())


def assert_shift_invariant(solve: Solve, ambiguity: AmbiguitySet, case: Case, shift: float) -> None:
    plain = replace(case, losses=(case.losses + shift) - shift)  # Losses that the shift does not round.
    shifted = replace(case, losses=plain.losses + shift)
    before, after = solve(ambiguity, plain), solve(ambiguity, shifted)
    if not undecided(ambiguity, shifted):
        close(after.ratio, before.ratio, (ambiguity, case))
    tol = value_tolerance(ambiguity, plain, after.value) + value_tolerance(ambiguity, shifted, after.value)
    assert abs(after.value - shift - before.value) <= tol, (ambiguity, case)


def assert_scale_invariant(solve: Solve, ambiguity: AmbiguitySet, case: Case, scale: float) -> None:
    scaled = replace(case, losses=case.losses * scale)
    before, after = solve(ambiguity, case), solve(ambiguity, scaled)
    close(after.ratio, before.ratio, (ambiguity, case, scale))
    close_value(ambiguity, scaled, after.value, scale * before.value.double())


def assert_only_ranks_matter(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    """An increasing transformation of the losses changes no ratio."""
    ranks = torch.where(case.valid, case.losses, case.losses[case.valid][0]).unique(return_inverse=True)[1]
    transformed = replace(case, losses=(ranks.double() ** 3 - 5).to(case.losses.dtype))
    close(solve(ambiguity, transformed).ratio, solve(ambiguity, case).ratio, (ambiguity, case))


def assert_permutation_equivariant(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    order = torch.randperm(len(case.losses), generator=torch.Generator().manual_seed(0))
    before, after = solve(ambiguity, case), solve(ambiguity, case.take(order))
    close(after.ratio, before.ratio[order], (ambiguity, case))
    close_value(ambiguity, case, after.value, before.value)


def assert_monotone_in_loss(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    """A higher loss never has a lower ratio, and equal losses have the same ratio to the bit."""
    ratio, losses = solve(ambiguity, case).ratio[case.valid], case.losses[case.valid]
    order = losses.argsort(stable=True)
    step, tie = ratio[order].diff(), losses[order].diff() == 0
    slack = 4 * torch.finfo(ratio.dtype).eps * ratio[order][1:]
    assert (step >= -slack).all(), (ambiguity, case, step.min())
    assert (step[tie] == 0).all(), (ambiguity, case, step[tie].abs().max())


def assert_concave_in_radius(
    solve: Solve, family: Callable[[float], AmbiguitySet], radii: Sequence[float], case: Case
) -> None:
    values = [solve(family(radius), case).value.double().item() for radius in radii]
    tol = value_tolerance(family(radii[0]), case, solve(family(radii[0]), case).value)
    assert all(low <= high + tol for low, high in pairwise(values)), (family(1), case, values)
    for i in range(1, len(radii) - 1):
        share = (radii[i] - radii[i - 1]) / (radii[i + 1] - radii[i - 1])
        chord = (1 - share) * values[i - 1] + share * values[i + 1]
        assert values[i] >= chord - tol, (family(radii[i]), case, values)


def assert_plain_mean(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    """The set that holds the base alone: every ratio exactly 1, the value exactly the mean."""
    worst, on = solve(ambiguity, case), case.valid
    assert (worst.ratio[on] == 1).all(), (ambiguity, case, worst.ratio)
    close(worst.weights, case.reference, (ambiguity, case), factor=0.2)
    close_value(ambiguity, case, worst.value, case.reference[on] @ case.losses[on].double())


def assert_replication_invariant(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    """n samples twice have the ratios of n samples."""
    n = len(case.losses)
    before, after = solve(ambiguity, case), solve(ambiguity, case.take(torch.arange(2 * n) % n))
    p = torch.cat([case.reference, case.reference])
    close_ratio(p, after.ratio, torch.cat([before.ratio, before.ratio]), (ambiguity, case))


def assert_duplicate_is_double_weight(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    n = len(case.losses)
    base = torch.ones(n, dtype=torch.float64) if case.base is None else case.base
    for i in {0, n // 2, n - 1}:
        doubled = base.where(torch.arange(n) != i, 2 * base)
        twice = replace(case, base=base).take(torch.tensor([*range(n), i]))
        want = solve(ambiguity, replace(case, base=doubled)).ratio
        got = solve(ambiguity, twice).ratio
        close_ratio(twice.reference, got, torch.cat([want, want[i : i + 1]]), (ambiguity, case, i))


def assert_padding_invariant(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    """Masked entries may hold anything: ratio 0 and no influence."""
    garbage = torch.tensor([float("nan"), float("inf"), float("-inf"), 6e4, -6e4], dtype=case.losses.dtype)

    def pad(x: Tensor, ends: Tensor) -> Tensor:
        return torch.cat([ends[:2], x, ends[2:]])

    base, mask = case.base, torch.ones_like(case.losses, dtype=torch.bool) if case.mask is None else case.mask
    padded = Case(
        case.name,
        pad(case.losses, garbage),
        None if base is None else pad(base, base.new_ones(5)),
        pad(mask, mask.new_zeros(5)),
    )
    before, after = solve(ambiguity, case), solve(ambiguity, padded)
    close_ratio(padded.reference, after.ratio, pad(before.ratio, before.ratio.new_zeros(5)), (ambiguity, case))
    assert (after.ratio[:2] == 0).all() and (after.ratio[-3:] == 0).all(), (ambiguity, case)
    close_value(ambiguity, case, after.value, before.value)
    for name in ("divergence", "ess", "max_ratio"):
        close(getattr(after, name), getattr(before, name), (ambiguity, case, name))


def assert_rows_are_independent(ambiguity: AmbiguitySet, cases: Sequence[Case], poison: Case) -> None:
    """Batched = row by row, and a bad row changes no other row by a bit."""
    losses, base, mask = stack([*cases, cases[0]])
    clean = ambiguity.solve(losses, base=base, mask=mask)
    losses[-1], mask[-1] = torch.nan, True
    losses[-1, : len(poison.losses)] = poison.losses
    dirty = ambiguity.solve(losses, base=base, mask=mask)
    for name in FIELDS:
        assert torch.equal(getattr(clean, name)[:-1], getattr(dirty, name)[:-1]), (ambiguity, poison, name)
    assert dirty.ratio[-1].isnan().all(), (ambiguity, poison)
    for i, case in enumerate(cases):
        single = alone(ambiguity, case)
        close(clean.ratio[i, : len(case.losses)], single.ratio, (ambiguity, case))
        close_value(ambiguity, case, clean.value[i], single.value)


def assert_poisoned(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    """NaN or +inf among the valid losses: NaN at every valid entry, never a plausible weight."""
    worst = solve(ambiguity, case)
    for x in (worst.ratio, worst.weights):
        assert x[case.valid].isnan().all() and (x[~case.valid] == 0).all(), (ambiguity, case, x)
    assert worst.value.isnan(), (ambiguity, case)


def assert_empty(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    worst = solve(ambiguity, case)
    for x in (worst.ratio, worst.weights, worst.ess):
        assert (x == 0).all(), (ambiguity, case, x)


def assert_finite_losses_decide(solve: Solve, ambiguity: AmbiguitySet, case: Case) -> None:
    """-inf has the ratio of a loss far below all others: 0 where the radius allows, with a finite value."""
    worst, (ratio, value) = solve(ambiguity, case), oracle.solve(ambiguity, *arrays(case))
    # A radius that only just allows it leaves the root of a rounding error over.
    close(worst.ratio[case.valid], ratio[case.valid.numpy()], (ambiguity, case), factor=100)
    close(worst.value, np.float64(value), (ambiguity, case), factor=100)


def assert_detached(ambiguity: AmbiguitySet, case: Case) -> None:
    losses = case.losses.clone().requires_grad_()
    worst = ambiguity.solve(losses, base=case.base, mask=case.mask)
    assert all(not getattr(worst, name).requires_grad for name in FIELDS), (ambiguity, case)
    untouched = losses.detach().nan_to_num(7.0) == case.losses.nan_to_num(7.0)
    assert untouched.all(), (ambiguity, case)


def assert_precision_of_caller(ambiguity: AmbiguitySet, case: Case, dtype: torch.dtype) -> None:
    """The narrow solve is the float64 solve of the same numbers, rounded once."""
    narrow = case.to(dtype)
    got, want = alone(ambiguity, narrow), alone(ambiguity, narrow.to(torch.float64))
    assert got.ratio.dtype == widened(dtype), (ambiguity, case)
    torch.testing.assert_close(got.ratio, want.ratio.to(got.ratio.dtype), rtol=3e-7, atol=1e-30)
    assert abs(got.weights.double().sum() - 1) <= 2e-7, (ambiguity, narrow, got.weights.double().sum())
