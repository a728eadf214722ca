"""Several gloo processes follow the gradient of one, however their samples are spread."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import rank_scenarios as scenarios
import torch
from torch import Tensor

from robustgrad import ChiSquare, Reweighter

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")
close = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def cuts(request: pytest.FixtureRequest) -> tuple[int, list[dict[tuple[Any, ...], Any]]]:
    found = scenarios.start("cuts", request.param)
    for out in found:
        if isinstance(out, Exception):
            raise out
    return request.param, found


@pytest.mark.parametrize("ambiguity", scenarios.SETS, ids=repr)
@pytest.mark.parametrize(("pool", "micro"), [("memory", 100), ("memory", 1), ("window", 2), ("batch", 100)])
def test_any_spread_trains_to_the_parameters_of_one_process(cuts, ambiguity, pool: str, micro: int) -> None:
    world, found = cuts
    expected = scenarios.alone(ambiguity, pool)
    for split in scenarios.SPLITS[world]:
        for out in found:
            torch.testing.assert_close(out[repr(ambiguity), split, pool, micro], expected, **close)


@pytest.mark.parametrize("pool", ["memory", "window", "batch"])
def test_ranks_that_average_their_own(cuts, pool: str) -> None:
    """DDP after a mean over unequal ranks gives a sample 1 / (ranks * n of its rank): that is the base."""
    world, found = cuts
    for split in [split for split in scenarios.SPLITS[world] if all(split)]:
        base = torch.cat([torch.full((n,), 1 / n) for n in split])
        expected = scenarios.alone(ChiSquare(0.5), pool, base=base)
        for out in found:
            torch.testing.assert_close(out["average", split, pool], expected, **close)


@pytest.mark.parametrize("pool", ["memory", "window", "batch"])
def test_ratios_without_a_hook(cuts, pool: str) -> None:
    world, found = cuts
    expected = scenarios.ratios(ChiSquare(0.5), pool, (8,), 0)
    for split in scenarios.SPLITS[world]:
        together = torch.cat([out["ratio", split, pool] for out in found], dim=1)
        torch.testing.assert_close(together, expected, **close)


def test_every_rank_remembers_the_same(cuts) -> None:
    _, found = cuts
    for key in found[0]:
        if "state" in key:
            for out in found[1:]:
                assert_equal(out[key], found[0][key])


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize("name", ["ddp memory", "ddp window", "fsdp memory", "fsdp window"])
def test_wrapped_models(name: str, wrapped: list[dict[str, Tensor]]) -> None:
    expected = scenarios.alone(ChiSquare(0.5), name.split()[1])
    for out in wrapped:
        torch.testing.assert_close(out[name], expected, **close)


@pytest.fixture(scope="module")
def wrapped() -> list[dict[str, Tensor]]:
    return results("wrapped_models", 2)


def results(scenario: str, world: int, **arguments: Any) -> list[Any]:
    found = scenarios.start(scenario, world, **arguments)
    for out in found:
        if isinstance(out, Exception):
            raise out
    return found


def test_groups_and_meshes() -> None:
    found = results("mesh_and_group", 4)
    for rank, out in enumerate(found):
        # Ranks 0 and 2 are one data-parallel group, 1 and 3 the other: the larger losses are on 2 and 3.
        upper = torch.tensor([0.0, 0.0, 4.0, 4.0]) if rank >= 2 else torch.zeros(4)
        for name in ("mesh", "one dimension", "group"):
            torch.testing.assert_close(out[name], upper)
        torch.testing.assert_close(out["world"], torch.full((4,), 4.0 if rank == 3 else 0.0))
        assert "2 dimensions" in out["unnamed"] and "ProcessGroup or DeviceMesh, got str 'dp'" in out["text"]


def test_without_marks_the_ranks_stay_equal() -> None:
    first, second = results("unmarked", 2)
    assert_equal(first["state"], second["state"])
    assert first["metrics"] == second["metrics"] and not first["metrics"]["plain"]


def test_a_rank_that_misses_a_call_ends_in_a_time_out() -> None:
    found = scenarios.start("missed_call", 2, timeout=3)
    assert isinstance(found[0], RuntimeError) and "a rank that did not come" in str(found[0])


@pytest.mark.parametrize("pool", ["memory", "batch"])
def test_nan_on_one_rank_stops_all(pool: str) -> None:
    found = scenarios.start("nan_on_one_rank", 2, pool=pool)
    assert all(isinstance(error, FloatingPointError) for error in found)
    assert "on another rank" in str(found[0]) and "[1] of 2" in str(found[1])


def test_groups_on_one_rank_only_are_an_error_on_all() -> None:
    found = scenarios.start("groups_on_one_rank", 2)
    assert [str(error) for error in found] == [str(found[0])] * 2
    assert "1 of 2 ranks with groups" in str(found[0])


def test_groups_across_ranks_and_large_ids() -> None:
    first, second = results("groups_across_ranks", 2)
    # Group means: 2 for the shared one, 5 and 2 for the two large ids, which differ in their last bit.
    torch.testing.assert_close(first, torch.tensor([4 / 12 * 2, 2.0]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second, torch.tensor([2 / 3, 2 / 3]), rtol=1e-6, atol=1e-6)


def test_copies_without_a_group() -> None:
    reweighter = Reweighter(ChiSquare(0.5))
    for copied in (copy.deepcopy(reweighter), pickle.loads(pickle.dumps(reweighter))):
        assert repr(copied) == repr(reweighter)
