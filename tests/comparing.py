"""How solutions are obtained alone or in a batch, and when two of them count as equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import oracle
import torch
from inputs import Case
from torch import Tensor

from robustgrad.ambiguity import AmbiguitySet, CVaR, TotalVariation, WorstCase

Solve = Callable[[AmbiguitySet, Case], WorstCase]
FIELDS = ("weights", "ratio", "value", "divergence", "ess", "max_ratio", "threshold")


def alone(ambiguity: AmbiguitySet, case: Case) -> WorstCase:
    return ambiguity.solve(case.losses, base=case.base, mask=case.mask)


def in_a_batch(ambiguity: AmbiguitySet, case: Case) -> WorstCase:
    """The case as row [1, 0] of a (2, 3, n) batch; the other rows hold other losses, base weights, masks."""
    n = case.losses.shape[-1]
    losses = torch.linspace(-1, 1, 6 * n).to(case.losses.dtype).sin().reshape(2, 3, n)
    base = torch.linspace(1, 2, 6 * n, dtype=torch.float64).reshape(2, 3, n)
    mask = torch.ones(2, 3, n, dtype=torch.bool)
    mask[0, 1] = False
    losses[1, 0] = case.losses
    base[1, 0] = 1.0 if case.base is None else case.base
    mask[1, 0] = True if case.mask is None else case.mask
    worst = ambiguity.solve(losses, base=base, mask=mask)
    return cast(WorstCase, SimpleNamespace(**{name: getattr(worst, name)[1, 0] for name in FIELDS}))


def stack(cases: Sequence[Case]) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, base and mask of one batch of padded rows."""
    n = max(len(case.losses) for case in cases)
    losses = torch.full((len(cases), n), 7.0, dtype=cases[0].losses.dtype)
    base, mask = torch.ones(len(cases), n, dtype=torch.float64), torch.zeros(len(cases), n, dtype=torch.bool)
    for i, case in enumerate(cases):
        losses[i, : len(case.losses)] = case.losses
        base[i, : len(case.losses)] = 1.0 if case.base is None else case.base
        mask[i, : len(case.losses)] = True if case.mask is None else case.mask
    return losses, base, mask


def arrays(case: Case) -> tuple[np.ndarray | None, ...]:
    """Losses, base and mask as the oracle takes them."""
    tensors = (case.losses.double(), case.base, case.mask)
    return tuple(None if x is None else x.numpy() for x in tensors)


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tolerance(x: Tensor) -> float:
    return 1e-9 if x.dtype == torch.float64 else 5e-7


def value_tolerance(ambiguity: AmbiguitySet, case: Case, x: Tensor) -> float:
    """Rounding of the ratios, of the losses, and of the divergence where the objective pays for it."""
    losses, tol = case.losses[case.valid].double(), tolerance(x)
    rounding = 4 * torch.finfo(x.dtype).eps * float(losses.abs().max())
    return tol * float(losses.max() - losses.min()) + rounding + tol**2 * oracle.price_of(ambiguity)


def close(got: Tensor, want: Tensor | np.ndarray, about: object, factor: float = 1.0) -> None:
    tol, want = factor * tolerance(got), torch.as_tensor(want, dtype=torch.float64)

    def message(text: str) -> str:
        return f"{about}: {text}"

    torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol, equal_nan=True, msg=message)


def close_ratio(p: Tensor, got: Tensor, want: Tensor | np.ndarray, about: object) -> None:
    """Equal up to rounding of the ratio, and of the mass: a sample of mass p sees that 1 / p times."""
    want = torch.as_tensor(want, dtype=torch.float64)
    allowed = tolerance(got) * (1 + want.abs()) + 2e-15 / p.clamp(min=1e-300)
    wrong = ~((got.double() - want).abs() <= allowed)
    assert not wrong.any(), (about, wrong.nonzero().flatten().tolist(), got[wrong], want[wrong])


def close_value(ambiguity: AmbiguitySet, case: Case, got: Tensor, want: Tensor | float) -> None:
    error = abs(float(got) - float(want))
    assert error <= value_tolerance(ambiguity, case, got), (ambiguity, case, float(got), float(want))


def primal(ambiguity: AmbiguitySet, case: Case, worst: WorstCase) -> float:
    """The objective that the ratio itself reaches."""
    p, ratio, on = case.reference, worst.ratio.double(), case.valid
    top, weights = case.losses[on].double().max(), (p * ratio)[on]
    below = weights @ (case.losses[on].double() - top) / weights.sum()
    return float(top + below) - oracle.price_of(ambiguity) * spent(ambiguity, case, worst)


def spent(ambiguity: AmbiguitySet, case: Case, worst: WorstCase) -> float:
    """The divergence of the ratio itself."""
    return oracle.divergence(ambiguity, worst.ratio.double().numpy(), case.reference.numpy())


def most_allowed(ambiguity: AmbiguitySet, tol: float) -> float:
    """The set's bound on the divergence, with what errors of size `tol` in the ratios do to it."""
    if isinstance(ambiguity, CVaR):
        return (1 + tol) / ambiguity.alpha
    radius: float | None = ambiguity.radius
    if radius is None:
        return np.inf
    # Quadratic around ratio 1, but for total variation.
    slope = 1 if isinstance(ambiguity, TotalVariation) else radius**0.5 + tol
    return radius + tol * (radius + slope)


def undecided(ambiguity: AmbiguitySet, case: Case) -> bool:
    """The total variation penalty leaves a loss exactly `penalty` below the maximum free to keep its mass."""
    if not isinstance(ambiguity, TotalVariation) or ambiguity.penalty is None:
        return False
    losses, price = case.losses[case.valid].double(), ambiguity.penalty
    return bool(((losses.max() - losses - price).abs() <= 1e-14 * (price + losses.abs().max())).any())
