"""Natural policy gradient with the worst case's Fisher matrix, which is never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks

Vector = tuple[Tensor, ...]  # one tensor for each parameter


@dataclass(frozen=True, eq=False)
class NaturalGradient:
    """The natural direction d = (F + ridge)^-1 g of increasing advantage, and how well it was solved for.

    Everything is detached. `direction` and `gradient` (g) hold one tensor for each parameter. `residual`, 0-dim,
    is |(F + ridge) d - g| / |g|: more iterations or a larger ridge shrink it. `curvature`, 0-dim, is d^T F d:
    twice the KL divergence, to second order, that a step of size 1 moves the policy by.
    """

    direction: Vector
    gradient: Vector
    residual: Tensor
    curvature: Tensor

    def step_size(self, kl: float, *, largest: float = torch.inf) -> Tensor:
        """The step that moves the policy by `kl` nats, to second order: sqrt(2 kl / d^T F d), 0-dim.

        Args:
            kl: > 0, radius of the trust region.
            largest: > 0, for directions along which the policy does not move.
        Source: arXiv 1502.05477, appendix C.
        """
        _checks.number("kl", kl, 0.0, torch.inf, "0.01 is usual.", open_low=True)
        # A curvature of zero would give infinity, and infinity times a zero direction NaN.
        tiny = torch.finfo(self.curvature.dtype).tiny
        return (2 * kl / self.curvature.clamp_min(tiny)).sqrt().clamp_max(largest)

    def assign(self, parameters: Iterable[Tensor], step_size: Tensor | float = 1.0) -> None:
        """Write -step_size * direction into `.grad`: `SGD(lr=1).step()` then moves by step_size * direction.

        `parameters` are those the direction was computed for, in their order.
        """
        for parameter, part in zip(parameters, self.direction, strict=True):
            parameter.grad = (-step_size * part).to(parameter.dtype)


def natural_gradient(
    log_probs: Tensor,
    advantages: Tensor,
    parameters: Iterable[Tensor],
    *,
    weights: Tensor | None = None,
    ridge: float = 1e-3,
    iterations: int = 10,
) -> NaturalGradient:
    """Robust natural policy gradient by conjugate gradient on Fisher-vector products.

        d = (F_q + ridge)^-1 g_q,    g_q = sum_i q_i A_i s_i,   F_q = sum_i q_i s_i s_i^T,   s_i = grad log pi_i

    Equally the ridge regression of the advantages on the scores:
        d = argmin_d  sum_i q_i (A_i - s_i . d)^2 + ridge |d|^2

    Args:
        log_probs: (n,) log pi(y_i | x_i) of responses drawn from the policy, with their graph. The graph
            is differentiated twice: load transformers with attn_implementation="eager" (fused attention
            has no second derivative) and without gradient checkpointing. It is kept, and freed with
            `log_probs`.
        advantages: (n,) of the responses.
        parameters: those to move; any subset, such as LoRA adapters. One that `log_probs` does not
            depend on gets a direction of zeros.
        weights: (n,) q, the worst distribution: `WorstCase.weights`, or `prompt_ratio(...) / n`. None is
            1/n, the plain natural gradient.
        ridge: > 0, added to the Fisher matrix, in its units.
        iterations: of conjugate gradient, >= 1. With as many as samples it is exact, rounding aside.
    Returns: NaturalGradient, detached, no host sync. Non-finite input gives a direction of NaN.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range, or no graph.
    Source: arXiv 2503.00539, Algorithm 2; conjugate gradient: arXiv 1502.05477, appendix C.

    >>> import torch
    >>> theta = torch.zeros(2, requires_grad=True)
    >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> natural = natural_gradient(features @ theta, torch.tensor([1.0, 2.0]), [theta], ridge=1e-6)
    >>> natural.direction[0]
    tensor([1.0000, 1.0000])
    """
    parameters = _movable(parameters)
    _checks.per_sample("log_probs", log_probs)
    _checks.same_samples("advantages", advantages, "log_probs", log_probs)
    _checks.number("ridge", ridge, 0.0, torch.inf, "It keeps the system solvable.", open_low=True)
    _checks.whole("iterations", iterations, 1, "10 is usual.")
    if not log_probs.requires_grad:
        raise ValueError(
            "log_probs must have a gradient, got requires_grad=False. Compute them with gradients enabled."
        )
    if weights is None:
        weights = torch.full_like(log_probs, 1 / len(log_probs), requires_grad=False)
    _checks.same_samples("weights", weights, "log_probs", log_probs)
    weights = weights.detach().to(log_probs.dtype)

    gradient = _pull_back(log_probs, parameters, weights * advantages.detach().to(log_probs.dtype))
    product = fisher_vector_product(log_probs, parameters, weights)

    def damped(vector: Vector) -> Vector:
        return tuple(f + ridge * v for f, v in zip(product(vector), vector, strict=True))

    direction = _conjugate_gradient(damped, gradient, iterations)
    image = product(direction)
    left = tuple(g - f - ridge * d for g, f, d in zip(gradient, image, direction, strict=True))
    size = _dot(gradient, gradient).sqrt()
    residual = _dot(left, left).sqrt() / torch.where(size == 0, 1.0, size)
    return NaturalGradient(direction, gradient, residual, _dot(direction, image))


def fisher_vector_product(
    log_probs: Tensor, parameters: Sequence[Tensor], weights: Tensor
) -> Callable[[Sequence[Tensor]], Vector]:
    """v -> F_q v = sum_i q_i s_i (s_i . v), two backward passes each, without F_q.

    Args:
        log_probs: (n,) with their graph, differentiable twice.
        parameters: of which F_q is the Fisher matrix.
        weights: (n,) q.
    """
    # J^T u is linear in u, so its derivative along v with respect to u is J v, whatever u is.
    dual = torch.zeros_like(log_probs, requires_grad=True)
    pulled = _pull_back(log_probs, parameters, dual, differentiable=True)

    def product(vector: Sequence[Tensor]) -> Vector:
        (along,) = torch.autograd.grad(pulled, dual, vector, retain_graph=True)
        return _pull_back(log_probs, parameters, weights * along)

    return product


def _pull_back(
    log_probs: Tensor, parameters: Sequence[Tensor], dual: Tensor, *, differentiable: bool = False
) -> Vector:
    """J^T dual: sum_i dual_i s_i, one tensor for each parameter, in float32 or wider."""
    parts = torch.autograd.grad(
        log_probs, parameters, dual, retain_graph=True, create_graph=differentiable, materialize_grads=True
    )
    # Materialised zeros have no graph; through a product with the dual they are part of one.
    anchor = 0.0 * dual.sum() if differentiable else 0.0
    return tuple(part.to(torch.promote_types(part.dtype, torch.float32)) + anchor for part in parts)


def _conjugate_gradient(operator: Callable[[Vector], Vector], target: Vector, iterations: int) -> Vector:
    """Solve operator(x) = target from x = 0, in a fixed number of iterations."""
    solution = tuple(torch.zeros_like(part) for part in target)
    left, search, size = target, target, _dot(target, target)
    for _ in range(iterations):
        image = operator(search)
        bend = _dot(search, image)
        # Solved already: then the search direction is zero, and so must the step be. NaN goes through.
        step = torch.where(bend == 0, 0.0, size / torch.where(bend == 0, 1.0, bend))
        solution = _moved(solution, step, search)
        left = _moved(left, -step, image)
        before, size = size, _dot(left, left)
        search = _moved(left, size / torch.where(before == 0, 1.0, before), search)
    return solution


def _moved(start: Vector, step: Tensor, along: Vector) -> Vector:
    return tuple(s + step * a for s, a in zip(start, along, strict=True))


def _dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _movable(parameters: Iterable[Tensor]) -> list[Tensor]:
    chosen = list(parameters)
    if not chosen or not all(isinstance(p, Tensor) and p.requires_grad for p in chosen):
        raise ValueError(
            f"parameters must be tensors with requires_grad=True, at least one, got {len(chosen)} of which "
            f"{sum(isinstance(p, Tensor) and p.requires_grad for p in chosen)} are. "
            "Pass [p for p in model.parameters() if p.requires_grad]."
        )
    return chosen
