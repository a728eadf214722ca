"""RobustOptimizer reweights, and is an ordinary optimizer to everyone who looks at it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from robustgrad import CVaR, RobustOptimizer, TotalVariation

Dress = Callable[..., Any]  # what makes or wraps the optimizer under test


def wrap(inner: torch.optim.Optimizer, **options: Any) -> RobustOptimizer:
    return RobustOptimizer(inner, TotalVariation(0.1), **options)


def bare(inner: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return inner


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, **options)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))


def single(value: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.full((1,), value))], lr=1.0)


def backward(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    loss = model(torch.randn(8, 3)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 1) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, seed + step)
        optimizer.step()


def train_robustly(model: nn.Module, optimizer: RobustOptimizer, steps: int = 4, seed: int = 1) -> None:
    """Enough losses a step that each is reweighted, from the second on by the memory."""
    for step in range(steps):
        torch.manual_seed(seed + step)
        optimizer.zero_grad()
        losses = (model(torch.randn(70, 3)).squeeze(-1) - torch.randn(70)).square()
        optimizer.reweight(losses).mean().backward()
        optimizer.step()


def assert_same(left: Any, right: Any) -> None:
    """Equal to the bit: tensors, and modules, mappings and sequences of them."""
    if isinstance(left, nn.Module):
        assert_same(list(left.parameters()), list(right.parameters()))
    elif isinstance(left, Tensor):
        assert torch.equal(left, right) and left.dtype == right.dtype
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


# The reweighting itself.


def test_reweight_gives_the_weighted_gradient() -> None:
    model = network()
    optimizer = RobustOptimizer(sgd(model), CVaR(0.5), pool="batch")
    losses = model(torch.randn(8, 3)).squeeze(-1).square()
    worst_half = losses >= losses.sort().values[4]
    expected = torch.autograd.grad(losses[worst_half].sum() / 4, list(model.parameters()), retain_graph=True)
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


def test_options_reach_the_reweighter() -> None:
    optimizer = wrap(adamw(network()), pool="memory", memory=64, on_nonfinite="raise")
    for seed in range(3):
        train_robustly(network(), optimizer, 1, seed)
    assert optimizer.reweighter.metrics()["pool_size"] == 64
    with pytest.raises(FloatingPointError, match="losses must be finite"):
        optimizer.reweight(torch.full((2,), torch.nan, requires_grad=True))
    with pytest.raises(ValueError, match="pool must be"):
        wrap(adamw(network()), pool="ring")
    with pytest.raises(TypeError, match="ambiguity must be"):
        RobustOptimizer(adamw(network()), 0.1)


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


def test_step_marks_and_changes_nothing_else_of_the_robust_state() -> None:
    model = network()
    optimizer = wrap(adamw(model))
    train_robustly(model, optimizer)
    optimizer.reweight(model(torch.randn(8, 3)).squeeze(-1))
    before = copy.deepcopy(optimizer.reweighter.state_dict())
    seen = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.reweighter.state_dict()["pool"]["marked"]))
    optimizer.step()
    after = optimizer.reweighter.state_dict()
    assert before["pool"].pop("marked") is False and after["pool"].pop("marked") is True
    assert seen == [True]
    assert_same(before, after)


def test_a_large_first_step_is_one_step() -> None:
    """200 losses are past a quarter of the memory, yet the optimizer says when its step ends."""
    optimizer = RobustOptimizer(adamw(network()), CVaR(0.5))
    for _ in range(200):
        optimizer.reweight(torch.rand(1, requires_grad=True))
    assert optimizer.reweighter.metrics()["plain"]


def test_a_closure_reweights_at_each_evaluation() -> None:
    """LBFGS evaluates several times a step; all of it is one step to the memory."""
    model, x = network(), torch.randn(70, 3)
    optimizer = wrap(torch.optim.LBFGS(model.parameters(), max_iter=3))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = optimizer.reweight(model(x).squeeze(-1).square()).mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > closure()
    waiting = optimizer.reweighter.state_dict()["pool"]["waiting"]["scores"]
    assert len(waiting) == 70  # the call after the step; before it, three evaluations of 70
    assert optimizer.reweighter.metrics()["pool_size"] == 210


# Live views, groups, attributes, errors.


def test_views_are_live_in_both_directions() -> None:
    inner = adamw(network())
    optimizer = wrap(inner)
    inner.load_state_dict(inner.state_dict())  # replaces groups and state
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    groups = [dict(group) for group in inner.param_groups]
    optimizer.param_groups = groups
    assert inner.param_groups is groups
    optimizer.state, optimizer.defaults = {}, {"lr": 3.0}
    assert inner.state == {} and inner.defaults == {"lr": 3.0}


def test_the_base_class_loads_and_saves_the_wrapped_state() -> None:
    """Code that calls torch's own methods on the wrapper ends in `__setstate__` with state and groups."""
    model = network()
    optimizer, hooks = wrap(adamw(model)), []
    optimizer.register_step_pre_hook(lambda *_: hooks.append(1))
    train(model, optimizer)
    saved = copy.deepcopy(torch.optim.Optimizer.state_dict(optimizer))
    assert_same(saved, optimizer.optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.7
    torch.optim.Optimizer.load_state_dict(optimizer, saved)
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.7 and not vars(optimizer).keys() & {"state", "param_groups"}
    optimizer.step()
    assert len(hooks) == 4


def test_add_param_group() -> None:
    model, extra = network(), nn.Parameter(torch.ones(2))
    optimizer = wrap(adamw(model))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert len(optimizer.param_groups) == len(optimizer.optimizer.param_groups) == 2
    extra.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(extra, torch.ones(2))


@pytest.mark.parametrize("arguments", [{}, {"set_to_none": True}, {"set_to_none": False}])
def test_zero_grad(arguments: dict[str, bool]) -> None:
    model = network()
    backward(model, 1)
    wrap(adamw(model)).zero_grad(**arguments)
    if arguments.get("set_to_none", True):
        assert all(p.grad is None for p in model.parameters())
    else:
        assert all((p.grad == 0).all() for p in model.parameters())


def test_parameters_can_be_swapped() -> None:
    """`module.to` swaps tensors under some settings, which a weak reference to a parameter forbids."""
    model = network()
    optimizer = wrap(adamw(model))
    train_robustly(model, optimizer)
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.ones(4, 3)))
    assert torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(4, 3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.optim.AdamW, "got the class AdamW. Build it first"),
        ([nn.Parameter(torch.ones(1))], "got list"),
        (None, "got NoneType"),
        (wrap(single()), "wrapped already"),
    ],
)
def test_wrong_optimizer(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        wrap(given)


def test_nothing_is_delegated_blindly() -> None:
    optimizer = wrap(adamw(network(), fused=True))
    assert optimizer.optimizer._step_supports_amp_scaling and not optimizer._step_supports_amp_scaling
    optimizer.optimizer.special = 1
    with pytest.raises(AttributeError, match=r"'special': the wrapped AdamW has it, use \.optimizer\.special\.$"):
        _ = optimizer.special
    with pytest.raises(AttributeError, match=r"no attribute 'missing'\.$"):
        _ = optimizer.missing


def test_modes_of_schedule_free_optimizers_are_reached() -> None:
    class ScheduleFree(torch.optim.SGD):
        mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    optimizer = wrap(ScheduleFree([nn.Parameter(torch.ones(1))]))
    optimizer.eval()
    assert optimizer.optimizer.mode == "eval"
    assert not hasattr(optimizer, "train") and not hasattr(wrap(single()), "eval")


def test_repr_names_both() -> None:
    text = repr(wrap(adamw(network())))
    assert "AdamW" in text and "lr: 0.1" in text and "TotalVariation(radius=0.1" in text


# Hooks.

KINDS = {
    "step_pre": lambda o, args, kwargs: args[0] is o,
    "step_post": lambda o, args, kwargs: args[0] is o,
    "state_dict_pre": lambda o: True,
    "state_dict_post": lambda o, state: state.keys() == {"state", "param_groups"},
    "load_state_dict_pre": lambda o, state: state.keys() == {"state", "param_groups"},
    "load_state_dict_post": lambda o: True,
}


def register(optimizer: torch.optim.Optimizer, kind: str, seen: list[Any], **options: bool) -> Any:
    def hook(*given: Any) -> None:
        seen.append((kind, given[0] is optimizer and KINDS[kind](*given)))

    return getattr(optimizer, f"register_{kind}_hook")(hook, **options)


def use(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("at", [lambda o: o, lambda o: o.optimizer], ids=["wrapper", "wrapped"])
def test_hooks_fire_once_and_receive_where_they_were_registered(at: Callable[[Any], Any]) -> None:
    optimizer, seen = wrap(adamw(network())), []
    handles = [register(at(optimizer), kind, seen) for kind in KINDS]
    use(optimizer)
    assert seen == [(kind, True) for kind in KINDS]
    for handle in handles:
        handle.remove()
    use(optimizer)
    assert len(seen) == len(KINDS)


def test_hooks_and_schedulers_from_before_the_wrapping_still_act_once() -> None:
    inner, seen = single(), []
    for kind in KINDS:
        register(inner, kind, seen)
    scheduler = schedulers.StepLR(inner, 1, gamma=0.5)  # wraps `step` of the instance
    optimizer = wrap(inner)
    use(optimizer)
    scheduler.step()  # would warn, had the step gone past it
    assert seen == [(kind, True) for kind in KINDS] and optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "state_dict" in kind])
