"""Natural policy gradient: against the dense solve, against weighted least squares, and on a language model."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation
from robustgrad.npg import NaturalGradient, fisher_vector_product, natural_gradient, natural_gradient_by_sample
from robustgrad.objectives import sequence_log_probs
from robustgrad.robust_ppo import prompt_ratio

SETS = [TotalVariation(0.3), ChiSquare(0.5), KL(0.3), CVaR(0.5)]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)


class Policy(nn.Module):
    """A categorical policy over 4 actions with a hidden layer: 51 parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)).double()
        self.states = torch.randn(30, 3, dtype=torch.float64)
        self.actions = torch.randint(4, (30,))
        self.advantages = torch.randn(30, dtype=torch.float64)

    def log_probs(self) -> Tensor:
        return self.layers(self.states).log_softmax(-1).gather(1, self.actions[:, None]).squeeze(1)


@pytest.fixture
def policy() -> Policy:
    return Policy()


def score_matrix(log_probs: Tensor, parameters: list[Tensor]) -> Tensor:
    """(n, parameters): grad log pi of each sample, one at a time."""
    rows = []
    for entry in log_probs:
        parts = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows).double()


def flat(vector: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in vector]).double()


@each_set
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_equals_the_dense_solution(policy: Policy, ambiguity: AmbiguitySet, ridge: float) -> None:
    weights = ambiguity.solve(-policy.advantages).weights
    parameters, log_probs = list(policy.parameters()), policy.log_probs()
    natural = natural_gradient(log_probs, policy.advantages, parameters, weights=weights, ridge=ridge, iterations=60)
    scores = score_matrix(log_probs, parameters)
    fisher, gradient = scores.T @ (weights[:, None] * scores), scores.T @ (weights * policy.advantages)
    dense = torch.linalg.solve(fisher + ridge * torch.eye(len(fisher), dtype=torch.float64), gradient)
    assert_close(flat(natural.gradient), gradient)
    assert_close(flat(natural.direction), dense, rtol=1e-5, atol=1e-8)
    assert_close(natural.curvature, dense @ fisher @ dense, rtol=1e-5, atol=0)
    assert natural.residual < 1e-7


@each_set
def test_is_the_weighted_regression_of_the_advantages(policy: Policy, ambiguity: AmbiguitySet) -> None:
    """As ridge goes to 0, on a policy of fewer parameters than samples: plain weighted least squares."""
    weights = 0.5 * ambiguity.solve(-policy.advantages).weights + 0.5 / 30
    head = list(policy.layers[2].parameters())
    log_probs = policy.log_probs()
    natural = natural_gradient(log_probs, policy.advantages, head, weights=weights, ridge=1e-12, iterations=40)
    scores = score_matrix(log_probs, head)
    root = weights.sqrt()
    fit = torch.linalg.lstsq(root[:, None] * scores, (root * policy.advantages)[:, None], driver="gelsd").solution
    # Five directions leave the softmax as it is; both solutions are the one of least norm.
    assert_close(flat(natural.direction), fit.squeeze(1), rtol=1e-5, atol=1e-6)


def test_fisher_vector_product_against_the_matrix(policy: Policy) -> None:
    parameters, log_probs = list(policy.parameters()), policy.log_probs()
    weights = torch.rand(30, dtype=torch.float64)
    scores = score_matrix(log_probs, parameters)
    vector = tuple(torch.randn_like(p) for p in parameters)
    product = fisher_vector_product(log_probs, parameters, weights)
    expected = scores.T @ (weights * (scores @ flat(vector)))
    assert_close(flat(product(vector)), expected)
    assert_close(flat(product(vector)), expected)  # the graph is kept


def test_uniform_weights_are_the_plain_natural_gradient(policy: Policy) -> None:
    parameters = list(policy.parameters())
    plain = natural_gradient(policy.log_probs(), policy.advantages, parameters)
    weights = TotalVariation(0.0).solve(policy.advantages).weights
    uniform = natural_gradient(policy.log_probs(), policy.advantages, parameters, weights=weights)
    assert_close(plain.direction, uniform.direction)


def test_a_sample_without_weight_has_no_influence(policy: Policy) -> None:
    weights = torch.full((30,), 1 / 29, dtype=torch.float64)
    weights[7] = 0
    changed = policy.advantages.clone()
    changed[7] = 1e6
    parameters, log_probs = list(policy.parameters()), policy.log_probs()
    one = natural_gradient(log_probs, policy.advantages, parameters, weights=weights)
    other = natural_gradient(log_probs, changed, parameters, weights=weights)
    assert_close(one.direction, other.direction)


def test_residual_falls_with_iterations_and_says_what_is_left(policy: Policy) -> None:
    parameters, log_probs = list(policy.parameters()), policy.log_probs()
    residuals = [
        natural_gradient(log_probs, policy.advantages, parameters, iterations=k, ridge=1e-2).residual
        for k in (1, 5, 40)
    ]
    assert residuals[0] > residuals[1] > residuals[2] and residuals[0] > 1e-2 and residuals[2] < 1e-6


