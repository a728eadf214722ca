"""How far unlabeled target prompts are from the training prompts, as seen by a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .. import _checks

_MOST = math.log(100.0)  # log ratio; any bounded function gives a valid bound, and no outlier decides it alone


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PromptShift:
    """Divergences of the target prompts from the training prompts, in the conventions of the sets."""

    total_variation: Estimate
    chi_square: Estimate
    kl: Estimate


def prompt_shift(
    training: Tensor,
    target: Tensor,
    *,
    level: float = 0.95,
    folds: int = 5,
    resamples: int = 500,
    seed: int = 0,
) -> PromptShift:
    """Estimate how far target prompts are from training prompts, without labels.

    A logistic classifier tells the two apart; its log odds f estimate log(target / training). On prompts
    that it was not fitted on (cross-fitting) each divergence is bounded from below:

        TV  >=  Q[f > 0] - P[f > 0]
        KL  >=  E_Q f - log E_P exp f                                  (Donsker & Varadhan)
        chi-square  >=  (E_Q g - E_P g)_+^2 / (2 Var_P g),  g = exp f  (Hammersley, Chapman & Robbins)

    Assumption: only the prompts change; what is right in answer to a prompt does not (covariate shift). The
    features tell apart what matters. `low` is then a lower confidence bound of the divergence. `high`
    bounds what a linear classifier of these features sees, not the divergence itself: a better classifier
    would see more. A shift that the loss does not depend on counts in full, so the radius may be too large:
    where TV is near 1 the two are told apart at sight, and no radius says anything; use the target
    prompts in training, or groups.

    Args:
        training, target: (n, d) and (m, d) float, features or embeddings, one row a prompt, without
            repetitions (a prompt in two folds would be recognised).
        level: in (0, 1), of the interval: bootstrap over the held-out prompts, the classifiers kept.
        folds: at least 2. resamples: at least 100. seed: of folds and bootstrap.
    Raises: ValueError or TypeError: shapes that do not fit, too few rows, features that are not finite.

    >>> nearby = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    >>> shift = prompt_shift(nearby[:200], nearby[200:] + torch.tensor([1.0, 0.0, 0.0]))
    >>> shift.total_variation.low < 0.383 < shift.total_variation.high  # that of two normals one apart
    True
    """
    _check(training, target, level, folds, resamples)
    generator = torch.Generator().manual_seed(seed)
    before, after = (side.detach().cpu().double() for side in (training, target))
    p, q = _held_out_log_ratios(before, after, folds, generator)
    estimates = [_with_interval(bound, p, q, level, resamples, generator) for bound in (_tv, _chi_square, _kl)]
    return PromptShift(*estimates)


def _held_out_log_ratios(
    training: Tensor, target: Tensor, folds: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Of each prompt, by the classifier that was fitted without its fold."""
    parts = [torch.randperm(len(rows), generator=generator) % folds for rows in (training, target)]
    ratios = [torch.empty(len(rows), dtype=torch.float64) for rows in (training, target)]
    for fold in range(folds):
        classify = _fitted(training[parts[0] != fold], target[parts[1] != fold])
        for rows, part, ratio in zip((training, target), parts, ratios, strict=True):
            ratio[part == fold] = classify(rows[part == fold]).clamp(-_MOST, _MOST)
    return ratios[0], ratios[1]


def _fitted(p: Tensor, q: Tensor) -> Callable[[Tensor], Tensor]:
    """Logistic regression, both sides of equal weight; log(q/p).

    The ridge is that of a prior whose log odds have variance one, however many features there are: with the few
    hundred of an embedding a weaker one is so sure of itself that the bounds on new prompts come out at nothing.
    """
    both = torch.cat([p, q])
    mean, spread = both.mean(0), both.std(0).clamp_min(1e-12)
    p, q = (p - mean) / spread, (q - mean) / spread
    weight = torch.zeros(p.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        errors = softplus(p @ weight[1:] + weight[0]).mean() + softplus(-(q @ weight[1:] + weight[0])).mean()
        loss = errors / 2 + p.shape[1] * weight[1:].square().sum() / (2 * len(both))
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loss

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    found = weight.detach()
    return lambda rows: (rows - mean) / spread @ found[1:] + found[0]


def _tv(p: Tensor, q: Tensor) -> float:
    return max(0.0, ((q > 0).double().mean() - (p > 0).double().mean()).item())


def _kl(p: Tensor, q: Tensor) -> float:
    return max(0.0, (q.mean() - p.exp().mean().log()).item())


def _chi_square(p: Tensor, q: Tensor) -> float:
    p, q = p.exp(), q.exp()
    apart = (q.mean() - p.mean()).clamp_min(0.0)
    return (apart.square() / (2 * p.var().clamp_min(1e-12))).item()


def _with_interval(
    bound: Callable[[Tensor, Tensor], float],
    p: Tensor,
    q: Tensor,
    level: float,
    resamples: int,
    generator: torch.Generator,
) -> Estimate:
    def again(rows: Tensor) -> Tensor:
        return rows[torch.randint(len(rows), (len(rows),), generator=generator)]

    drawn = torch.tensor([bound(again(p), again(q)) for _ in range(resamples)], dtype=torch.float64)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = drawn.quantile(tails).tolist()
    return Estimate(bound(p, q), low, high)


def _check(training: Tensor, target: Tensor, level: float, folds: int, resamples: int) -> None:
    _checks.number("level", level, 0.0, 1.0, "Use 0.95.", open_low=True, open_high=True)
    _checks.whole("folds", folds, 2, "Use 5.")
    _checks.whole("resamples", resamples, 100, "Use 500.")
    for name, rows in (("training", training), ("target", target)):
        _checks.floating(name, rows)
        if rows.dim() != 2 or rows.shape[1] != training.shape[-1] or len(rows) < 2 * folds:
            raise ValueError(
                f"{name} must have shape (n, {training.shape[-1]}) with n >= {2 * folds}, got {tuple(rows.shape)}. "
                "Give one row of features for each prompt, the same features on both sides."
            )
        if not bool(rows.isfinite().all()):
            bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(f"{name} must be finite, got NaN or infinity in rows {bad[:10]}. Leave those out.")
