"""Wasserstein penalties: closed forms, differences, the adversary they stand for, and a language model."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from robustgrad import KL, ChiSquare, CVaR, Reweighter, TotalVariation
from robustgrad.gradient_penalty import (
    embedding_outputs,
    squared_gradient_norms,
    squared_norm_losses,
    wasserstein_loss,
)
from robustgrad.objectives import dpo, sequence_log_probs

SETS = [TotalVariation(0.3), ChiSquare(0.5), KL(0.3), CVaR(0.4)]


def linear(n: int = 7, d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.randn(d, dtype=torch.float64, generator=generator, requires_grad=True)
    return z, w, z @ w


def smooth(z: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.softplus(z.flatten(1) @ w) + 0.1 * z.flatten(1).square().sum(1)


def test_linear_model_in_closed_form() -> None:
    """max over the ball of E[w.z] = mean + radius |w|; its gradient is mean z + radius w / |w|."""
    z, w, losses = linear()
    value = wasserstein_loss(losses, z, radius=0.3)
    assert_close(value, losses.mean() + 0.3 * w.norm())
    (gradient,) = torch.autograd.grad(value, w, retain_graph=True)
    assert_close(gradient, z.mean(0) + 0.3 * w / w.norm())
    assert_close(squared_norm_losses(losses, z, coefficient=0.3), losses + 0.3 * w.square().sum())


def test_group_norm_is_not_a_mean_of_norms() -> None:
    z = torch.tensor([[1.0], [7.0]], requires_grad=True)
    losses = z.squeeze(1).square() / 2
    assert_close(wasserstein_loss(losses, z, radius=1.0), torch.tensor(12.5 + 5.0))
    assert_close(squared_norm_losses(losses, z, coefficient=1.0), torch.tensor([1.5, 73.5]))


def test_gradients_against_differences() -> None:
    z, w, _ = linear()
    for penalised in (
        lambda z, w: wasserstein_loss(smooth(z, w), z, radius=0.3),
        lambda z, w: squared_norm_losses(smooth(z, w), z, coefficient=0.3),
    ):
        assert torch.autograd.gradcheck(penalised, (z, w))


def test_is_what_the_worst_small_shift_of_the_inputs_costs() -> None:
    """Moving every input along its gradient, by `radius` in the root mean square, costs the penalty; no other
    shift of that size costs more."""
    z, w, _ = linear(50)
    radius = 1e-4
    losses = smooth(z, w)
    (gradient,) = torch.autograd.grad(losses.sum(), z, retain_graph=True)
    penalty = wasserstein_loss(losses, z, radius=radius) - losses.mean()

    def cost(shift: Tensor) -> float:
        shift = shift * radius / shift.square().sum(1).mean().sqrt()
        return (smooth(z + shift, w).mean() - losses.mean()).item()

    assert cost(gradient) == pytest.approx(penalty.item(), rel=1e-3)
    others = [cost(gradient + s * torch.randn_like(gradient)) for s in (0.1, 1.0, 10.0)]
    per_sample = cost(gradient / gradient.norm(dim=1, keepdim=True))
    assert max(*others, per_sample) < penalty


def test_radius_zero_is_the_mean_and_needs_no_inputs() -> None:
    _, _, losses = linear()
    assert torch.equal(wasserstein_loss(losses, [], radius=0.0), losses.mean())


def test_the_radius_does_not_see_the_scale_of_the_loss_and_the_coefficient_does() -> None:
    z, w, _ = linear()
    one, ten = smooth(z, w), 10 * smooth(z, w)
    assert_close(wasserstein_loss(ten, z, radius=0.3), 10 * wasserstein_loss(one, z, radius=0.3))
    same = squared_norm_losses(ten, z, coefficient=0.03)
    assert_close(same, 10 * squared_norm_losses(one, z, coefficient=0.3))


def test_losses_that_ignore_small_shifts_have_no_penalty_and_a_finite_gradient() -> None:
    z = torch.zeros(3, 2, requires_grad=True)
    w = torch.ones(2, requires_grad=True)
    value = wasserstein_loss((z.square() @ w), z, radius=1.0)
    value.backward()
    assert value == 0
    assert z.grad.isfinite().all() and w.grad.isfinite().all()


def test_nan_stays_nan() -> None:
    z, _, losses = linear()
    assert wasserstein_loss(losses * torch.nan, z, radius=0.1).isnan()


def test_rows_of_both_responses_belong_to_their_pair() -> None:
    z, w, _ = linear(6)
    together = squared_gradient_norms(smooth(z, w)[:3] - smooth(z, w)[3:], z)
    a, b = z.detach()[:3].requires_grad_(), z.detach()[3:].requires_grad_()
    apart = squared_gradient_norms(smooth(a, w) - smooth(b, w), [a, b])
    assert_close(together, apart)
    one = torch.stack([squared_gradient_norms(smooth(a[[i]], w) - smooth(b[[i]], w), [a, b])[0] for i in range(3)])
    assert_close(together, one)


@pytest.mark.parametrize("ambiguity", SETS, ids=repr)
def test_per_sample_variant_under_every_set(ambiguity: object) -> None:
    """The ratio multiplies the double-backward gradient too: against a hand-written weighted sum."""
    z, w, _ = linear()
    losses = squared_norm_losses(smooth(z, w), z, coefficient=0.2)
    weights = ambiguity.solve(losses).weights
    rows = [torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses]
    Reweighter(ambiguity, pool="batch")(losses).mean().backward()
    assert_close(w.grad, weights @ torch.stack(rows), rtol=1e-6, atol=1e-9)


# --- capturing the embeddings ---


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)).mean(1)).squeeze(-1)


@pytest.mark.parametrize("frozen", [False, True])
def test_capture_of_a_trained_and_of_a_frozen_embedding(frozen: bool) -> None:
    model, tokens = Classifier(), torch.randint(9, (5, 3))
    model.embedding.requires_grad_(not frozen)
    with embedding_outputs(model.embedding) as inputs:
        losses = model(tokens).square()
    assert [tuple(x.shape) for x in inputs] == [(5, 3, 4)]
    norms = squared_gradient_norms(losses, inputs)
    embedded = model.embedding(tokens).detach().requires_grad_()
    by_hand = model.head(torch.tanh(embedded).mean(1)).squeeze(-1).square()
    (gradient,) = torch.autograd.grad(by_hand.sum(), embedded)
    assert_close(norms, gradient.square().sum((1, 2)))
    wasserstein_loss(losses, inputs, radius=0.1).backward()
    assert model.head.weight.grad is not None
    assert (model.embedding.weight.grad is None) is frozen


def test_capture_ends_with_the_context_and_leaves_out_passes_without_gradient() -> None:
    model, tokens = Classifier(), torch.randint(9, (5, 3))
    with embedding_outputs(model.embedding) as inputs:
        with torch.no_grad():
            model(tokens)
        assert inputs == []
        model(tokens), model(tokens)
    model(tokens)
    assert len(inputs) == 2
    assert not model.embedding._forward_hooks


@pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("peft") is None, reason="needs transformers and peft"
)
@pytest.mark.filterwarnings("ignore")
def test_dpo_of_a_language_model_with_lora() -> None:
    """Chosen and rejected in one pass, against one pair at a time with explicit embeddings."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, attn_implementation="eager")  # fmt: skip
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora).eval()
    tokens = torch.randint(23, (6, 7))
    reference = -20 + torch.randn(6)

    def pair_losses(logits: Tensor, rows: Tensor, base: Tensor) -> Tensor:
        log_probs = sequence_log_probs(logits, rows, torch.ones_like(rows, dtype=torch.bool))
        return dpo(*log_probs.chunk(2), *base.chunk(2), beta=0.5)

    with embedding_outputs(model.get_input_embeddings()) as inputs:
        losses = pair_losses(model(tokens).logits, tokens, reference)
    norms = squared_gradient_norms(losses, inputs)
    for i in range(3):
        rows = tokens[[i, i + 3]]
        embedded = model.get_input_embeddings()(rows).detach().requires_grad_()
        loss = pair_losses(model(inputs_embeds=embedded).logits, rows, reference[[i, i + 3]])
        (gradient,) = torch.autograd.grad(loss.sum(), embedded)
        assert_close(norms[i], gradient.square().sum(), rtol=1e-4, atol=1e-8)
    wasserstein_loss(losses, inputs, radius=0.1).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# --- wrong use ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"radius": -1.0}, ValueError, "radius must be in [0, inf), got -1.0. 0 is plain averaging."),
        ({"inputs": []}, ValueError, "inputs must hold at least one tensor, got none. Run the model inside"),
        ({"inputs": torch.zeros(7, 4)}, ValueError, "with a gradient, got (7, 4) with requires_grad=False"),
        ({"inputs": torch.zeros(5, 4, requires_grad=True)}, ValueError, "(k n, ...) for n = 7 losses"),
        ({"inputs": torch.zeros(7, 4, requires_grad=True)}, ValueError, "losses must depend on all inputs"),
        ({"losses": torch.zeros(7)}, ValueError, "losses must have a gradient"),
        ({"losses": torch.zeros(7, 1, requires_grad=True)}, ValueError, "Use losses.squeeze(-1)."),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    z, _, losses = linear()
    with pytest.raises(error, match=re.escape(message)):
        wasserstein_loss(**({"losses": losses, "inputs": z, "radius": 0.1} | change))


def test_losses_reweighted_before_are_refused() -> None:
    z, _, losses = linear()
    Reweighter(CVaR(0.4), pool="batch")(losses)
    with pytest.raises(ValueError, match=r"losses must not be reweighted yet.*Take the penalty first"):
        squared_norm_losses(losses, z, coefficient=0.1)
    with pytest.raises(ValueError, match=re.escape("coefficient must be in [0, inf)")):
        squared_norm_losses(losses, z, coefficient=-0.1)