def test_more_iterations_than_needed_do_no_harm(policy: Policy) -> None:
    parameters = list(policy.float().parameters())
    log_probs = policy.layers(policy.states.float()).log_softmax(-1)[:, 0]
    short, long = (
        natural_gradient(log_probs, policy.advantages.float(), parameters, ridge=0.1, iterations=k) for k in (30, 400)
    )
    assert_close(long.direction, short.direction, rtol=1e-4, atol=1e-5)
    assert long.residual < 1e-5


def test_a_zero_gradient_gives_a_zero_direction(policy: Policy) -> None:
    natural = natural_gradient(policy.log_probs(), torch.zeros(30, dtype=torch.float64), list(policy.parameters()))
    assert all((part == 0).all() for part in natural.direction)
    assert natural.residual == 0
    assert (natural.step_size(0.01, largest=1.0) * flat(natural.direction) == 0).all()


def test_nan_advantages_give_a_nan_direction(policy: Policy) -> None:
    natural = natural_gradient(policy.log_probs(), policy.advantages * torch.nan, list(policy.parameters()))
    assert flat(natural.direction).isnan().all() and natural.residual.isnan()


def test_step_size_moves_the_policy_by_the_given_kl(policy: Policy) -> None:
    """Against the KL divergence itself, with the Fisher matrix of the policy's own expectation."""
    states = policy.states[:10]
    every = policy.layers(states).log_softmax(-1)
    # All four actions of each state, weighted by their probability: no sampling.
    weights = (every.detach().exp() / 10).flatten()
    advantages = torch.randn(40, dtype=torch.float64)
    parameters = list(policy.parameters())
    natural = natural_gradient(every.flatten(), advantages, parameters, weights=weights, iterations=60)
    before = every.detach()
    natural.assign(parameters, natural.step_size(1e-6))
    torch.optim.SGD(parameters, lr=1.0).step()
    after = policy.layers(states).log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert_close(kl.item(), 1e-6, rtol=2e-2, atol=0)


def test_the_step_raises_the_advantage(policy: Policy) -> None:
    parameters = list(policy.parameters())
    weights = CVaR(0.5).solve(-policy.advantages).weights

    def gain() -> Tensor:
        return (weights * policy.advantages * policy.log_probs()).sum()

    before = gain().item()
    natural = natural_gradient(policy.log_probs(), policy.advantages, parameters, weights=weights)
    natural.assign(parameters, natural.step_size(1e-3))
    torch.optim.SGD(parameters, lr=1.0).step()
    assert gain() > before


def test_parameters_that_do_not_matter_stay_where_they_are(policy: Policy) -> None:
    idle = torch.ones(3, requires_grad=True)
    parameters = [idle, *policy.parameters()]
    natural = natural_gradient(policy.log_probs(), policy.advantages, parameters)
    assert torch.equal(natural.direction[0], torch.zeros(3))
    alone = natural_gradient(policy.log_probs(), policy.advantages, parameters[1:])
    assert_close(natural.direction[1:], alone.direction)


# --- one backward pass for each sample ---


def one_by_one(policy: Policy) -> Iterator[Tensor]:
    for i in range(30):
        yield policy.log_probs()[i]


@each_set
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_by_sample_equals_the_dense_solution(policy: Policy, ambiguity: AmbiguitySet, ridge: float) -> None:
    weights, parameters = ambiguity.solve(-policy.advantages).weights, list(policy.parameters())
    natural = natural_gradient_by_sample(
        one_by_one(policy), policy.advantages, parameters, weights=weights, ridge=ridge
    )
    scores = score_matrix(policy.log_probs(), parameters)
    fisher, gradient = scores.T @ (weights[:, None] * scores), scores.T @ (weights * policy.advantages)
    dense = torch.linalg.solve(fisher + ridge * torch.eye(len(fisher), dtype=torch.float64), gradient)
    assert_close(flat(natural.gradient), gradient)
    assert_close(flat(natural.direction), dense)
    assert_close(natural.curvature, dense @ fisher @ dense)
    assert natural.residual < 1e-9
    assert [part.shape for part in natural.direction] == [p.shape for p in parameters]
    assert all(p.grad is None for p in parameters)


def test_by_sample_equals_conjugate_gradient_where_it_has_converged(policy: Policy) -> None:
    parameters = [torch.ones(3, dtype=torch.float64, requires_grad=True), *policy.parameters()]  # the first is idle
    exact = natural_gradient_by_sample(one_by_one(policy), policy.advantages, parameters, ridge=0.1)
    by_products = natural_gradient(policy.log_probs(), policy.advantages, parameters, ridge=0.1, iterations=60)
    assert_close(exact.direction, by_products.direction)
    assert_close(exact.curvature, by_products.curvature)


