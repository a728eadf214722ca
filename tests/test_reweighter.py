"""The multiplier law: whatever reduction a loop has, the hooked gradient is the hand-written weighted sum."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, TotalVariation

SETS = [TotalVariation(0.3), ChiSquare(0.5), KL(0.3), CVaR(0.4), TotalVariation(0.3, cap=2.0), KL(temperature=0.5)]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)


def model_and_data(n: int = 12, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.randn(n, 5), torch.randn(n)


def per_sample(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).squeeze(-1) - y).square()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def sample_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(n, parameters), one sample at a time."""
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(per_sample(model, x[i : i + 1], y[i : i + 1]).sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def batch(ambiguity: AmbiguitySet, **options: object) -> Reweighter:
    return Reweighter(ambiguity, pool="batch", **options)


@each_set
@pytest.mark.parametrize("reduction", ["mean", "sum", "weighted"])
def test_gradient_is_the_weighted_sum(ambiguity: AmbiguitySet, reduction: str) -> None:
    model, x, y = model_and_data()
    losses = per_sample(model, x, y)
    coefficient = torch.linspace(1, 3, len(x)) if reduction == "weighted" else torch.ones(len(x))
    coefficient = coefficient / len(x) if reduction == "mean" else coefficient
    weights = ambiguity.solve(losses, base=coefficient).weights
    expected = coefficient.sum() * weights @ sample_gradients(model, x, y)
    batch(ambiguity)(losses, base=coefficient)
    (losses * coefficient).sum().backward()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-5, atol=1e-6)


def test_token_mean() -> None:
    """A token mean weighs a sample by its length, so that is its base."""
    torch.manual_seed(1)
    tokens, lengths = torch.randn(6, 9, requires_grad=True), torch.tensor([9, 4, 7, 1, 9, 3])
    real = torch.arange(9) < lengths[:, None]
    losses = torch.where(real, tokens.square(), 0.0).sum(-1) / lengths
    ratio = CVaR(0.3).solve(losses, base=lengths.float()).ratio
    batch(CVaR(0.3))(losses, base=lengths.float())
    ((losses * lengths).sum() / lengths.sum()).backward()
    expected = ratio[:, None] * torch.where(real, 2 * tokens, 0.0) / lengths.sum()
    torch.testing.assert_close(tokens.grad, expected.detach())


@each_set
def test_forward_values_are_untouched(ambiguity: AmbiguitySet) -> None:
    losses = torch.randn(9, requires_grad=True) * 2
    before, total = losses.detach().clone(), losses.mean()
    returned = batch(ambiguity)(losses)
    assert returned is losses
    assert torch.equal(losses, before) and torch.equal(losses.mean(), total)


def test_accumulation_over_micro_batches_keeps_the_law() -> None:
    model, x, y = model_and_data(12)
    reweighter, expected = batch(ChiSquare(0.2)), 0
    for part in torch.arange(12).split(5):
        losses = per_sample(model, x[part], y[part])
        weights = ChiSquare(0.2).solve(losses).weights
        expected = expected + len(part) / 12 * weights @ sample_gradients(model, x[part], y[part])
        (reweighter(losses).sum() / 12).backward()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-5, atol=1e-6)


def test_loss_scale_passes_through() -> None:
    model, x, y = model_and_data()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = CVaR(0.4).solve(per_sample(model, x, y)).weights @ sample_gradients(model, x, y)
    scaler.scale(batch(CVaR(0.4))(per_sample(model, x, y)).mean()).backward()
    scaler.unscale_(sgd)
    torch.testing.assert_close(gradient(model), expected, rtol=1e-5, atol=1e-6)


def test_retained_graph_reweights_every_pass_the_same() -> None:
    losses = torch.rand(7, requires_grad=True)
    tripled = losses * 3
    batch(KL(0.3))(tripled)
    tripled.mean().backward(retain_graph=True)
    once = losses.grad.clone()
    tripled.mean().backward()
    torch.testing.assert_close(losses.grad, 2 * once)


