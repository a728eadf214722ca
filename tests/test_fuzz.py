"""Random problems against a bound from above: a few thousand here, a million with `make fuzz`."""

from __future__ import annotations

from dataclasses import replace

import fuzz
import oracle
import pytest
import torch
from torch import Tensor

from robustgrad.ambiguity import AmbiguitySet, ChiSquare, WorstCase


@pytest.mark.parametrize("number", range(60))
def test_no_violation(number: int) -> None:
    given = fuzz.block(1, number)
    assert list(fuzz.failures(given, fuzz.suspects(given))) == []


def blocks_under_balls() -> list[fuzz.Block]:
    """In float64, where an error of 1e-4 is far above rounding; under a price it costs only its square."""
    drawn = (fuzz.block(2, number) for number in range(200))
    return [x for x in drawn if x.losses.dtype == torch.float64 and not oracle.price_of(x.ambiguity)][:12]


def perturbed(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Solutions that move `error` of the mass from the largest loss to all."""
    exact = AmbiguitySet.solve

    def wrong(self: AmbiguitySet, losses: Tensor, **arguments: Tensor | None) -> WorstCase:
        worst = exact(self, losses, **arguments)
        ratio = (1 - error) * worst.wide_ratio + error
        return replace(worst, wide_ratio=worst.problem.finish(ratio))

    monkeypatch.setattr(AmbiguitySet, "solve", wrong)


def test_a_slightly_timid_adversary_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio that is feasible, ordered and sums to one, but 1e-4 short of the worst case."""
    perturbed(monkeypatch, 1e-4)
    for given in blocks_under_balls():
        worst = given.ambiguity.solve(given.losses, base=given.base, mask=given.mask)
        robust = (worst.max_ratio > 1.1).nonzero().flatten().tolist()
        assert set(robust) <= set(fuzz.suspects(given)), given.ambiguity


def test_a_violation_is_printed_as_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = torch.tensor([[0.1, 0.7, 0.4]], dtype=torch.float64)
    given = fuzz.Block(ChiSquare(0.1), losses, None, torch.tensor([[True, True, False]]))
    perturbed(monkeypatch, 1e-3)
    (text,) = fuzz.failures(given, fuzz.suspects(given))
    names: dict[str, object] = {}
    exec("import comparing, laws, torch\nfrom inputs import *\n" + text, names)
    with pytest.raises(AssertionError):
        names["test_found_by_fuzzing"]()
    monkeypatch.undo()
    names["test_found_by_fuzzing"]()
