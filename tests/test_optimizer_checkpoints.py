"""Copies, checkpoints, and tools that take optimizers apart: distributed checkpoints, FSDP2, ZeRO, Accelerate."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_optimizer import Dress, adamw, assert_same, backward, bare, network, sgd, train, train_robustly, wrap
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.optim import lr_scheduler as schedulers

from robustgrad import RobustOptimizer

# Copies.


def test_deepcopy_is_independent_and_does_not_step_the_original() -> None:
    model = network()
    optimizer = wrap(adamw(model))
    schedulers.StepLR(optimizer, 1)  # patches `step` on the instance
    train_robustly(model, optimizer)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), optimizer.reweighter.state_dict()))
    train_robustly(twin_model, twin)
    assert_same(before, (model.state_dict(), optimizer.state_dict(), optimizer.reweighter.state_dict()))
    train_robustly(model, optimizer)
    assert_same(model, twin_model)
    assert_same(optimizer.reweighter.state_dict(), twin.reweighter.state_dict())


def test_copies_change_neither_the_class_nor_other_instances() -> None:
    step, model, plain = RobustOptimizer.step, network(), network()
    optimizer = wrap(adamw(model))
    copy.deepcopy(wrap(adamw(network()))), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))
    assert RobustOptimizer.step is step
    train(model, optimizer), train(plain, adamw(plain))
    assert_same(model, plain)


def test_a_shallow_copy_shares_what_it_wraps() -> None:
    optimizer = wrap(adamw(network()))
    twin = copy.copy(optimizer)
    assert twin.optimizer is optimizer.optimizer and twin.reweighter is optimizer.reweighter


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_pickle(write: Callable[..., None]) -> None:
    model = network()
    optimizer = wrap(adamw(model))
    schedulers.StepLR(optimizer, 1)
    train_robustly(model, optimizer)
    file = io.BytesIO()
    write((model, optimizer), file)
    file.seek(0)
    twin_model, twin = pickle.load(file) if write is pickle.dump else torch.load(file, weights_only=False)
    train_robustly(model, optimizer), train_robustly(twin_model, twin)
    assert_same(model, twin_model)
    twin.register_step_pre_hook(lambda *_: None)


# Checkpoints.


def test_state_dict_is_the_inner_one_and_loads_with_weights_only() -> None:
    model = network()
    optimizer = wrap(adamw(model))
    train_robustly(model, optimizer)
    assert_same(optimizer.state_dict(), optimizer.optimizer.state_dict())
    state = {"optimizer": optimizer.state_dict(), "robust": optimizer.reweighter.state_dict()}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), state)


@pytest.mark.parametrize(("save", "load"), [(wrap, bare), (bare, wrap), (wrap, wrap)],
                         ids=["out of the wrapper", "into the wrapper", "both"])  # fmt: skip
def test_checkpoints_go_in_and_out_of_the_bare_optimizer(save: Dress, load: Dress) -> None:
    model = network()
    optimizer = save(sgd(model))
    train(model, optimizer)
    twin = copy.deepcopy(model)
    other = load(sgd(twin, lr=9.0, momentum=0.1))
    other.load_state_dict(state_dict=copy.deepcopy(optimizer.state_dict()))  # torch's own loading shares tensors
    train(model, optimizer), train(twin, other)
    assert_same(model, twin)


def test_robust_training_resumes_exactly() -> None:
    model = network()
    optimizer = wrap(adamw(model))
    train_robustly(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), optimizer.reweighter.state_dict()))
    twin = network(seed=7)
    fresh = wrap(adamw(twin))
    for part, state in zip((twin, fresh, fresh.reweighter), saved, strict=True):
        part.load_state_dict(state)
    train_robustly(model, optimizer, seed=9), train_robustly(twin, fresh, seed=9)
    assert_same(model, twin)


# torch.distributed.checkpoint and FSDP2.


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}])
@pytest.mark.parametrize(("save", "load"), [(wrap, wrap), (wrap, bare), (bare, wrap)])
def test_distributed_checkpoint_helpers(save: Dress, load: Dress, options: dict[str, bool]) -> None:
    model, how = network(), checkpoint.StateDictOptions(**options)
    optimizer = save(adamw(model))
    train(model, optimizer)
    saved = copy.deepcopy(checkpoint.get_optimizer_state_dict(model, optimizer, options=how))
    twin = copy.deepcopy(model)
    fresh = load(adamw(twin))
    checkpoint.set_optimizer_state_dict(twin, fresh, saved, options=how)
    assert_same(model, twin)
    train(model, optimizer), train(twin, fresh)
    assert_same(model, twin)


@pytest.mark.parametrize("make", [adamw, sgd])
def test_the_zero_gradient_step_of_distributed_checkpoints_disturbs_nothing(make: Dress) -> None:
    """They step once with zero gradients, so that there is a state to fill."""
    model = network()
    optimizer = wrap(make(model))
    train_robustly(network(), optimizer)  # the memory fills, while the optimizer's own state stays empty
    before = copy.deepcopy((model, optimizer.reweighter.state_dict()))
    checkpoint.get_optimizer_state_dict(model, optimizer)
    assert optimizer.state
    assert_same(before[0], model)
    assert_same(before[1], optimizer.reweighter.state_dict())


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded() -> nn.Module:
    mesh, model = dist.device_mesh.init_device_mesh("cpu", (1,)), network()
    fsdp.fully_shard(model[0], mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() for p in model.parameters()]


needs_fsdp2 = pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="fully_shard is in torch 2.6 and later")


@needs_fsdp2
def test_sharded_training_resumes_as_with_the_bare_optimizer(one_rank: None) -> None:
    def run(dress: Dress) -> list[Tensor]:
        model = sharded()
        optimizer = dress(adamw(model))
        train(model, optimizer)
        saved = copy.deepcopy(checkpoint.get_state_dict(model, optimizer))
        resumed = sharded()
        optimizer = dress(adamw(resumed))
        checkpoint.set_state_dict(resumed, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
        train(resumed, optimizer)
        return whole(resumed)

    assert_same(run(bare), run(wrap))


@needs_fsdp2
def test_sharded_robust_training_is_that_of_the_whole_model(one_rank: None) -> None:
    model, parts = network(), sharded()
    train_robustly(model, wrap(adamw(model))), train_robustly(parts, wrap(adamw(parts)))
    torch.testing.assert_close(whole(parts), list(model.parameters()))


# Tools that rearrange parameters.


def test_zero_steps_one_group_at_a_time() -> None:
    """ZeRO-1 and 2: `param_groups` is assigned, and `step` called, once per group."""

    def run(zero: bool) -> nn.Module:
        model = network()
        optimizer = wrap(torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=0.1))
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, seed)
            groups = optimizer.param_groups
            for part in [[group] for group in groups] if zero else [groups]:
                optimizer.param_groups = part
                optimizer.step()
            optimizer.param_groups = groups
        return model

    assert_same(run(zero=True), run(zero=False))


def test_parameters_in_the_groups_can_be_replaced() -> None:
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


# Accelerate.


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")

    def forget() -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    forget()  # A trainer of another test may have left a loader at its end, where every call is a step.
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    forget()


def accelerated(accelerator: Any, model: nn.Module, optimizer: Any, scheduler: Any, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for _ in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(8, 3)).square().mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def test_accelerate_prepare_with_a_scheduler(accelerator: Any) -> None:
    def run(dress: Dress) -> tuple[nn.Module, float]:
        model = network()
        optimizer = dress(sgd(model))
        parts = accelerator.prepare(model, optimizer, schedulers.StepLR(optimizer, 1, gamma=0.5))
        accelerated(accelerator, *parts)
        return parts[0], optimizer.param_groups[0]["lr"]

    (plain, wanted), (wrapped, rate) = run(bare), run(wrap)
    assert rate == wanted == 0.1 / 16
    assert_same(plain, wrapped)


def test_accelerate_saves_and_restores_both_states(accelerator: Any, tmp_path: Path) -> None:
    model = network()
    optimizer = wrap(sgd(model))
    prepared = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(optimizer.reweighter)
    train_robustly(prepared[0], optimizer)
    accelerator.save_state(tmp_path)
    train_robustly(prepared[0], optimizer)
    wanted = copy.deepcopy(prepared[0])
    train_robustly(prepared[0], optimizer)
    accelerator.load_state(tmp_path)
    train_robustly(prepared[0], optimizer)
    assert_same(wanted, prepared[0])


def test_what_accelerate_prepared_can_be_wrapped(accelerator: Any) -> None:
    model, plain = network(), network()
    optimizer = wrap(accelerator.prepare(sgd(model)))
    train(model, optimizer), train(plain, sgd(plain))
    assert_same(model, plain)
    assert_same(optimizer.state_dict(), optimizer.optimizer.optimizer.state_dict())