def test_double_backward_differentiates_the_weighted_gradient() -> None:
    w = torch.tensor([0.7, -0.2], dtype=torch.float64, requires_grad=True)
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = (x @ w).exp() * 1
    weights = ChiSquare(0.3).solve(losses).weights
    batch(ChiSquare(0.3))(losses)
    (first,) = torch.autograd.grad(losses.mean(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), w)
    (plain,) = torch.autograd.grad((weights * (x @ w).exp()).sum(), w, create_graph=True)
    (expected,) = torch.autograd.grad(plain.square().sum(), w)
    torch.testing.assert_close(first, plain)
    torch.testing.assert_close(second, expected)


def test_double_backward_through_a_saved_output_is_refused() -> None:
    """exp keeps its output for its backward, so the second derivative would meet the hook again."""
    w = torch.rand(8, requires_grad=True)
    losses = batch(ChiSquare(0.3))(w.exp())
    with pytest.raises(RuntimeError, match=r"squared ratio.*losses \* 1"):
        torch.autograd.grad(losses.mean(), w, create_graph=True)
    losses.mean().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, x, y = model_and_data()
    expected = CVaR(0.4).solve(per_sample(model, x, y)).weights @ sample_gradients(model, x, y)
    x.requires_grad_()
    losses = (checkpoint(model, x, use_reentrant=reentrant).squeeze(-1) - y).square()
    batch(CVaR(0.4))(losses).mean().backward()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-5, atol=1e-6)


def test_compiled_model() -> None:
    model, x, y = model_and_data()
    expected = CVaR(0.4).solve(per_sample(model, x, y)).weights @ sample_gradients(model, x, y)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch(CVaR(0.4))(per_sample(compiled, x, y)).mean().backward()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradient_keeps_the_dtype_of_the_losses(dtype: torch.dtype) -> None:
    leaf = torch.linspace(0, 1, 8).to(dtype).requires_grad_()
    batch(CVaR(0.5))(leaf).sum().backward()
    assert leaf.grad.dtype == dtype
    assert leaf.grad.tolist() == [0.0] * 4 + [2.0] * 4


def test_autocast_changes_nothing() -> None:
    leaf = torch.linspace(0, 1, 8).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch(ChiSquare(0.1))(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, ChiSquare(0.1).solve(leaf).ratio)


def test_a_column_of_losses_is_accepted() -> None:
    leaf = torch.linspace(0, 1, 6).reshape(6, 1).requires_grad_()
    batch(CVaR(0.5))(leaf).sum().backward()
    assert leaf.grad.flatten().tolist() == [0.0] * 3 + [2.0] * 3


def test_handing_over_a_clone_leaves_the_losses_plain() -> None:
    leaf = torch.linspace(0, 1, 4).requires_grad_()
    losses = leaf * 1
    robust = batch(CVaR(0.5))(losses.clone())
    (robust.sum() + losses.sum()).backward()
    assert leaf.grad.tolist() == [1.0, 1.0, 3.0, 3.0]


# What the adversary sees.


def test_scores_replace_the_losses_for_the_adversary() -> None:
    leaf, reward = torch.zeros(6, requires_grad=True), torch.tensor([3.0, 1.0, 4.0, 1.5, 5.0, 9.0])
    batch(CVaR(0.5))(leaf, scores=-reward).sum().backward()
    assert leaf.grad.tolist() == [2.0, 2.0, 0.0, 2.0, 0.0, 0.0]


def test_groups_make_it_the_worst_case_over_group_means() -> None:
    leaf = torch.tensor([0.0, 10.0, 6.0, 6.0, 1.0], requires_grad=True)
    groups = torch.tensor([7, 7, -2, -2, 0])
    means, share = torch.tensor([5.0, 6.0, 1.0]), torch.tensor([0.4, 0.4, 0.2])
    ratio = ChiSquare(0.2).solve(means, base=share).ratio
    batch(ChiSquare(0.2))(leaf, groups=groups).sum().backward()
    torch.testing.assert_close(leaf.grad, ratio[[0, 0, 1, 1, 2]])


def test_base_and_mask_reach_the_solver() -> None:
    leaf, base = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True), torch.tensor([1.0, 2.0, 1.0, 4.0])
    mask = torch.tensor([True, True, True, False])
    ratio = ChiSquare(0.1).solve(leaf, base=base, mask=mask).ratio
    batch(ChiSquare(0.1))(leaf, base=base, mask=mask).sum().backward()
    torch.testing.assert_close(leaf.grad, ratio)
    assert leaf.grad[3] == 0


