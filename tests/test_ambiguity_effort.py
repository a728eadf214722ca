"""What the solvers do to come to an answer: how often they look at a row, where they sort, what a kernel is told."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustgrad.ambiguity import (
    KL,
    AmbiguitySet,
    ChiSquare,
    CVaR,
    TotalVariation,
    _elimination,
    _kernel,
    _one_row,
    _sorted,
    _tilting,
)
from robustgrad.ambiguity._linear import Limit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """The length of the rows in the first argument of each call."""
    lengths, function = [], getattr(module, name)

    def call(first: Any, *others: Any, **options: Any) -> Any:
        lengths.append(first.shape[-1])
        return function(first, *others, **options)

    monkeypatch.setattr(module, name, call)
    return lengths


each_base = pytest.mark.parametrize("power", [0, 2], ids=["uniform", "weighted"])
each_limit = pytest.mark.parametrize(
    "ambiguity", [ChiSquare(0.01), ChiSquare(0.5), ChiSquare(3.0), ChiSquare(penalty=0.5)], ids=str
)


@each_base
@each_limit
@pytest.mark.parametrize("n", [64, _elimination._SEVERAL])
def test_an_ordinary_row_is_not_sorted(
    ambiguity: ChiSquare, n: int, power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, sorts = counted(monkeypatch, np, "greater"), counted(monkeypatch, _elimination, "scan")
    ambiguity.solve(normal(n), base=normal(n, seed=3).abs() ** power)
    assert 0 < len(looks) < 11 and not sorts


def test_many_short_rows_are_sorted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, sorts = counted(monkeypatch, np, "greater"), counted(monkeypatch, _elimination, "scan")
    ChiSquare(0.5).solve(normal(70, 64))
    assert sorts == [64] and not looks


@each_base
def test_a_sample_saves_looks_at_a_long_row(power: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at, all looks together, is a part of the row."""
    looks, n = counted(monkeypatch, np, "greater"), _elimination.LONG
    drop = (normal(n) - normal(n).max()).numpy()
    base = None if power == 0 else (normal(n, seed=3).square() / normal(n, seed=3).square().sum()).numpy()
    needed = []
    for length in (n, n + 1):
        monkeypatch.setattr(_elimination, "LONG", length)
        looks.clear()
        _elimination.line_of_row(drop, base, Limit(3.0))
        needed.append(sum(looks))
    assert needed[0] < needed[1]


@pytest.mark.parametrize("radius", [1e-6, 1e-3, 0.1, 1.0])
def test_an_ordinary_tilt_takes_few_steps(radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of_tilting(monkeypatch)
    KL(radius).solve(100 * normal(500))
    assert len(steps) <= 4


@pytest.mark.parametrize(("n", "narrowing"), [(64, 2), (_tilting._GRID_SIZE, 10)])
def test_a_tilt_without_a_look_takes_a_fixed_number(n: int, narrowing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bracket 2^10 times narrower, 31 points at once or one."""
    for module in (_one_row, _tilting):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    steps = steps_of_tilting(monkeypatch)
    KL(0.3).solve(normal(n))
    assert len(steps) == narrowing + _tilting._NEWTON_STEPS


def test_many_rows_with_a_look_are_not_narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of_tilting(monkeypatch)
    KL(0.3).solve(normal(4, _tilting._GRID_SIZE))
    assert len(steps) <= 7


def steps_of_tilting(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    steps, at = [], _tilting.Curve.at

    def step(curve: Any, theta: Any) -> Any:
        steps.append(theta)
        return at(curve, theta)

    monkeypatch.setattr(_tilting.Curve, "at", step)
    return steps


PLAIN = [TotalVariation(0.0), ChiSquare(0.0), KL(0.0), CVaR(1.0)]
ROBUST = [
    TotalVariation(0.1),
    TotalVariation(0.1, cap=2.0),
    TotalVariation(penalty=0.5),
    ChiSquare(0.1),
    ChiSquare(penalty=0.5),
    KL(0.1),
    KL(temperature=0.5),
    CVaR(0.5),
]


@pytest.mark.parametrize("ambiguity", PLAIN + ROBUST, ids=str)
def test_a_kernel_is_handed_the_set(ambiguity: AmbiguitySet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: where a kernel takes the losses it gets the recipe, "plain" for plain averaging alone."""
    handed = []

    def solve(recipe: _kernel.Recipe, losses: Tensor, base: Tensor | None, mask: Tensor | None) -> Tensor:
        handed.append(recipe)
        return torch.ones_like(losses)

    monkeypatch.setattr(_kernel, "solves", lambda losses: True)
    monkeypatch.setattr(_kernel, "takes", lambda recipe, losses: True)
    monkeypatch.setattr(_kernel, "solve", solve)
    assert ambiguity.solve(normal(9)).ratio.tolist() == [1.0] * 9
    assert [recipe[0] == "plain" for recipe in handed] == [ambiguity in PLAIN]


@pytest.mark.parametrize("ambiguity", ROBUST, ids=str)
def test_a_fitted_rule_cannot_be_changed(ambiguity: AmbiguitySet) -> None:
    one = torch.ones((), dtype=torch.float64)
    rule = ambiguity.fit(normal(64), torch.ones(64, dtype=torch.float64), unit=one, step_size=one)
    with pytest.raises(FrozenInstanceError):
        rule.top = one  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [3, 1, 2, 64, 100])
def test_a_deterministic_cumulative_sum(n: int) -> None:
    torch.testing.assert_close(_sorted.doubling_cumsum(normal(3, n)), normal(3, n).cumsum(-1))
