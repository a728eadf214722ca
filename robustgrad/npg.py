"""Natural policy gradient with the worst case's Fisher matrix, which is never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks
from ._conjugate_gradient import Vector, conjugate_gradient, dot
from .ambiguity._problem import wide_dtype


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
    _checks.whole("iterations", iterations, 1, "10 is usual.")
    _with_gradient(log_probs)
    weights = _problem(log_probs, advantages, weights, ridge)

    gradient = _pull_back(log_probs, parameters, weights * advantages.detach().to(log_probs.dtype))
    product = fisher_vector_product(log_probs, parameters, weights)

    def damped(vector: Vector) -> Vector:
        return tuple(f + ridge * v for f, v in zip(product(vector), vector, strict=True))

    direction = conjugate_gradient(damped, gradient, iterations)
    image = product(direction)
    left = tuple(g - f - ridge * d for g, f, d in zip(gradient, image, direction, strict=True))
    size = dot(gradient, gradient).sqrt()
    residual = dot(left, left).sqrt() / torch.where(size == 0, 1.0, size)
    return NaturalGradient(direction, gradient, residual, dot(direction, image))


def natural_gradient_by_sample(
    log_probs: Iterable[Tensor],
    advantages: Tensor,
    parameters: Iterable[Tensor],
    *,
    weights: Tensor | None = None,
    ridge: float = 1e-3,
) -> NaturalGradient:
    """The same direction exactly, from one backward pass for each sample and no second derivative.

    With S the (n, parameters) matrix of the scores s_i and R = diag(q)^(1/2), it solves n equations:
        d = S^T R (R S S^T R + ridge)^-1 R A

    For the adapters of a large model and a few dozen responses, where S fits in memory (4 n bytes for each
    parameter) and conjugate gradient would pass through the model several times for each iteration.

    Args:
        log_probs: yields n tensors of one element, log pi(y_i | x_i), each with a graph of its own: a generator
            of one forward pass after the other, so that one graph lives at a time.
        advantages, parameters, weights, ridge: as in `natural_gradient`.
    Returns, Raises: as `natural_gradient`; its `residual` is what rounding leaves.
    Source: arXiv 2503.00539, Algorithm 2, as the dual of the ridge regression of the advantages.

    >>> import torch
    >>> theta = torch.zeros(2, requires_grad=True)
    >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> log_probs = (row @ theta for row in features)
    >>> natural = natural_gradient_by_sample(log_probs, torch.tensor([1.0, 2.0]), [theta], ridge=1e-6)
    >>> natural.direction[0]
    tensor([1.0000, 1.0000])
    """
    parameters = _movable(parameters)
    scores = torch.stack([_score(log_prob, parameters) for log_prob in log_probs])
    q = _problem(scores[:, 0], advantages, weights, ridge)
    wide = wide_dtype(scores.device)
    gram, weight = (scores @ scores.T).to(wide), q.to(wide)
    target, root = advantages.detach().to(gram), weight.sqrt()
    system = root[:, None] * gram * root + ridge * torch.eye(len(q), dtype=wide, device=gram.device)
    dual = root * torch.linalg.solve_ex(system, root * target)[0]  # solve would wait for the device

    def pull_back(by_sample: Tensor) -> Tensor:
        return by_sample.to(scores.dtype) @ scores

    direction, gradient, along = pull_back(dual), pull_back(weight * target), gram @ dual
    left = gradient - pull_back(weight * along) - ridge * direction
    size = gradient.norm()
    residual = left.norm() / torch.where(size == 0, 1.0, size)
    curvature = (weight * along.square()).sum().to(scores.dtype)
    return NaturalGradient(_parts(direction, parameters), _parts(gradient, parameters), residual, curvature)


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


def _score(log_prob: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """grad log pi of one sample, flat."""
    if log_prob.numel() != 1:
        raise ValueError(
            f"log_probs must yield tensors of one element, got shape {tuple(log_prob.shape)}. "
            "Pass a generator of one log-probability after the other."
        )
    _with_gradient(log_prob)
    parts = torch.autograd.grad(log_prob.reshape(()), parameters, materialize_grads=True)
    return torch.cat([part.flatten().to(torch.promote_types(part.dtype, torch.float32)) for part in parts])


def _parts(flat: Tensor, parameters: Sequence[Tensor]) -> Vector:
    pieces = torch.split(flat, [p.numel() for p in parameters])
    return tuple(piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True))


def _problem(log_probs: Tensor, advantages: Tensor, weights: Tensor | None, ridge: float) -> Tensor:
    """The weights q, detached, once all that belongs to the samples fits together."""
    _checks.same_samples("advantages", advantages, "log_probs", log_probs)
    _checks.number("ridge", ridge, 0.0, torch.inf, "It keeps the system solvable.", open_low=True)
    if weights is None:
        weights = torch.full_like(log_probs, 1 / len(log_probs), requires_grad=False)
    _checks.same_samples("weights", weights, "log_probs", log_probs)
    return weights.detach().to(log_probs.dtype)


def _with_gradient(log_probs: Tensor) -> None:
    if not log_probs.requires_grad:
        raise ValueError(
            "log_probs must have a gradient, got requires_grad=False. Compute them with gradients enabled."
        )


def _movable(parameters: Iterable[Tensor]) -> list[Tensor]:
    chosen = list(parameters)
    if not chosen or not all(isinstance(p, Tensor) and p.requires_grad for p in chosen):
        raise ValueError(
            f"parameters must be tensors with requires_grad=True, at least one, got {len(chosen)} of which "
            f"{sum(isinstance(p, Tensor) and p.requires_grad for p in chosen)} are. "
            "Pass [p for p in model.parameters() if p.requires_grad]."
        )
    return chosen
