"""Without `reweight` a wrapped step is the bare optimizer's to the bit: every optimizer, scheduler and scaler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optimizer import Dress, adamw, assert_same, backward, bare, network, sgd, train, train_robustly, wrap
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils
from torch.testing._internal.common_optimizers import optim_db

# Every optimizer of torch, in every configuration that torch's own tests use on the CPU.


def configurations() -> list[Any]:
    found = []
    for info in optim_db:
        kinds = [{}] + [{kind: True} for kind in info.supported_impls if kind != "differentiable"]
        for given in info.optim_inputs_func(device="cpu"):
            for kind in kinds:
                label = "-".join([info.optim_cls.__name__, given.desc.replace(" ", "_"), *kind])
                found.append(pytest.param(info, given.kwargs | kind, id=label))
    return found


def problem(info: Any) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Parameters that the optimizer takes, and a loss that gives them gradients of the kind it takes."""
    torch.manual_seed(0)
    x, params = torch.randn(6, 3), [nn.Parameter(torch.randn(4, 3))]
    if info.only_supports_sparse_grads:
        params = [nn.Parameter(torch.randn(6, 4))]

        def loss() -> Tensor:
            return nn.functional.embedding(torch.tensor([0, 2, 2, 5]), params[0], sparse=True).square().mean()

        return params, loss
    if info.optim_cls.__name__ != "Muon":  # matrices only
        params.append(nn.Parameter(torch.randn(4)))
    return params, lambda: (x @ params[0].T + sum(params[1:])).square().mean()


@pytest.mark.parametrize(("info", "kwargs"), configurations())
def test_steps_are_those_of_the_bare_optimizer(info: Any, kwargs: dict[str, Any]) -> None:
    def run(dress: Dress) -> tuple[list[Any], Any, list[Any]]:
        params, loss = problem(info)
        optimizer = dress(info.optim_cls(params, **copy.deepcopy(kwargs)))

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        returned = []
        for step in range(5):
            if info.step_requires_closure or step > 2:
                returned.append(optimizer.step(closure))
            else:
                closure()
                returned.append(optimizer.step())
        return params, optimizer.state_dict(), returned

    wanted, got = run(bare), run(wrap)
    assert_same(wanted, got)
    assert isinstance(got[2][-1], Tensor)
    assert not torch.equal(got[0][0], problem(info)[0][0])


def test_the_database_was_driven() -> None:
    driven = {param.values[0].optim_cls for param in configurations()}
    there = {kind for kind in vars(torch.optim).values() if isinstance(kind, type)
             and issubclass(kind, torch.optim.Optimizer)}  # fmt: skip
    assert driven == there - {torch.optim.Optimizer}


def test_a_step_can_be_differentiated() -> None:
    def run(dress: Dress) -> Tensor:
        start = torch.tensor([1.0, 2.0], requires_grad=True)
        weight = start.clone()  # not a leaf, so that the graph goes through the step
        weight.grad = (3 * start).clone()
        dress(torch.optim.Adam([weight], lr=0.1, differentiable=True)).step()
        return torch.autograd.grad(weight.square().sum(), start)[0]

    assert torch.equal(run(bare), run(wrap)) and run(wrap).ne(0).all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # from torch's tracer
@pytest.mark.parametrize("capturable", [False, True])
def test_a_compiled_step_is_the_same_step(capturable: bool) -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def run(dress: Dress) -> nn.Module:
        torch.compiler.reset()
        model = network()
        optimizer = dress(adamw(model, capturable=capturable))
        if dress is wrap:
            optimizer.reweight(model(torch.randn(8, 3)).squeeze(-1))
        compiled = torch.compile(optimizer.step, backend=backend)
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, seed)
            compiled()
        assert dress is not wrap or optimizer.reweighter.state_dict()["pool"]["marked"]
        return model

    plain, count = run(bare), len(graphs)
    assert_same(plain, run(wrap))
    assert len(graphs) == 2 * count > 0


# Schedulers.

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=10),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def test_every_scheduler_is_listed() -> None:
    there = {name for name, kind in (vars(schedulers) | vars(swa_utils)).items() if isinstance(kind, type)
             and issubclass(kind, schedulers.LRScheduler)}  # fmt: skip
    assert there - {"LRScheduler", "_LRScheduler"} == SCHEDULERS.keys()


# torch's SequentialLR steps its members with the deprecated epoch argument.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("resume", ["not", "in place", "in fresh objects"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_steer_the_wrapped_optimizer(name: str, resume: str) -> None:
    def run(dress: Dress) -> tuple[nn.Module, list[Any]]:
        model, rates = network(), []
        optimizer = dress(sgd(model))
        scheduler = SCHEDULERS[name](optimizer)
        for t in range(6):
            if t == 3 and resume != "not":
                saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
                if resume == "in fresh objects":
                    optimizer = dress(sgd(model))
                    scheduler = SCHEDULERS[name](optimizer)
                    optimizer.step()  # as torch asks for; without gradients it changes nothing
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            train(model, optimizer, 1, seed=t)
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            rates.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
        return model, rates

    (plain, wanted), (wrapped, rates) = run(bare), run(wrap)
    assert rates == wanted and len({str(rate) for rate in rates}) > 1
    assert_same(plain, wrapped)


def test_averaged_models() -> None:
    def run(dress: Dress) -> nn.Module:
        model = network()
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        optimizer = dress(adamw(model))
        for _ in range(3):
            train(model, optimizer, 1)
            average.update_parameters(model)
        return average.module

    assert_same(run(bare), run(wrap))


# Loss scaling.

SCALE = 2.0**8


def scaled(optimizer: Any, model: nn.Module, *, clip: bool = False) -> float:
    """Four steps, the second of which overflows and must change nothing; returns the scale at the end."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(4):
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss = model(torch.randn(8, 3)).square().mean() * (torch.inf if step == 1 else 1.0)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert_same(before, (list(model.parameters()), optimizer.state_dict()))
    return scaler.get_scale()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_unscales_and_skips_an_overflow(make: Callable[..., Any], fused: bool, clip: bool) -> None:
    model, plain = network(), network()
    assert scaled(wrap(make(model, fused=fused)), model, clip=clip) == SCALE / 2
    scaled(make(plain), plain, clip=clip)
    if not fused:
        assert_same(model, plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_grad_scaler_skips_a_loss_that_is_not_finite() -> None:
    model = network()
    optimizer, scaler = wrap(sgd(model)), torch.amp.GradScaler("cpu", init_scale=SCALE)
    train_robustly(model, optimizer)
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    losses = model(torch.randn(8, 3)).squeeze(-1).square() * torch.tensor([1.0] * 7 + [torch.inf])
    scaler.scale(optimizer.reweight(losses).mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(model, before)
    assert scaler.get_scale() == SCALE / 2 and optimizer.reweighter.metrics()["nonfinite"] == 1
