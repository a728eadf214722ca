"""The ways to one answer: sorted or not, one row or many, looked at or not; each must give the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comparing
import inputs
import laws
import pytest
import torch
from inputs import Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from robustgrad.ambiguity import (
    KL,
    AmbiguitySet,
    ChiSquare,
    CVaR,
    TotalVariation,
    _elimination,
    _one_row,
    _sorted,
    _tilted_row,
    _tilting,
)

CHI_SQUARE = [ambiguity for ambiguity in inputs.SETS if isinstance(ambiguity, ChiSquare)]
TYPICAL = [
    TotalVariation(0.1),
    TotalVariation(0.3, cap=2.0),
    TotalVariation(penalty=0.5),
    ChiSquare(0.5),
    ChiSquare(1e-3),
    ChiSquare(penalty=0.5),
    KL(0.3),
    KL(temperature=0.5),
    CVaR(0.2),
]
each_typical = pytest.mark.parametrize("ambiguity", TYPICAL, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def long_rows(n: int) -> dict[str, Tensor]:
    """Rows that mislead a sample of every so-manieth loss, and ordinary ones."""
    step, stride = torch.arange(n, dtype=torch.float64), _elimination.stride(n)
    high = normal(n, seed=1)
    high[::stride] += 5
    low = normal(n, seed=2)
    low[::stride] -= 5
    return {
        "normal": normal(n),
        "the sample is high": high,
        "the sample is low": low,
        "tied": (normal(n) * 2).round(),
        "all equal": torch.full((n,), 0.3, dtype=torch.float64),
        "one outlier": torch.where(step == 3, 1e6, normal(n)),
        "ascending": step,
        "geometric": -(1.05 ** step.clamp_max(600)),
        "with -inf": torch.where(step % 7 == 0, -torch.inf, normal(n)),
    }


@pytest.mark.parametrize("ambiguity", CHI_SQUARE, ids=str)
def test_elimination_is_the_scan(ambiguity: ChiSquare, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in inputs.FINITE + inputs.MINUS_INF if not case.losses[case.valid].isneginf().all()]
    eliminated = [comparing.alone(ambiguity, case).ratio for case in cases]
    monkeypatch.setattr(_elimination, "readable", lambda tensor: False)
    monkeypatch.setattr(_one_row, "readable", lambda tensor: False)
    for case, ratio in zip(cases, eliminated, strict=True):
        laws.close_ratio(case.reference, ratio, comparing.alone(ambiguity, case).ratio, (ambiguity, case))


@pytest.mark.parametrize("name", long_rows(1))
@each_typical
def test_long_rows_are_optimal(ambiguity: AmbiguitySet, name: str) -> None:
    for n in (_elimination._SEVERAL, _elimination.LONG + 5):
        losses = long_rows(n)[name]
        case = Case(name, losses)
        if name == "with -inf":
            laws.assert_finite_losses_decide(comparing.alone, ambiguity, case)
        else:
            laws.assert_optimal(comparing.alone, ambiguity, case)
            laws.assert_feasible(comparing.alone, ambiguity, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 9, _elimination._SEVERAL, _elimination.LONG + 5])
@each_typical
def test_an_ordinary_row_is_solved_as_any_other(
    ambiguity: AmbiguitySet, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {name: losses.to(dtype) for name, losses in long_rows(n).items()}
    quickly = {name: ambiguity.solve(losses) for name, losses in rows.items()}
    monkeypatch.setattr(_one_row, "solve", lambda recipe, losses: None)
    for name, losses in rows.items():
        for field in comparing.FIELDS:
            got, want = getattr(quickly[name], field), getattr(ambiguity.solve(losses), field)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=f"{name}: {field} {got} {want}")


@pytest.mark.parametrize("copies", [1, _elimination.LONG], ids=["short", "long"])
def test_a_budget_that_is_just_used_up(copies: int) -> None:
    """On the larger half, whose losses hardly differ: the line through their ratios reaches 0 far below the others."""
    row = torch.tensor([0.0, 1.0, 3.0, 3.0 + 1e-12], dtype=torch.float64)
    ratio = ChiSquare(0.5).solve(row.repeat(copies)).ratio
    torch.testing.assert_close(ratio[:4], torch.tensor([0.0, 0.0, 2.0, 2.0]).double(), rtol=1e-3, atol=0)


@each_typical
def test_weighted_long_rows_are_optimal(ambiguity: AmbiguitySet) -> None:
    n = _elimination.LONG
    case = Case("weighted", normal(n), normal(n, seed=3).abs() ** 4, normal(n, seed=4) < 1)
    laws.assert_optimal(comparing.alone, ambiguity, case)


@each_typical
def test_a_long_row_whose_sample_has_no_weight(ambiguity: AmbiguitySet) -> None:
    n = _elimination.LONG
    base = torch.where(torch.arange(n) % _elimination.stride(n) == 0, 0.0, normal(n, seed=3).square())
    laws.assert_optimal(comparing.alone, ambiguity, Case("weights beside the sample", normal(n), base))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_typical
def test_a_long_row_without_an_answer(ambiguity: AmbiguitySet, bad: float) -> None:
    losses = normal(_elimination.LONG)
    losses[5] = bad
    for given in (losses, losses.float(), losses.expand(2, -1)):
        assert ambiguity.solve(given).ratio.isnan().all()


@pytest.mark.parametrize("shape", [(5, _elimination._SEVERAL), (2, 3, _elimination._SEVERAL), (70, 64)])
@each_typical
def test_rows_are_independent_to_the_bit(ambiguity: AmbiguitySet, shape: tuple[int, ...]) -> None:
    """Also of how long another row takes: the first is easy, the last ends in the fallback."""
    losses = normal(*shape)
    hard = losses.clone()
    hard[-1] = -(1.5 ** torch.arange(shape[-1]).double().clamp_max(140))
    bad = losses.clone()
    bad[-1] = torch.nan
    ratio = ambiguity.solve(losses).ratio
    assert torch.equal(ambiguity.solve(hard).ratio[:-1], ratio[:-1])
    assert torch.equal(ambiguity.solve(bad).ratio[:-1], ratio[:-1])
    alone = ambiguity.solve(losses.reshape(-1, shape[-1])[0]).ratio
    torch.testing.assert_close(ratio.reshape(-1, shape[-1])[0], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 350, 699, 700])
def test_selection_is_that_of_a_sort(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By numpy where values may be looked at, by torch elsewhere; for one row and for many."""
    for look in (True, False):
        monkeypatch.setattr(_sorted, "readable", lambda tensor, look=look: look)
        for name, losses in long_rows(700).items():
            want = losses.sort().values
            assert _sorted._kth(losses, k).item() == want[k - 1].item(), (name, k)
            assert torch.equal(
                _sorted._kth(losses.reshape(7, 100), 50), losses.reshape(7, 100).kthvalue(50, -1, True)[0]
            )
            assert torch.equal(_sorted.ascending(losses), want), name


