"""Kernels that do not run: torch takes over, family by family. In Triton's interpreter: run by `test_kernel.py`.

The process must have TRITON_INTERPRET=1 and ROBUSTGRAD_KERNEL=triton from the start.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_parity import by_torch
from memory_kernel_parity import Tape, assert_same, by_kernel, twins
from test_memory import stream
from torch import Tensor

from robustgrad import KL, ChiSquare, CVaR
from robustgrad.ambiguity import _kernel
from robustgrad.ambiguity._triton import launch_long_rows, launch_memory, launch_rows

# The interpreter computes with numpy, which warns of divisions by a zero whose result is not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHORT, LONG = torch.linspace(0, 1, 9), torch.linspace(0, 1, 4100)


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is Triton insisted on, which raises instead."""
    monkeypatch.setattr(_kernel, "_runs", {})
    monkeypatch.setattr(_kernel, "_NAME", None)
    monkeypatch.setattr(launch_long_rows, "_TILE", 2**12)


def fail(*arguments: Any) -> Tensor:
    raise RuntimeError("no such instruction")


def launches(losses: Tensor) -> int:
    """How many solves of CVaR a kernel took, of one; the answer is checked."""
    with Tape() as tape:
        ratio = CVaR(0.5).solve(losses).ratio
    torch.testing.assert_close(ratio.double(), by_torch(CVaR(0.5), losses, None, None), rtol=2e-6, atol=2e-6)
    return tape.names.count("worst_ratio")


@pytest.mark.parametrize(
    ("module", "broken", "sound", "family"),
    [(launch_rows, SHORT, LONG, "rows, top"), (launch_long_rows, LONG, SHORT, "long rows, top")],
    ids=["short rows", "long rows"],
)
def test_rows_that_fail_are_left_to_torch_and_the_others_run(
    module: Any, broken: Tensor, sound: Tensor, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "launch", fail)
    said = rf"kernel \({family}\) does not run on cpu.*no such instruction.*ROBUSTGRAD_KERNEL=torch"
    with pytest.warns(UserWarning, match=said):
        CVaR(0.5).solve(broken)
    assert launches(broken) == 0  # and says so once
    assert launches(sound) == 1


@pytest.mark.parametrize("broken", ["learn", "meet"])
def test_a_memory_whose_kernels_fail_is_left_to_torch(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = twins(ChiSquare(0.5), memory=64)
    monkeypatch.setattr(launch_memory, broken, Broken())
    with pytest.warns(UserWarning, match=r"kernel \(memory, ball\) does not run on cpu") as said:
        for losses in stream(6, 32):
            assert_same(quick.ratio(losses), slow.ratio(losses), 2e-6)
            quick.step(), slow.step()
    assert [one.category for one in said if one.category is not RuntimeWarning] == [UserWarning]
    assert not by_kernel(quick)
    assert_same(quick.state_dict(), slow.state_dict(), 1e-9)
    assert launches(SHORT) == launches(LONG) == 1


class Broken:
    """A kernel that cannot be compiled."""

    def __getitem__(self, grid: Any) -> Any:
        return fail


def test_who_insists_on_triton_sees_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernel, "_NAME", "triton")
    monkeypatch.setattr(launch_long_rows, "launch", fail)
    with pytest.raises(RuntimeError, match="no such instruction"):
        CVaR(0.5).solve(LONG)
    assert launches(SHORT) == 1


def test_too_little_memory_says_nothing_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("16 GiB")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(launch_rows, "launch", no_room)
        CVaR(0.5).solve(SHORT)
    assert launches(SHORT) == 1


def test_no_losses_try_nothing() -> None:
    assert CVaR(0.5).solve(SHORT[None][:0]).ratio.shape == (0, 9)
    assert _kernel._runs == {}


def test_nothing_is_tried_while_torch_traces() -> None:
    """A trace takes what has run before: a failure in it could not be mended."""
    traced: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        traced.append("worst_ratio" in graph.code)
        return graph

    def by_trace() -> Tensor:
        torch._dynamo.reset()
        return torch.compile(lambda losses: KL(0.3).solve(losses).ratio, fullgraph=True, backend=backend)(SHORT)

    untried = by_trace()
    assert _kernel._runs == {}
    want = KL(0.3).solve(SHORT).ratio
    for found in (untried, by_trace()):
        torch.testing.assert_close(found, want, rtol=2e-6, atol=2e-6)
    assert traced == [False, True]


def test_very_many_long_rows_fit_into_a_grid() -> None:
    many = torch.empty(70_000, 4097, device="meta")
    grid = launch_long_rows._Passes(many, None, None, "top", len(many), 2).grid(both=True)
    assert grid[0] == 70_000
    assert max(grid[1:]) < 2**16
