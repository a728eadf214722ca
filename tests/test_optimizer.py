"""RobustOptimizer is the wrapped optimizer to everyone who looks: steps, schedulers, scalers, copies, checkpoints."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import optim_db

from robustgrad import CVaR, RobustOptimizer, TotalVariation

INFOS = {info.optim_cls.__name__: info for info in optim_db}


def wrap(inner: torch.optim.Optimizer, **options: Any) -> RobustOptimizer:
    return RobustOptimizer(inner, TotalVariation(0.1), **options)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for p, q in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(p, q)


def assert_same_state(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right) and left.dtype == right.dtype
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_state(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same_state(one, other)
    else:
        assert left == right


# Every optimizer of torch, in every configuration that torch's own tests use.


def configurations() -> list[Any]:
    found = []
    for name, info in INFOS.items():
        for i, given in enumerate(info.optim_inputs_func(device="cpu")):
            kwargs = given.kwargs
            if kwargs.get("capturable") or kwargs.get("differentiable"):
                continue  # on accelerators, and for the wrapped step inside autograd
            variants = [{}] + [{impl: True} for impl in info.supported_impls if impl in ("foreach", "fused")]
            for variant in variants:
                label = f"{name}-{i}-{next(iter(variant), 'default')}"
                found.append(pytest.param(info, given, {**kwargs, **variant}, id=label))
    return found


@pytest.mark.parametrize(("info", "given", "kwargs"), configurations())
def test_steps_are_those_of_the_bare_optimizer(info: Any, given: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("fused") and "cpu" not in info.supports_fused_on:
        pytest.skip("not fused on the CPU")

    def run(dress: Callable[[Any], Any]) -> tuple[list[Tensor], Any]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))]
        if info.only_supports_sparse_grads:
            params = params[:1]
        if info.optim_cls is getattr(torch.optim, "Muon", None):
            params = params[:1]  # matrices only
        optimizer = dress(info.optim_cls(params, **copy.deepcopy(kwargs)))
        inputs = torch.randn(6, 3)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (inputs @ params[0].t() + (params[1] if len(params) > 1 else 0)).square().mean()
            loss.backward()
            if info.only_supports_sparse_grads:
                params[0].grad = params[0].grad.to_sparse()
            return loss

        returned = []
        for _ in range(4):
            if info.step_requires_closure:
                returned.append(optimizer.step(closure))
            else:
                closure()
                returned.append(optimizer.step())
        return params, (optimizer.state_dict(), returned)

    bare, bare_state = run(lambda optimizer: optimizer)
    wrapped, wrapped_state = run(wrap)
    assert all(torch.equal(p, q) for p, q in zip(bare, wrapped, strict=True))
    assert_same_state(bare_state, wrapped_state)


def test_the_database_was_driven() -> None:
    names = {param.values[0].optim_cls.__name__ for param in configurations()}
    assert {"LBFGS", "SparseAdam", "AdamW", "SGD"} <= names and len(names) >= 12


# The reweighting itself.


def test_reweight_gives_the_weighted_gradient_and_step_marks() -> None:
    model = network()
    optimizer = RobustOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), CVaR(0.5), pool="batch")
    x = torch.randn(8, 3)
    losses = model(x).squeeze(-1).square()
    weights = CVaR(0.5).solve(losses).weights
    expected = torch.autograd.grad((weights * losses).sum(), list(model.parameters()), retain_graph=True)
    assert optimizer.reweight(losses) is losses
    losses.mean().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_companions_reach_the_reweighter() -> None:
    optimizer = RobustOptimizer(adamw(network()), CVaR(0.5), pool="batch")
    leaf = torch.zeros(4, requires_grad=True)
    groups, base = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1.0, 1.0, 2.0])
    mask, scores = torch.tensor([True, True, True, False]), torch.tensor([1.0, 2.0, 9.0, 9.0])
    optimizer.reweight(leaf, scores=scores, groups=groups, base=base, mask=mask).sum().backward()
    expected = CVaR(0.5).solve(torch.tensor([1.5, 1.5, 9.0, 9.0]), base=base, mask=mask).ratio
    torch.testing.assert_close(leaf.grad, expected)


def test_a_step_is_learned_from_at_the_next_call_however_often_it_is_marked() -> None:
    model = network()
    optimizer = RobustOptimizer(adamw(model), CVaR(0.5))
    for expected in (True, True, False):
        losses = model(torch.randn(40, 3)).squeeze(-1).square()
        optimizer.reweight(losses).mean().backward()
        assert bool(optimizer.reweighter.metrics()["plain"]) == expected
        optimizer.step()
        optimizer.step()  # as ZeRO calls it, once per group
    assert optimizer.reweighter.metrics()["pool_size"] == 80


def test_a_large_first_step_is_one_step() -> None:
    """200 losses are past a quarter of the memory, yet the optimizer says when its step ends."""
    optimizer = RobustOptimizer(adamw(network()), CVaR(0.5))
    for _ in range(200):
        optimizer.reweight(torch.rand(1, requires_grad=True))
    assert optimizer.reweighter.metrics()["plain"]


# Live views, groups, errors.


def test_views_are_live_in_both_directions() -> None:
    inner = adamw(network())
    optimizer = wrap(inner)
    inner.load_state_dict(inner.state_dict())  # replaces groups and state
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    groups = [dict(group) for group in inner.param_groups]
    optimizer.param_groups = groups  # as ZeRO does
    assert inner.param_groups is groups
    optimizer.state, optimizer.defaults = {}, {"lr": 3.0}
    assert inner.state == {} and inner.defaults == {"lr": 3.0}


def test_add_param_group() -> None:
    model, extra = network(), nn.Parameter(torch.ones(2))
    optimizer = wrap(adamw(model))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert len(optimizer.param_groups) == len(optimizer.optimizer.param_groups) == 2
    extra.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(extra, torch.ones(2))


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool) -> None:
    model = network()
    optimizer = wrap(adamw(model))
    model(torch.randn(2, 3)).sum().backward()
    optimizer.zero_grad(set_to_none=to_none)
    assert all((p.grad is None) if to_none else (p.grad == 0).all() for p in model.parameters())


def test_switching_parameters_in_the_groups() -> None:
    """What Accelerate does for FSDP2: new tensors are put into the groups of whatever it was given."""
    model = network()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=1.0))
    fresh = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [fresh[p] for p in group["params"]]
    for p in fresh.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(p - 1, q) for p, q in fresh.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.optim.AdamW, "got the class AdamW. Build it first"),
        ([nn.Parameter(torch.ones(1))], "got list"),
        (None, "got NoneType"),
        (wrap(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)), "wrapped already"),
    ],
)
def test_wrong_optimizer(given: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        wrap(given)


def test_wrong_options_are_those_of_the_reweighter() -> None:
    with pytest.raises(ValueError, match="pool must be"):
        wrap(adamw(network()), pool="ring")
    with pytest.raises(TypeError, match="ambiguity must be"):
        RobustOptimizer(adamw(network()), 0.1)


def test_nothing_is_delegated_blindly() -> None:
    optimizer = wrap(adamw(network(), fused=True))
    assert optimizer.optimizer._step_supports_amp_scaling and not optimizer._step_supports_amp_scaling
    optimizer.optimizer.special = 1
    with pytest.raises(AttributeError, match=r"no attribute 'special'.*use .optimizer.special"):
        _ = optimizer.special
    assert not hasattr(optimizer, "missing")


def test_repr_names_both() -> None:
    text = repr(wrap(adamw(network())))
    assert "AdamW" in text and "TotalVariation(radius=0.1" in text


# Hooks.


def test_own_hooks_fire_once_and_receive_the_wrapper() -> None:
    model, seen = network(), []
    optimizer = wrap(adamw(model))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("step pre", o is optimizer, args[0] is o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("step post", o is optimizer, args[0] is o)))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("save pre", o is optimizer)))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append(("save post", o is optimizer)))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append(("load pre", o is optimizer)))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("load post", o is optimizer)))
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [
        ("step pre", True, True), ("step post", True, True), ("save pre", True), ("save post", True),
        ("load pre", True), ("load post", True),
    ]  # fmt: skip


def test_hooks_may_change_what_passes_through() -> None:
    optimizer = wrap(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    assert optimizer.step() == 7.0
    optimizer.register_state_dict_post_hook(lambda o, s: s | {"note": 1})
    assert optimizer.state_dict()["note"] == 1
    optimizer.register_load_state_dict_pre_hook(lambda o, s: {k: v for k, v in s.items() if k != "note"})
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.register_step_pre_hook(lambda o, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="must return None or"):
        optimizer.step()


def test_hooks_of_the_wrapped_optimizer_and_global_ones_fire_once() -> None:
    seen: list[str] = []
    inner = adamw(network())
    inner.register_step_pre_hook(lambda *_: seen.append("inner"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    try:
        wrap(inner).step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "inner", "global post"]


def test_the_class_is_never_patched() -> None:
    step = RobustOptimizer.step
    optimizer = wrap(adamw(network()))
    copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert RobustOptimizer.step is step


def test_closure_result_and_grad_mode_pass_through() -> None:
    optimizer = wrap(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))
    modes = []
    assert optimizer.step(lambda: modes.append(torch.is_grad_enabled()) or 5.0) == 5.0
    with torch.no_grad():
        optimizer.step()
        assert not torch.is_grad_enabled()
    assert modes == [True]


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
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def test_every_scheduler_is_listed() -> None:
    there = {name for name, kind in vars(schedulers).items() if isinstance(kind, type)
             and issubclass(kind, schedulers.LRScheduler) and kind is not schedulers.LRScheduler}  # fmt: skip
    assert there - {"_LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("reload", [False, True])
def test_schedulers_steer_the_wrapped_optimizer(name: str, reload: bool) -> None:
    def run(dress: Callable[[Any], Any]) -> tuple[nn.Module, list[Any]]:
        model = network()
        optimizer = dress(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        scheduler = SCHEDULERS[name](optimizer)
        if reload:
            optimizer.load_state_dict(optimizer.state_dict())
        rates = []
        for t in range(6):
            train(model, optimizer, 1, seed=t)
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            rates.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
        return model, rates

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter", category=UserWarning)  # torch's SequentialLR
        (bare, bare_rates), (wrapped, rates) = run(lambda o: o), run(wrap)
    assert rates == bare_rates and len({str(r) for r in rates}) > 1
    assert_same(bare, wrapped)


# Loss scaling.


@pytest.mark.parametrize("inner", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
], ids=["fused SGD", "fused AdamW", "SGD"])  # fmt: skip
def test_grad_scaler_unscales_and_skips_inf(inner: Callable[[Any], Any]) -> None:
    scale = 2.0**8

    def run(model: nn.Module, optimizer: Any, scaler: Any) -> None:
        torch.manual_seed(3)
        for step in range(4):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 3)).square().mean() * (torch.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            if step == 1:
                assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))

    scaled, plain = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run(scaled, wrap(inner(list(scaled.parameters()))), scaler)
    assert scaler.get_scale() == scale / 2
    torch.manual_seed(3)
    reference = inner(list(plain.parameters()))
    for step in range(4):
        reference.zero_grad()
        plain(torch.randn(8, 3)).square().mean().backward()
        if step != 1:
            reference.step()
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# Copies and checkpoints.


def test_deepcopy_is_independent_and_does_not_step_the_original() -> None:
    model = network()
    optimizer = wrap(adamw(model))
    schedulers.StepLR(optimizer, 1)  # patches `step` on the instance
    train(model, optimizer)
    pair = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model)
    train(*pair)
    assert_same(model, before)
    train(model, optimizer)
    assert_same(model, pair[0])
    assert pair[1].optimizer is not optimizer.optimizer and pair[1].reweighter is not optimizer.reweighter


def test_pickle() -> None:
    model = network()
    optimizer = wrap(adamw(model))
    train(model, optimizer)
    twin_model, twin = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer), train(twin_model, twin)
    assert_same(model, twin_model)
    twin.register_step_pre_hook(lambda *_: None)


def test_state_dict_is_the_inner_one_and_loads_with_weights_only() -> None:
    model = network()
    optimizer = wrap(adamw(model))
    train(model, optimizer)
    assert_same_state(optimizer.state_dict(), optimizer.optimizer.state_dict())
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "robust": optimizer.reweighter.state_dict()}, file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=True)["optimizer"], optimizer.state_dict())


@pytest.mark.parametrize(("save", "load"), [(wrap, lambda o: o), (lambda o: o, wrap), (wrap, wrap)],
                         ids=["out of the wrapper", "into the wrapper", "both"])  # fmt: skip
def test_checkpoints_go_in_and_out_of_the_bare_optimizer(save: Callable[..., Any], load: Callable[..., Any]) -> None:
    model = network()
    optimizer = save(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    train(model, optimizer)
    twin = copy.deepcopy(model)
    other = load(torch.optim.SGD(twin.parameters(), lr=9.0, momentum=0.1))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own loading shares tensors
    train(model, optimizer), train(twin, other)
    assert_same(model, twin)


@pytest.mark.parametrize("dress", [lambda o: o, wrap], ids=["bare", "wrapped"])
def test_distributed_checkpoint_helpers(dress: Callable[[Any], Any]) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = network()
    optimizer = dress(adamw(model))
    train(model, optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert set(saved) == {"state", "param_groups"}
    twin = copy.deepcopy(model)
    fresh = dress(adamw(twin))
    set_optimizer_state_dict(twin, fresh, saved)  # steps once with zero gradients to make the state
    assert_same(model, twin)
    train(model, optimizer), train(twin, fresh)
    assert_same(model, twin)


def test_accelerate_prepare_with_a_scheduler() -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(dress: Callable[[Any], Any]) -> tuple[nn.Module, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        optimizer = dress(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        inner = optimizer
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, schedulers.StepLR(optimizer, 1, gamma=0.5))
        torch.manual_seed(0)
        for _ in range(4):
            optimizer.zero_grad()
            accelerator.backward(model(torch.randn(8, 3)).square().mean())
            optimizer.step()
            scheduler.step()
        return model, inner

    (bare, bare_optimizer), (wrapped, optimizer) = run(lambda o: o), run(wrap)
    assert_same(bare, wrapped)
    assert optimizer.param_groups[0]["lr"] == bare_optimizer.param_groups[0]["lr"] == 0.1 / 16


def test_averaged_model() -> None:
    model = network()
    average, optimizer = torch.optim.swa_utils.AveragedModel(model), wrap(adamw(model))
    train(model, optimizer)
    average.update_parameters(model)
    assert_same(model, average.module)


def test_no_reference_cycle() -> None:
    gc.collect()
    gc.disable()
    try:
        model = network()
        optimizer = wrap(adamw(model))
        losses = model(torch.randn(8, 3)).squeeze(-1).square()
        optimizer.reweight(losses).mean().backward()
        optimizer.step()
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
