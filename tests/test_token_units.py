"""Losses by token: what shares a ratio is a token, a span or a sequence, and the multiplier law holds for each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, TotalVariation

SETS = [TotalVariation(0.2), ChiSquare(0.5), KL(0.3), CVaR(0.3)]
each_set = pytest.mark.parametrize("ambiguity", SETS, ids=repr)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1, 6])[:, None]
    return torch.where(mask, losses, torch.nan), mask


def ratio(ambiguity: AmbiguitySet, losses: Tensor, **arguments: object) -> Tensor:
    leaf = losses.clone().requires_grad_()
    Reweighter(ambiguity, pool="batch")(leaf, **arguments).sum().backward()
    return leaf.grad


def naive(ambiguity: AmbiguitySet, losses: Tensor, base: Tensor, units: list[list[tuple[int, int]]]) -> Tensor:
    """Ratio of each token from a loop over the units."""
    mass = [sum(base[token].item() for token in unit) for unit in units]
    mean = [sum((base * losses)[token].item() for token in unit) / m for unit, m in zip(units, mass, strict=True)]
    solved = ambiguity.solve(torch.tensor(mean, dtype=torch.float64), base=torch.tensor(mass, dtype=torch.float64))
    out = torch.zeros_like(losses)
    for unit, r in zip(units, solved.ratio.tolist(), strict=True):
        for token in unit:
            out[token] = r
    return out


def tokens_of(mask: Tensor) -> list[list[tuple[int, int]]]:
    return [[(i, j) for j in range(mask.shape[1]) if mask[i, j]] for i in range(mask.shape[0])]


def bases(mask: Tensor) -> dict[str, Tensor | None]:
    return {"token mean": None, "mean of sequence means": mask / mask.sum(-1, keepdim=True).double()}


@each_set
@pytest.mark.parametrize("loop", ["token mean", "mean of sequence means"])
@pytest.mark.parametrize("units", ["token", "sequence"])
def test_tokens_and_sequences(ambiguity: AmbiguitySet, loop: str, units: str) -> None:
    (losses, mask), base = batch(), bases(batch()[1])[loop]
    by_sequence = tokens_of(mask)
    parts = by_sequence if units == "sequence" else [[token] for row in by_sequence for token in row]
    weight = mask.double() if base is None else base
    expected = naive(ambiguity, losses, weight, parts)
    found = ratio(ambiguity, losses, mask=mask, base=base, units=units)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@each_set
def test_spans(ambiguity: AmbiguitySet) -> None:
    losses, mask = batch()
    ids = torch.arange(5)[:, None] * 10 + torch.arange(7) // 3 - 20  # three spans a row, any integers
    spans: dict[int, list[tuple[int, int]]] = {}
    for row in tokens_of(mask):
        for token in row:
            spans.setdefault(int(ids[token]), []).append(token)
    expected = naive(ambiguity, losses, mask.double(), list(spans.values()))
    found = ratio(ambiguity, losses, mask=mask, units=ids)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@each_set
def test_the_loop_descends_the_worst_case(ambiguity: AmbiguitySet) -> None:
    """Whatever mean the loop takes, with that as base the gradient is sum q_b grad l_b."""
    losses, mask = batch()
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    base = bases(mask)["mean of sequence means"]
    by_token = torch.where(mask, losses, 0.0) * w
    reweighted = Reweighter(ambiguity, pool="batch")(by_token, mask=mask, base=base, units="sequence")
    ((reweighted * mask).sum(-1) / mask.sum(-1)).mean().backward()
    means = torch.where(mask, losses, 0.0).sum(-1) / mask.sum(-1)
    torch.testing.assert_close(w.grad, ambiguity.solve(means).value, rtol=1e-9, atol=0)


def test_scores_and_groups_by_sequence() -> None:
    losses, mask = batch()
    scores, groups = torch.arange(5.0), torch.tensor([0, 1, 0, 1, 2])
    lengths = mask.sum(-1).double()
    solved = ChiSquare(0.5).solve(scores.double(), base=lengths).ratio
    found = ratio(ChiSquare(0.5), losses, mask=mask, scores=scores, units="sequence")
    torch.testing.assert_close(found, solved[:, None] * mask, rtol=1e-6, atol=1e-9)
    by_group = ratio(ChiSquare(0.5), losses, mask=mask, groups=groups, units="sequence")
    assert by_group[0, 0] == by_group[2, 0] and by_group[1, 0] == by_group[3, 0] != by_group[0, 0]


def test_scores_by_token() -> None:
    losses, mask = batch()
    found = ratio(KL(0.3), losses, mask=mask, scores=-losses, units="sequence")
    expected = naive(KL(0.3), -losses, mask.double(), tokens_of(mask))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_sequences_enter_the_memory() -> None:
    reweighter = Reweighter(ChiSquare(0.5))
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        reweighter(torch.rand(8, 5, generator=generator).requires_grad_(), units="sequence")
        reweighter.step()
    assert reweighter.metrics()["pool_size"] == 88 and not reweighter.metrics()["plain"]


def test_nan_token_spoils_its_sequence_only() -> None:
    losses, mask = batch()
    reweighter = Reweighter(KL(0.3))
    losses[0, 2] = torch.nan
    leaf = losses.requires_grad_()
    reweighter(leaf, mask=mask, units="sequence").sum().backward()
    assert leaf.grad[0].isnan().all() and not leaf.grad[1:].isnan().any()
    assert reweighter.metrics()["nonfinite"] == 1


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((4,), {"units": "sequence"}, r"\(b, t\) with units=, got \(4,\)"),
        ((4, 3), {"units": "word"}, "'token', 'sequence' or a tensor.*'word'"),
        ((4, 3), {"units": torch.zeros(4).long()}, r"shape of losses \(4, 3\), got \(4,\)"),
        ((4, 3), {"units": "token", "groups": torch.arange(4)}, "groups must come with units='sequence'"),
        ((4, 3), {"units": "sequence", "groups": torch.arange(3)}, "groups must have the shape"),
        ((4, 3), {"units": "sequence", "mask": torch.ones(4, dtype=torch.bool)}, "mask must have the shape"),
        ((4, 3), {}, "say with units="),
    ],
)
def test_wrong_units(shape: tuple[int, ...], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reweighter(KL(0.1))(torch.rand(shape, requires_grad=True), **arguments)


def test_units_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="integer ids"):
        Reweighter(KL(0.1))(torch.rand(4, 3, requires_grad=True), units=torch.rand(4, 3))