@pytest.mark.parametrize("radius", [1e-9, 1e-3, 0.3, 3.0])
def test_kl_of_one_row_is_that_of_many(radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By numpy, tensors with a look, plain numbers, tensors without: four ways to one temperature."""
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda losses: KL(radius).solve(losses).ratio,
        lambda losses: KL(radius).solve(losses.expand(70, -1)).ratio[0],
    ]
    found = [way(normal(64)) for way in ways]
    for module in (_one_row, _tilting):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
        found.append(ways[0](normal(64)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("radius", [1e-13, 1e-4, 0.01, 0.5, 3.0])
@pytest.mark.parametrize("name", long_rows(1))
def test_kl_of_a_long_row_is_that_of_newtons_steps(name: str, radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the series around the sample's answer tells the way or, misled, gives up."""
    losses = long_rows(3 * _elimination.LONG)[name]
    found = KL(radius).solve(losses).ratio
    monkeypatch.setattr(_tilted_row, "LONG", losses.numel() + 1)
    want = KL(radius).solve(losses).ratio
    torch.testing.assert_close(found - 1, want - 1, rtol=1e-7, atol=1e-9 * radius**0.5)


@pytest.mark.parametrize("radius", [0.01, 0.5, 3.0])
def test_kl_of_a_long_row_takes_newtons_steps_on_its_sample_alone(
    radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    newton = _tilted_row.newton_of_one
    monkeypatch.setattr(
        _tilted_row, "newton_of_one", lambda curve, *guess: lengths.append(len(curve.given)) or newton(curve, *guess)
    )
    KL(radius).solve(normal(3 * _elimination.LONG))
    assert len(lengths) == 1 and lengths[0] < _elimination.LONG


def divergence_of(z: Tensor, scale: float) -> float:
    tilted = (scale * z).softmax(0)
    return float((tilted * (tilted * len(z)).log()).sum())


def test_the_series_errs_by_the_fifth_power() -> None:
    z = -normal(1000).exp()
    moments = [float((z.exp() * z**power).mean()) for power in range(6)]
    errors = []
    for change in (0.04, 0.02):
        step = _tilted_row.Step.of(moments, divergence_of(z, 1 + change), 1e-9)
        assert step.near
        errors.append(abs(step.change - change))
    assert errors[0] / errors[1] == pytest.approx(32, rel=0.1)


def test_a_series_that_does_not_settle_says_so() -> None:
    """Of losses that lie elsewhere than where it was taken, or whose powers overflow."""
    z = normal(1000) - 4
    moments = [float((z.exp() * z**power).mean()) for power in range(6)]
    near, far = (_tilted_row.Step.of(moments, divergence_of(z, scale), 1e-9) for scale in (1.003, 1.1))
    assert near.near and near.settled and near.change == pytest.approx(0.003, rel=1e-6)
    assert far.near and not far.settled
    assert _tilted_row.Step.of(moments, divergence_of(z, 3.0), 1e-9) == (0.0, False, False)
    assert _tilted_row.Step.of([math.nan] * 6, 0.5, 1e-9) == (0.0, False, False)


@pytest.mark.parametrize("ambiguity", TYPICAL, ids=str)
def test_remembered_losses_of_equal_weight_are_the_uniform_base(ambiguity: AmbiguitySet) -> None:
    losses, new = normal(100), normal(9, seed=1)
    unit, step_size = torch.ones((), dtype=torch.float64), torch.full((), 8.0, dtype=torch.float64)
    ratios = []
    for weight in (torch.ones(100), torch.linspace(1, 1 + 1e-12, 100, dtype=torch.float64)):
        rule = ambiguity.fit(losses, weight.double(), unit=unit, step_size=step_size)
        ratios.append(rule.ratio(new, torch.ones(9, dtype=torch.float64)))
    torch.testing.assert_close(*ratios, rtol=1e-9, atol=1e-9)


@each_typical
def test_a_single_row_traces_as_one_graph(ambiguity: AmbiguitySet) -> None:
    torch._dynamo.reset()
    traced = torch.compile(lambda losses: ambiguity.solve(losses).ratio, fullgraph=True, backend="eager")
    for losses in (normal(7).float(), normal(_elimination._SEVERAL)):
        torch.testing.assert_close(traced(losses), ambiguity.solve(losses).ratio, rtol=1e-5, atol=1e-6)


class NoBlas(TorchDispatchMode):
    """Refuses what cuBLAS would compute: in deterministic mode that raises without an environment variable."""

    BLAS = ("mm", "bmm", "addmm", "mv", "dot", "vdot", "baddbmm", "linalg_vecdot")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.BLAS:
            raise RuntimeError(f"{func} on an accelerator")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ambiguity", inputs.SETS, ids=str)
def test_off_the_cpu_nothing_is_looked_at_and_no_blas_is_used(ambiguity: AmbiguitySet) -> None:
    """Meta tensors have no values: whatever would read one raises."""
    with NoBlas():
        for shape in ((8,), (_elimination._SEVERAL,), (3, _elimination._SEVERAL)):
            assert ambiguity.solve(torch.empty(shape, device="meta")).ratio.shape == shape
        losses, one = torch.empty(512, dtype=torch.float64, device="meta"), torch.empty((), device="meta")
        rule = ambiguity.fit(losses, torch.ones_like(losses), unit=one, step_size=one)
        assert rule.ratio(losses[:3], torch.ones_like(losses[:3])).shape == (3,)


@pytest.mark.parametrize("shape", [(0, 4), (0, _elimination._SEVERAL), (2, 0, _elimination._SEVERAL)])
@each_typical
def test_no_rows(ambiguity: AmbiguitySet, shape: tuple[int, ...]) -> None:
    assert ambiguity.solve(torch.empty(shape)).ratio.shape == shape