def test_masked_samples_pass_no_gradient_even_where_it_is_nan() -> None:
    leaf = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    losses = leaf * 1
    batch(CVaR(0.5))(losses, mask=torch.tensor([True, True, False]))
    losses.backward(torch.tensor([1.0, 1.0, torch.nan]))
    assert leaf.grad.tolist() == [0.0, 2.0, 0.0]


# NaN and inf.


@each_set
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("pool", ["batch", "memory"])
def test_nonfinite_losses_never_give_a_plausible_gradient(ambiguity: AmbiguitySet, bad: float, pool: str) -> None:
    reweighter = Reweighter(ambiguity, pool=pool)
    for _ in range(3):  # with the memory: before and after it is filled
        w = torch.tensor(1.0, requires_grad=True)
        x = torch.linspace(0, 1, 80)
        x[5] = bad
        reweighter(w * x).mean().backward()
        reweighter.step()
        assert not torch.isfinite(w.grad)
    assert reweighter.metrics()["nonfinite"] == 3


def test_nan_in_a_loss_shows_even_when_its_score_is_fine() -> None:
    leaf = torch.tensor([1.0, torch.nan, 2.0], requires_grad=True)
    batch(CVaR(0.5))(leaf, scores=torch.arange(3.0)).sum().backward()
    assert leaf.grad.isnan().all()


def test_a_masked_nan_is_nothing() -> None:
    leaf = torch.tensor([1.0, torch.nan, 2.0, 3.0], requires_grad=True)
    reweighter = batch(CVaR(0.5), on_nonfinite="raise")
    reweighter(leaf, mask=torch.tensor([True, False, True, True])).nansum().backward()
    assert leaf.grad.isfinite().all() and reweighter.metrics()["nonfinite"] == 0


def test_raise_names_the_samples_and_changes_no_state() -> None:
    reweighter = Reweighter(CVaR(0.5), on_nonfinite="raise")
    leaf = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    with pytest.raises(FloatingPointError, match=r"NaN or \+inf at \[1, 2\] of 3"):
        reweighter(leaf)
    assert reweighter.metrics() == {}
    leaf.sum().backward()
    assert leaf.grad.tolist() == [1.0, 1.0, 1.0]


def test_grad_scaler_skips_the_step_of_a_nan_loss() -> None:
    w = nn.Parameter(torch.tensor(1.0))
    sgd, scaler = torch.optim.SGD([w], lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    losses = w * torch.tensor([1.0, 2.0, torch.inf])
    scaler.scale(batch(KL(0.1))(losses).mean()).backward()
    scaler.step(sgd)
    scaler.update()
    assert w == 1.0 and scaler.get_scale() == 2.0


# Wrong use.


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (torch.rand(4), ValueError, "requires_grad=False"),
        (torch.rand(4, 4, requires_grad=True), ValueError, r"\(4, 4\).*squeeze one of them"),
        (torch.rand(4, 3, requires_grad=True), ValueError, r"\(4, 3\).*flatten"),
        (torch.rand(1, 3, requires_grad=True), ValueError, r"\(1, 3\)"),
        (torch.rand((), requires_grad=True), ValueError, r"scalar.*reduction=\"none\""),
        (torch.rand(0, requires_grad=True), ValueError, r"at least one.*empty batch"),
        (torch.arange(4), TypeError, "int64"),
        ([1.0, 2.0], TypeError, "list"),
    ],
)
def test_wrong_losses(losses: object, error: type[Exception], message: str) -> None:
    reweighter = Reweighter(CVaR(0.5))
    with pytest.raises(error, match=message):
        reweighter(losses)
    assert reweighter.metrics() == {}