def test_hooks_can_be_put_first(kind: str) -> None:
    optimizer, order = wrap(single()), []
    for name, first in (("one", False), ("two", True)):
        getattr(optimizer, f"register_{kind}_hook")(lambda *_, name=name: order.append(name), prepend=first)
    use(optimizer)
    assert order == ["two", "one"]


def test_hooks_may_change_what_passes_through() -> None:
    optimizer, seen = wrap(single()), []
    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o,), {"closure": lambda: 7.0}))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(list(kwargs)))
    assert optimizer.step() == 7.0 and seen == [["closure"]]
    handle.remove()
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((*args, lambda: 8.0), kwargs))
    assert optimizer.step() == 8.0
    optimizer.register_state_dict_post_hook(lambda o, s: s | {"note": 1})
    assert optimizer.state_dict()["note"] == 1 and "note" not in optimizer.optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(
        lambda o, s: {"state": {}, "param_groups": [s["param_groups"][0] | {"lr": 0.25}]}
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.register_step_pre_hook(lambda o, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="must return None or"):
        optimizer.step()


def test_loading_leaves_the_given_dictionary_as_it_is() -> None:
    optimizer = wrap(single())
    optimizer.register_load_state_dict_pre_hook(lambda o, s: s.pop("note"))
    given = optimizer.state_dict() | {"note": None}
    optimizer.load_state_dict(given)
    assert "note" in given


def test_global_hooks_fire_once() -> None:
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("post")),
    ]
    try:
        copy.deepcopy(wrap(single())).step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["pre", "post"]


def test_closure_result_and_grad_mode_pass_through() -> None:
    class Curious(torch.optim.SGD):
        def step(self, closure: Any = None, *, note: str = "") -> Any:
            return torch.is_grad_enabled(), closure, note

    optimizer = wrap(Curious([nn.Parameter(torch.ones(1))]))
    assert optimizer.step() == (True, None, "")
    with torch.no_grad():
        assert optimizer.step(5, note="read") == (False, 5, "read")


def test_no_reference_cycle() -> None:
    """With a scheduler attached too: both are freed as soon as nobody holds them."""
    gc.collect()
    gc.disable()
    try:
        model = network()
        optimizer = wrap(adamw(model))
        scheduler = schedulers.StepLR(optimizer, 1)
        train_robustly(model, optimizer)
        scheduler.step()
        gone = [weakref.ref(optimizer), weakref.ref(optimizer.optimizer), weakref.ref(optimizer.reweighter)]
        del optimizer, scheduler
        assert [reference() for reference in gone] == [None, None, None]
    finally:
        gc.enable()