def test_by_sample_keeps_one_graph_at_a_time(policy: Policy) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def log_probs() -> Iterator[Tensor]:
        for i in range(30):
            assert all(ref() is None for ref in alive[:-1])
            one = policy.log_probs()[i]
            alive.append(weakref.ref(one))
            yield one

    natural_gradient_by_sample(log_probs(), policy.advantages, policy.parameters())


def test_by_sample_nan_zero_and_half_precision(policy: Policy) -> None:
    parameters = list(policy.parameters())
    poisoned = natural_gradient_by_sample(one_by_one(policy), policy.advantages * torch.nan, parameters)
    assert flat(poisoned.direction).isnan().all() and poisoned.residual.isnan()
    still = natural_gradient_by_sample(one_by_one(policy), 0 * policy.advantages, parameters)
    assert (flat(still.direction) == 0).all() and still.residual == 0
    theta = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.bfloat16)
    half = natural_gradient_by_sample((row @ theta for row in rows), torch.tensor([1.0, 2.0]), [theta], ridge=1e-6)
    assert half.direction[0].dtype == torch.float32
    assert_close(half.direction[0], torch.ones(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        ([torch.zeros(2, requires_grad=True)], "log_probs must yield tensors of one element, got shape (2,)"),
        ([torch.zeros(())], "log_probs must have a gradient"),
    ],
)
def test_by_sample_wrong_arguments(policy: Policy, log_probs: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        natural_gradient_by_sample(log_probs, torch.zeros(1), policy.parameters())
    few = (log_prob for log_prob, _ in zip(one_by_one(policy), range(3), strict=False))
    with pytest.raises(ValueError, match=re.escape("advantages must have the shape of log_probs (3,), got (30,)")):
        natural_gradient_by_sample(few, policy.advantages, policy.parameters())


needs_hf = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("peft") is None, reason="needs transformers and peft"
)


@needs_hf
@pytest.mark.filterwarnings("ignore")
@each_set
def test_lora_parameters_of_a_language_model(ambiguity: AmbiguitySet) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, attn_implementation="eager")  # fmt: skip
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    tokens, mask = torch.randint(23, (8, 7)), torch.ones(8, 7, dtype=torch.bool)
    rewards = torch.randn(8)
    ratio = prompt_ratio(-rewards, ambiguity, groups=torch.arange(8) // 2)
    log_probs = sequence_log_probs(model(tokens).logits, tokens, mask)
    natural = natural_gradient(log_probs, rewards, parameters, weights=ratio / 8, ridge=0.1, iterations=20)
    scores = score_matrix(log_probs, parameters)
    q = ratio.double() / 8
    fisher = scores.T @ (q[:, None] * scores) + 0.1 * torch.eye(scores.shape[1], dtype=torch.float64)
    dense = torch.linalg.solve(fisher, scores.T @ (q * rewards.double()))
    error = (flat(natural.direction) - dense).norm() / dense.norm()
    assert error < 1e-5 and natural.residual < 1e-5
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_parameters_get_a_float32_direction(policy: Policy) -> None:
    head = policy.layers[2].bfloat16().weight
    log_probs = (policy.states.bfloat16() @ torch.ones(3, 5, dtype=torch.bfloat16) @ head.T).float().log_softmax(-1)
    natural = natural_gradient(log_probs[:, 0], policy.advantages.float(), [head])
    assert natural.direction[0].dtype == torch.float32
    natural.assign([head])
    assert head.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ridge": 0.0}, ValueError, "ridge must be in (0, inf), got 0.0. It keeps the system solvable."),
        ({"iterations": 0}, ValueError, "iterations must be an integer of at least 1, got 0. 10 is usual."),
        ({"iterations": 2.0}, ValueError, "iterations must be an integer of at least 1, got 2.0."),
        ({"log_probs": torch.zeros(30)}, ValueError, "log_probs must have a gradient"),
        ({"advantages": torch.zeros(3)}, ValueError, "advantages must have the shape of log_probs (30,), got (3,)"),
        ({"weights": torch.zeros(30, 1)}, ValueError, "weights must have shape (n,), got (30, 1)"),
        ({"parameters": []}, ValueError, "parameters must be tensors with requires_grad=True, at least one, got 0"),
        ({"parameters": [torch.zeros(2)]}, ValueError, "got 1 of which 0 are"),
    ],
)
def test_wrong_arguments(policy: Policy, change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {
        "log_probs": policy.log_probs(), "advantages": policy.advantages, "parameters": list(policy.parameters())
    } | change  # fmt: skip
    with pytest.raises(error, match=re.escape(message)):
        natural_gradient(**arguments)


def test_step_size_refuses(policy: Policy) -> None:
    natural: NaturalGradient = natural_gradient(policy.log_probs(), policy.advantages, list(policy.parameters()))
    with pytest.raises(ValueError, match=re.escape("kl must be in (0, inf), got 0")):
        natural.step_size(0)
