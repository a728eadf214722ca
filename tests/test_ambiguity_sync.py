"""What the solve must never do on an accelerator: make the host wait, or branch on values."""

from __future__ import annotations

from typing import Any

import comparing
import inputs
import pytest
import torch
from inputs import Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from robustgrad.ambiguity import AmbiguitySet

each_set = pytest.mark.parametrize("ambiguity", inputs.SETS, ids=str)
each_third_set = pytest.mark.parametrize("ambiguity", inputs.SETS[::3], ids=str)


class NoSync(TorchDispatchMode):
    """Refuses every operation whose result the host would have to wait for."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITS or (name == "index" and any(_is_mask(index) for index in args[1])):
            raise RuntimeError(f"{name} would make the host wait for the device")
        return func(*args, **(kwargs or {}))


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def test_the_guard_can_fail() -> None:
    x = torch.tensor([0.1, 0.7, 0.4])
    for wait in (lambda: bool(x.sum() > 0), lambda: x.max().item(), lambda: x[x > 0.2], lambda: x.nonzero()):
        with pytest.raises(RuntimeError, match="would make the host wait"), NoSync():
            wait()


def read_everything(ambiguity: AmbiguitySet, losses: Tensor, **keywords: Tensor) -> list[Tensor]:
    worst = ambiguity.solve(losses, **keywords)
    return [getattr(worst, name) for name in comparing.FIELDS]


@each_set
def test_no_host_sync(ambiguity: AmbiguitySet) -> None:
    losses, mask = torch.randn(4, 8), torch.rand(4, 8) < 0.7
    with NoSync():
        read_everything(ambiguity, losses)
        read_everything(ambiguity, losses, mask=mask)


@each_set
def test_no_branch_on_values(ambiguity: AmbiguitySet) -> None:
    """Meta tensors have no values: whatever would read one raises."""
    losses, base = torch.empty(4, 8, device="meta"), torch.empty(8, device="meta")
    mask = torch.empty(4, 8, dtype=torch.bool, device="meta")
    for keywords in ({}, {"base": base, "mask": mask}):
        assert all(field.device.type == "meta" for field in read_everything(ambiguity, losses, **keywords))


@each_third_set
def test_traces_as_one_graph(ambiguity: AmbiguitySet) -> None:
    torch._dynamo.reset()
    traced = torch.compile(read_everything, fullgraph=True, backend="eager")
    losses, base = torch.randn(3, 7), torch.rand(7) + 0.1
    for got, want in zip(
        traced(ambiguity, losses, base=base), read_everything(ambiguity, losses, base=base), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@each_set
def test_cuda_is_the_cpu_without_a_sync(ambiguity: AmbiguitySet) -> None:
    for case in inputs.FINITE + inputs.MINUS_INF + inputs.POISONED:
        moved = _to_cuda(case)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            worst = comparing.alone(ambiguity, moved)
            ratio = worst.ratio
        finally:
            torch.cuda.set_sync_debug_mode(before)
        comparing.close(ratio.cpu(), comparing.alone(ambiguity, case).ratio, (ambiguity, case))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@each_set
def test_cuda_solves_in_deterministic_mode(ambiguity: AmbiguitySet) -> None:
    losses, base = torch.randn(3, 600).cuda(), torch.rand(600).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        results = [read_everything(ambiguity, losses, base=base) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True)), ambiguity


def _to_cuda(case: Case) -> Case:
    base, mask = (None if x is None else x.cuda() for x in (case.base, case.mask))
    return Case(case.name, case.losses.cuda(), base, mask)
