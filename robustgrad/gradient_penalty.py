"""Wasserstein sets: the worst small shift of the inputs costs the norm of the gradient with respect to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import _checks
from .hook import attached


@contextmanager
def embedding_outputs(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what an embedding returns in the forward passes inside, ready to be differentiated by.

        with embedding_outputs(model.get_input_embeddings()) as inputs:
            losses = loss_fn(model, batch)                        # (n,), the user's own
        wasserstein_loss(losses, inputs, radius=0.01).backward()

    A frozen embedding works too: its output then starts the graph. Passes under `torch.no_grad` (a
    reference model) are left out. The model is differentiated twice: load transformers with
    attn_implementation="eager", and without gradient checkpointing.

    Args:
        embedding: an `nn.Embedding`, or any module whose output is one tensor.
    """
    outputs: list[Tensor] = []

    def collect(module: nn.Module, args: object, output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            outputs.append(output if output.requires_grad else output.requires_grad_())
        return output

    handle = embedding.register_forward_hook(collect)
    try:
        yield outputs
    finally:
        handle.remove()


def squared_gradient_norms(losses: Tensor, inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """||grad_z loss_i||^2 for every sample, (n,), with the graph for a second backward pass.

    Args:
        losses: (n,) with their graph; loss i depends on its own rows of the inputs only (so no batch norm).
            Take them as they are, before `reweight`.
        inputs: (k n, ...) each, from `embedding_outputs`: row j belongs to sample j % n, so one pass over
            the chosen responses followed by the rejected ones (k = 2) works as it is. Several add up.
    Returns: (n,) float32 or wider.
    Raises: TypeError or ValueError: an argument of another shape or type, nothing captured, or losses that do
        not depend on the inputs or are reweighted already.

    >>> import torch
    >>> z = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    >>> squared_gradient_norms(z.square().sum(1), z)
    tensor([ 4., 16.], grad_fn=<AddBackward0>)
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    _check(losses, inputs)
    grads = torch.autograd.grad(losses.sum(), inputs, create_graph=True, allow_unused=True)
    if any(grad is None for grad in grads):
        raise ValueError(
            "losses must depend on all inputs, got one that they do not depend on. "
            "Enter embedding_outputs around the forward pass of these losses alone."
        )
    norms = losses.new_zeros(len(losses), dtype=torch.promote_types(losses.dtype, torch.float32))
    for grad in grads:
        rows = grad.to(norms.dtype).flatten(1).square().sum(1)
        norms = norms + rows.reshape(-1, len(losses)).sum(0)
    return norms


def wasserstein_loss(losses: Tensor, inputs: Tensor | Sequence[Tensor], *, radius: float) -> Tensor:
    """Worst case over a Wasserstein-2 ball of input distributions, to first order.

        max_{W2(Q, P) <= radius} E_Q[loss]  ~  mean_i l_i + radius sqrt(mean_i ||grad_z l_i||^2)

    Exact where the loss is linear in the inputs. It scales with the loss, so the radius does not depend on
    the loss's scale; it is a distance in embedding space and does depend on the scale of the embeddings.

    Args:
        losses, inputs: as in `squared_gradient_norms`.
        radius: >= 0, the papers' rho0. 0 is the plain mean, without a second pass.
    Returns: 0-dim, float32 or wider, with its graph. Its gradient differentiates the norm, a second backward
        pass: about 2.5 times a plain step (`benchmarks/gradient_penalty_cost.py`).
    Raises: as `squared_gradient_norms`, and for a radius out of range.
    Source: arXiv 2502.01930 (WDPO); arXiv 2509.19104 (Wasserstein DRO-REBEL).

    >>> import torch
    >>> z = torch.tensor([[1.0], [3.0]], requires_grad=True)
    >>> wasserstein_loss(z.squeeze(1) * 2, z, radius=0.5)
    tensor(5., grad_fn=<AddBackward0>)
    """
    _checks.number("radius", radius, 0.0, torch.inf, "0 is plain averaging.")
    _checks.per_sample("losses", losses)
    mean = losses.to(torch.promote_types(losses.dtype, torch.float32)).mean()
    if radius == 0:
        return mean
    square = squared_gradient_norms(losses, inputs).mean()
    # The root has no derivative at 0, where the penalty is at its minimum: there it is 0 and flat.
    flat = square == 0
    return mean + radius * torch.where(flat, 0.0, torch.where(flat, 1.0, square).sqrt())


def squared_norm_losses(losses: Tensor, inputs: Tensor | Sequence[Tensor], *, coefficient: float) -> Tensor:
    """The variant of the released code: every loss with its own squared gradient norm, (n,).

        l_i + coefficient ||grad_z l_i||^2

    Unlike `wasserstein_loss` it is one loss per sample, fit for `reweight`, and it does depend on the scale
    of the loss: losses twice as large need half the coefficient.

    Args:
        losses, inputs: as in `squared_gradient_norms`.
        coefficient: >= 0.
    Source: the code released with arXiv 2502.01930, which differs from its text in this.

    >>> import torch
    >>> z = torch.tensor([[1.0], [3.0]], requires_grad=True)
    >>> squared_norm_losses(z.squeeze(1) * 2, z, coefficient=0.5).detach()
    tensor([4., 8.])
    """
    _checks.number("coefficient", coefficient, 0.0, torch.inf, "0 is plain averaging.")
    return losses + coefficient * squared_gradient_norms(losses, inputs)


def _check(losses: Tensor, inputs: Sequence[Tensor]) -> None:
    _checks.per_sample("losses", losses)
    if attached(losses):
        raise ValueError(
            "losses must not be reweighted yet, got a tensor with a hook: it would scale the inner gradient as "
            "well. Take the penalty first, then reweight what comes out of squared_norm_losses."
        )
    if not losses.requires_grad:
        raise ValueError("losses must have a gradient, got requires_grad=False. Compute them outside no_grad.")
    if not inputs:
        raise ValueError("inputs must hold at least one tensor, got none. Run the model inside embedding_outputs.")
    for tensor in inputs:
        _checks.floating("inputs", tensor)
        if not tensor.requires_grad or tensor.dim() < 2 or len(tensor) % len(losses):
            raise ValueError(
                f"inputs must have shape (k n, ...) for n = {len(losses)} losses, with a gradient, got "
                f"{tuple(tensor.shape)} with requires_grad={tensor.requires_grad}. Use embedding_outputs."
            )
