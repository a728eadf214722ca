"""Under torch.compile without a graph break, and under torch.func."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, RobustOptimizer, TotalVariation, robust_loss

SETS = [
    TotalVariation(0.3),
    TotalVariation(0.3, cap=2.0),
    ChiSquare(0.5),
    ChiSquare(penalty=0.5),
    KL(0.3),
    KL(temperature=0.5),
    CVaR(0.4),
]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def data(steps: int, n: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 5, generator=generator), torch.randn(n, generator=generator)) for _ in range(steps)]


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trained(
    step: Callable[[Tensor, Tensor], Tensor], model: nn.Module, steps: int, after: Callable[[], None]
) -> Tensor:
    """The gradients of some steps, one below the other."""
    found = []
    for x, y in data(steps):
        model.zero_grad()
        step(x, y).backward()
        found.append(gradient(model).clone())
        after()
    return torch.stack(found)


@each_set
def test_robust_loss_in_a_train_step(ambiguity: AmbiguitySet) -> None:
    model = a_model()

    def step(x: Tensor, y: Tensor) -> Tensor:
        return robust_loss((model(x).squeeze(-1) - y).square(), ambiguity)

    want = trained(step, model, 2, lambda: None)
    got = trained(compiled(step), model, 2, lambda: None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def hooked_step(model: nn.Module, reweighter: Reweighter, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        losses = (model(x).squeeze(-1) - y).square()
        return reweighter(losses, **options).mean()

    return step


def assert_same_when_compiled(reweighter: Reweighter, backend: Any, steps: int, **options: Any) -> None:
    model, other = a_model(), copy.deepcopy(reweighter)
    want = trained(hooked_step(model, reweighter, **options), model, steps, reweighter.step)
    got = trained(compiled(hooked_step(model, other, **options), backend), model, steps, other.step)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    plain = trained(lambda x, y: (model(x).squeeze(-1) - y).square().mean(), model, steps, lambda: None)
    assert (got[-1] - plain[-1]).abs().max() > 1e-3
    for name, value in reweighter.metrics().items():
        torch.testing.assert_close(other.metrics()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["batch", "memory"])
@pytest.mark.parametrize("ambiguity", SETS[::3], ids=repr)
def test_the_hook_in_a_train_step(ambiguity: AmbiguitySet, pool: Any) -> None:
    """The memory fills on the way: its state changes under the graph, which is traced once."""
    backend = CompileCounterWithBackend("aot_eager")
    assert_same_when_compiled(Reweighter(ambiguity, pool=pool), backend, 9)
    assert backend.frame_count == 1


def test_the_hook_with_mask_base_and_groups() -> None:
    options = {
        "mask": torch.arange(12) != 3,
        "base": torch.linspace(1, 2, 12),
        "groups": torch.arange(12) % 4,
    }
    assert_same_when_compiled(Reweighter(ChiSquare(0.5)), "aot_eager", 9, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_memory_keeps_its_losses_where_the_compiler_reuses_theirs() -> None:
    assert_same_when_compiled(Reweighter(ChiSquare(0.5)), "inductor", 9)


def test_a_train_step_of_the_optimizer() -> None:
    """The compiled part ends before backward, as compiled steps do."""
    models = [a_model(), a_model()]
    for model, wrap in zip(models, (compiled, lambda function: function), strict=True):
        optimizer = RobustOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), TotalVariation(0.3))

        def step(x: Tensor, y: Tensor, model: Any = model, optimizer: Any = optimizer) -> Tensor:
            return optimizer.reweight((model(x).squeeze(-1) - y).square()).mean()

        run = wrap(step)
        for x, y in data(8):
            run(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_two_reweighters_keep_apart() -> None:
    """A copy, and one that was loaded, are others."""
    model, first = a_model(), Reweighter(ChiSquare(0.5))
    second = copy.deepcopy(first)
    trained(compiled(hooked_step(model, first)), model, 6, first.step)
    assert first.metrics()["pool_size"] > 0 and not second.metrics()


def test_a_survey_is_refused() -> None:
    model, reweighter = a_model(), Reweighter(ChiSquare(0.5), pool="window")
    step, (batch,) = compiled(hooked_step(model, reweighter)), data(1)
    with pytest.raises(Exception, match="cannot be surveyed inside"), reweighter.survey(model):
        step(*batch)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@each_set
def test_func_grad(ambiguity: AmbiguitySet) -> None:
    losses = rows(9)
    found = torch.func.grad(lambda losses: robust_loss(losses, ambiguity))(losses)
    torch.testing.assert_close(found, ambiguity.solve(losses).weights)


@each_set
def test_vmap(ambiguity: AmbiguitySet) -> None:
    """Losses by row, a base by row, a mask that all share; values and gradients."""
    losses, base, mask = rows(4, 9), rows(4, 9).abs() + 0.1, torch.arange(9) != 2

    def value(losses: Tensor, base: Tensor | None = None) -> Tensor:
        return robust_loss(losses, ambiguity, base=base, mask=mask)

    want = ambiguity.solve(losses, base=base, mask=mask)
    torch.testing.assert_close(torch.vmap(value)(losses, base), want.value)
    torch.testing.assert_close(torch.vmap(torch.func.grad(value))(losses, base), want.weights)
    torch.testing.assert_close(torch.vmap(value, in_dims=1)(losses.mT, base.mT), want.value)
    shared = ambiguity.solve(losses[0].expand(4, 9), base=base, mask=mask)
    torch.testing.assert_close(torch.vmap(value, in_dims=(None, 0))(losses[0], base), shared.value)
    torch.testing.assert_close(torch.vmap(value)(losses), ambiguity.solve(losses, mask=mask).value)


def test_vmap_twice() -> None:
    losses = rows(2, 3, 5)
    found = torch.vmap(torch.vmap(lambda losses: robust_loss(losses, ChiSquare(0.5))))(losses)
    torch.testing.assert_close(found, ChiSquare(0.5).solve(losses).value)
