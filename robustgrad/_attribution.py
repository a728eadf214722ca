"""Splits a scalar loss into the losses of its samples, and says what stands in the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from . import _checks
from ._reductions import Reduction
from .ambiguity._problem import wide_dtype

_REMEDIES = (
    "Hand the per-sample losses over yourself with reweight(losses), or compute the loss with operations that "
    "keep one row per sample up to its last mean or sum."
)


def check_loss(loss: Tensor) -> None:
    """The scalar that backward() is called on."""
    _checks.floating("loss", loss, "Hand over the scalar that backward() is called on.")
    if loss.dim() != 0:
        raise ValueError(
            f"loss must be a scalar, got shape {tuple(loss.shape)}. Losses by sample go to reweight(losses)."
        )
    if loss.grad_fn is None:
        raise ValueError(
            "loss must have a gradient, got one that is detached, computed under no_grad, or of a frozen model. "
            "Hand over the scalar that backward() is called on."
        )


def of_samples(terms: list[Reduction], ends: list[str], expected: int | None) -> tuple[list[Reduction], int]:
    """The reductions over the samples of the batch, and how many samples there are.

    Raises: RuntimeError: there are none, or it is not clear which.
    """
    rows = [(term, term.samples(expected)) for term in terms]
    counts = {count for _, count in rows if isinstance(count, int)}
    wanted = next(iter(counts), 0) if expected is None else expected
    ours = [term for term, count in rows if count == wanted]
    if not ours or (expected is None and len(counts) > 1):
        raise RuntimeError(_nothing(rows, ends, expected))
    return ours, wanted


def split(
    loss: Tensor, terms: list[Reduction], kept: list[tuple[GradientEdge, Tensor]], rows: int
) -> tuple[Tensor, Tensor]:
    """(rows,) what each sample adds to the loss, and what comes neither from samples nor from the kept terms."""
    wide = wide_dtype(loss.device)
    inputs: list[Any] = [*(term.value for term in terms), *(edge for edge, _ in kept)]
    slopes = [slope.to(wide) for slope in torch.autograd.grad(loss, inputs, retain_graph=True)]
    shares = torch.stack([c * term.shares(rows) for c, term in zip(slopes, terms, strict=False)]).sum(0)
    rest = loss.detach().to(wide) - shares.sum()
    for c, (_, value) in zip(slopes[len(terms) :], kept, strict=True):
        rest = rest - c * value
    return shares, rest


def check_complete(loss: Tensor, losses: Tensor, rest: Tensor, terms: list[Reduction], ends: list[str]) -> None:
    """Raise unless the losses of the samples make up the whole loss, up to the rounding of its type."""
    eps = max(torch.finfo(x.dtype).eps for x in (loss, *(term.value for term in terms)))
    share = rest.abs() / losses.abs().sum()
    if bool(share > max(1e-3, 2 * eps)):  # not so for NaN: what NaN does is the reweighter's to say
        raise RuntimeError(
            f"the captured per-sample losses must make up the whole loss, got {loss.item():.6g} with "
            f"{rest.item():.3g} ({share.item():.2%} of the mean absolute loss) from elsewhere"
            f"{': ' + ', '.join(sorted(set(ends))) if ends else ''}. If that is a penalty that should keep its "
            f'own gradient, use capture(auxiliary="keep"), or capture.keep(term). {_REMEDIES}'
        )


def tied(losses: Tensor, dtype: torch.dtype) -> Tensor:
    """Losses that differ by a few units of rounding made equal, to 19 of the 24 bits of float32.

    The first step of preference optimisation has the same loss everywhere, but for rounding, and a set that
    looks at ranks only would take the rounding for an order.
    """
    if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
        return losses
    mantissa, exponent = torch.frexp(losses)
    step = 16 * torch.finfo(dtype).eps
    return torch.ldexp((mantissa / step).round() * step, exponent)


def _nothing(rows: list[tuple[Reduction, int | str]], ends: list[str], expected: int | None) -> str:
    wanted = f"a reduction over the {expected} samples of the batch" if expected else "a reduction of per-sample losses"
    found = [
        f"{term.kind} of {term.shape} ({f'{what} rows' if isinstance(what, int) else what})" for term, what in rows
    ]
    found += [f"{name}, which reduces inside" for name in sorted(set(ends))]
    hint = "" if expected else " Say how many samples the batch holds with capture(rows=n)."
    if any(name.startswith("Compiled") for name in ends):
        hint += " The loss is made inside a compiled function: compile the model, and make the loss outside of it."
    return f"the loss must come from {wanted}, found {'; '.join(found) or 'none'}.{hint} {_REMEDIES}"