def test_second_attachment() -> None:
    losses = torch.rand(4, requires_grad=True) * 1
    batch(CVaR(0.5))(losses)
    with pytest.raises(ValueError, match=r"already.*clone"):
        batch(KL(0.5))(losses)
    batch(KL(0.5))(losses.clone())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": torch.rand(3)}, r"scores must have the shape"),
        ({"scores": torch.arange(4)}, "scores must be float16"),
        ({"groups": torch.rand(4)}, "groups must be integer"),
        ({"groups": torch.arange(5)}, "groups must have the shape"),
        ({"base": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "base must be finite and not negative"),
        ({"base": torch.zeros(4)}, "base must sum to a positive"),
        ({"mask": torch.ones(4)}, "mask must be bool"),
        ({"mask": [True] * 4}, "mask must be a torch.Tensor"),
    ],
)
@pytest.mark.parametrize("pool", ["memory", "batch"])
def test_wrong_companions_change_no_state(options: dict[str, object], message: str, pool: str) -> None:
    reweighter, losses = Reweighter(CVaR(0.5), pool=pool), torch.rand(4, requires_grad=True)
    with pytest.raises((ValueError, TypeError), match=message):
        reweighter(losses, **options)
    assert reweighter.metrics() == {}
    losses.sum().backward()
    assert losses.grad.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "ring"}, "pool must be 'memory' or 'window' or 'batch', got 'ring'"),
        ({"memory": 10}, "memory must be 0 or an integer of at least 64, got 10"),
        ({"memory": 64.0}, "memory must be 0 or an integer"),
        ({"memory": 128, "pool": "batch"}, "memory must be left out"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be"),
    ],
)
def test_wrong_configuration(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reweighter(CVaR(0.5), **options)


def test_ambiguity_must_be_one() -> None:
    with pytest.raises(TypeError, match=r"ambiguity set, got 0.1.*TotalVariation"):
        Reweighter(0.1)


def test_nothing_happens_without_grad_mode() -> None:
    reweighter = Reweighter(CVaR(0.5))
    with torch.no_grad():
        losses = torch.rand(4)
        assert reweighter(losses) is losses
    assert reweighter.metrics() == {}


# The batch pool says where it is not robust.


@pytest.mark.parametrize(
    ("ambiguity", "n", "words"),
    [
        (CVaR(0.5), 1, "plain averaging"),
        (CVaR(0.25), 4, "largest loss"),
        (ChiSquare(1.0), 3, "largest loss"),
        (KL(1.5), 4, "largest loss"),
        (TotalVariation(0.5), 2, "largest loss"),
        (TotalVariation(0.1), 1, "plain averaging"),
    ],
)
def test_degenerate_batch_warns_once(ambiguity: AmbiguitySet, n: int, words: str) -> None:
    reweighter = Reweighter(ambiguity, memory=0)
    with pytest.warns(UserWarning, match=f"pool of {n} .*{words}"):
        reweighter(torch.rand(n, requires_grad=True))
    reweighter(torch.rand(n, requires_grad=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reweighter(ambiguity, memory=0)(torch.rand(n + 1 if n > 1 else 40, requires_grad=True))


def test_batch_metrics() -> None:
    reweighter = batch(CVaR(0.5))
    reweighter(torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True))
    found = {name: float(value) for name, value in reweighter.metrics().items()}
    assert found == {
        "value": 3.5, "mean": 2.5, "gap": 1.0, "divergence": 2.0, "threshold": 3.0, "cap": 2.0, "pool_size": 4.0,
        "ess": 2.0, "max_ratio": 2.0, "plain": 0.0, "nonfinite": 0.0,
    }  # fmt: skip


def test_the_hook_keeps_nothing_alive() -> None:
    gc.collect()
    gc.disable()
    try:
        losses = torch.rand(8, requires_grad=True) * 2
        gone = weakref.ref(losses)
        batch(CVaR(0.5))(losses).mean().backward()
        del losses
        assert gone() is None
    finally:
        gc.enable()


def test_linear_regression_is_solved_for_its_worst_half() -> None:
    """End to end, against the minimum found by brute force."""
    torch.manual_seed(0)
    x = torch.randn(40)
    y = torch.where(torch.arange(40) < 30, x, -x)
    w = nn.Parameter(torch.tensor(0.9))
    sgd, reweighter = torch.optim.SGD([w], lr=0.02), batch(CVaR(0.3))
    for _ in range(400):
        sgd.zero_grad()
        reweighter(F.mse_loss(w * x, y, reduction="none")).mean().backward()
        sgd.step()
    grid = torch.linspace(-1, 1, 4001)
    worst = CVaR(0.3).solve((grid[:, None] * x - y).square()).value
    reached = CVaR(0.3).solve((w.detach() * x - y).square()).value
    assert reached <= worst.min() * 1.01 < CVaR(0.3).solve((0.5 * x - y).square()).value
