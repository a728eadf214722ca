"""The memory pool by its kernels, in Triton's interpreter on the CPU, beside the torch path: run by `test_kernel.py`.

The process must have TRITON_INTERPRET=1 and ROBUSTGRAD_KERNEL=triton from the start.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_ambiguity_sync import NoSync
from test_memory import SETS, ratios, stream
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, TotalVariation
from robustgrad.samples import Samples

# The interpreter computes with numpy, which warns of divisions by a zero whose result is not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
each_set = pytest.mark.parametrize("ambiguity", [*SETS, TotalVariation(0.0), KL(0.0)], ids=repr)
TYPICAL = [TotalVariation(0.2), ChiSquare(0.5), KL(0.3), CVaR(0.3)]
each_typical = pytest.mark.parametrize("ambiguity", TYPICAL, ids=repr)


def twins(ambiguity: AmbiguitySet, **options: Any) -> tuple[Reweighter, Reweighter]:
    """By kernels, and by torch."""
    quick, slow = Reweighter(ambiguity, **options), Reweighter(ambiguity, **options)
    slow._pool.quick_ratio = slow._pool._kept_by_kernel = lambda *arguments: None  # type: ignore[method-assign]
    quick.expects_steps = slow.expects_steps = True
    return quick, slow


def by_kernel(reweighter: Reweighter) -> bool:
    memory = reweighter._pool._memory
    return memory is not None and memory.numbers is not None


def assert_same(quick: Any, slow: Any, tolerance: float) -> None:
    for found, want in zip(tree_leaves(quick), tree_leaves(slow), strict=True):
        if isinstance(want, Tensor):
            torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert found == want


def assert_twins(quick: Reweighter, slow: Reweighter) -> None:
    assert by_kernel(quick) and not by_kernel(slow)
    assert_same(quick.state_dict(), slow.state_dict(), 1e-9)
    assert_same(quick.metrics(), slow.metrics(), 2e-6)


def hostile(losses: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Now and then ties, a loss that is not finite, a base, a mask, scores."""
    n, losses = len(losses), losses.clone()
    losses[n // 2 :: 5] = losses[n // 2]
    if step % 2:
        losses[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(losses)[:n]
    given = {}
    if step % 3 == 1:
        given["base"] = torch.linspace(0, 2, n) + (n == 1)
    if step % 4 >= 2:
        given["mask"] = torch.arange(n) % 4 != 1
    if step % 5 == 3 and n < 64:
        given["scores"] = 3 - 2 * losses.nan_to_num(0.0)
    return losses, given


@each_set
def test_same_ratio_and_state(ambiguity: AmbiguitySet) -> None:
    """While the memory fills and when it is full, in calls of any size."""
    quick, slow = twins(ambiguity, memory=100)
    for step, losses in enumerate(stream(6, 50)):
        for part in losses.split((9, 1, 40)):
            part, given = hostile(part, step)
            assert_same(ratios(quick, part, **given), ratios(slow, part, **given), 2e-6)
        quick.step(), slow.step()
    assert_twins(quick, slow)


@each_typical
def test_calls_that_are_solved_on_themselves(ambiguity: AmbiguitySet) -> None:
    quick, slow = twins(ambiguity)
    equal, different = torch.full((70,), 2.0, dtype=torch.float64), stream(4, 70)
    for step, losses in enumerate((equal, equal, *different)):  # equal ones fill the memory and say nothing
        losses, given = hostile(losses, 2 * (step > 2))
        assert_same(ratios(quick, losses, **given), ratios(slow, losses, **given), 2e-6)
        quick.step(), slow.step()
    assert_twins(quick, slow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    quick, slow = twins(KL(0.3))
    for losses in stream(5, 40, dtype=dtype):
        found, want = quick.ratio(losses), slow.ratio(losses)
        assert found.dtype == want.dtype == torch.float32
        assert_same(found, want, 2e-6)
        quick.step(), slow.step()
    assert_twins(quick, slow)


@each_typical
def test_gradients(ambiguity: AmbiguitySet) -> None:
    gradients = []
    for reweighter in twins(ambiguity, memory=64):
        for losses in stream(5, 32):
            leaf = losses.clone().requires_grad_()
            reweighter(leaf, mask=torch.arange(32) > 1).sum().backward()
            reweighter.step()
        gradients.append(leaf.grad)
    assert_same(*gradients, 2e-6)
    assert (gradients[0][:2] == 0).all()


@pytest.mark.parametrize("ended", [False, True], ids=["within a step", "after a step"])
@each_typical
def test_a_checkpoint_goes_from_one_path_to_the_other_and_does_not_move_on(
    ambiguity: AmbiguitySet, ended: bool
) -> None:
    """And resumes to the bit on the same one."""
    quick, slow = twins(ambiguity, memory=64)
    data = stream(12, 32)
    for losses in data[:5]:
        quick.ratio(losses)
        quick.step()
    quick.ratio(data[5][:7])
    if ended:
        quick.step()
    state = quick.state_dict()
    kept = copy.deepcopy(state)
    slow.load_state_dict(state)
    resumed, _ = twins(ambiguity, memory=64)
    resumed.load_state_dict(state)
    for losses in data[6:]:
        losses[0] = torch.nan
        found = quick.ratio(losses)
        assert_same(found, slow.ratio(losses), 2e-6)
        assert_same(resumed.ratio(losses), found, 0.0)
        quick.step(), slow.step(), resumed.step()
    assert_same(state, kept, 0.0)
    assert_twins(quick, slow)
    assert_twins(copy.deepcopy(resumed), slow)


def test_what_the_kernels_do_not_take_is_left_to_torch() -> None:
    for options, given in (
        ({}, {"groups": torch.arange(32) % 5}),
        ({"on_nonfinite": "raise"}, {}),
    ):
        quick, _ = twins(CVaR(0.3), **options)
        with Tape() as tape:
            for losses in stream(4, 32):
                ratios(quick, losses, **given)
                quick.step()
        assert "meet_memory" not in tape.names


def test_a_call_that_torch_takes_goes_into_the_same_step() -> None:
    quick, slow = twins(ChiSquare(0.5), memory=64)
    ids = torch.arange(32).reshape(8, 4)
    for losses in stream(6, 64):
        for reweighter in (quick, slow):
            reweighter.ratio(losses[:8])
            reweighter.ratio(losses[:32].reshape(8, 4), units=ids)
        assert_same(quick.ratio(losses[32:50]), slow.ratio(losses[32:50]), 2e-6)
        quick.step(), slow.step()
    assert_twins(quick, slow)


class TwoRanks:
    """The other rank sees the same losses."""

    group = object()

    def gather(self, samples: Samples) -> tuple[Samples, slice]:
        return Samples.join([samples, samples]), slice(len(samples.scores))


def test_losses_of_other_ranks_enter_the_memory() -> None:
    quick, slow = twins(CVaR(0.3), memory=100)
    quick._pool.ranks = slow._pool.ranks = TwoRanks()
    for step, losses in enumerate(stream(6, 32)):
        for part in losses.split(16):
            part, given = hostile(part, step)
            assert_same(ratios(quick, part, **given), ratios(slow, part, **given), 2e-6)
        quick.step(), slow.step()
    assert_twins(quick, slow)


def test_a_step_longer_than_the_kernel_takes() -> None:
    quick, slow = twins(ChiSquare(0.5), memory=64)
    for size in (64, 8200, 32, 32):
        losses = stream(1, size, size)[0]
        assert_same(quick.ratio(losses), slow.ratio(losses), 2e-6)
        quick.step(), slow.step()
    assert_twins(quick, slow)


class Tape(TorchDispatchMode):
    """What was launched, in order, and again on demand: what a CUDA graph is, for tensors on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.launches.append((func, args, kwargs or {}, result))
        return result

    @property
    def names(self) -> list[str]:
        return [func.overloadpacket.__name__ for func, *_ in self.launches]

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.launches:
            again = func(*args, **kwargs)
            if isinstance(result, Tensor) and again is not result:
                result.copy_(again)


@each_typical
def test_launches(ambiguity: AmbiguitySet) -> None:
    """One a call; one more in the first call of a step, one more for calls that may be solved on themselves."""
    quick, _ = twins(ambiguity, memory=128)
    data = stream(8, 128)
    for losses in data[:6]:
        quick.ratio(losses)
        quick.step()
    with Tape() as first, NoSync():
        quick(data[6][:8].requires_grad_())
    with Tape() as second, NoSync():
        quick(data[7][:8].requires_grad_())
    with Tape() as third, NoSync():
        quick(data[7][:100].requires_grad_())
    assert first.names == ["learn_memory", "meet_memory"]
    assert second.names == ["meet_memory"]
    assert third.names == ["worst_ratio", "meet_memory"]


@each_typical
def test_a_replayed_training_step_goes_on(ambiguity: AmbiguitySet) -> None:
    """The memory, the units and the rule advance with each replay, as they would without a graph."""
    recorded, plain = twins(ambiguity, memory=64)
    batches = torch.randn(14, 2, 8, 3, generator=torch.Generator().manual_seed(0))
    w, v, place = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True), torch.empty(2, 8, 3)

    def step(reweighter: Reweighter, w: Tensor, x: Tensor) -> None:
        for part in x:
            (reweighter(torch.nn.functional.softplus(part[:, 0] - part @ w)).sum() / 16).backward()
        with torch.no_grad():
            w.sub_(w.grad, alpha=0.5)
            w.grad.zero_()
        reweighter.step()

    for x in batches[:8]:
        place.copy_(x)
        step(recorded, w, place), step(plain, v, x)
    place.copy_(batches[8])
    with Tape() as tape:
        step(recorded, w, place)
    step(plain, v, batches[8])
    for x in batches[9:]:
        place.copy_(x)
        tape.replay()
        step(plain, v, x)
        assert_same(w.detach(), v.detach(), 1e-6)
    assert_twins(recorded, plain)
