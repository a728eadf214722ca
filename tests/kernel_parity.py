"""A kernel beside the torch path, on CPU tensors: run by `test_kernel.py`.

The process must have ROBUSTGRAD_KERNEL from the start: cpp, or triton and TRITON_INTERPRET=1 beside it.
"""

from __future__ import annotations

import importlib

import comparing
import inputs
import laws
import pytest
import torch
from torch import Tensor

from robustgrad import robust_loss
from robustgrad.ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation, _kernel
from robustgrad.ambiguity._problem import Problem

# The interpreter computes with numpy, which warns of divisions by a zero whose result is not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TYPICAL = [
    TotalVariation(0.3),
    TotalVariation(0.3, cap=2.0),
    TotalVariation(penalty=0.5),
    ChiSquare(0.5),
    ChiSquare(penalty=0.5),
    KL(0.3),
    KL(1e-6),
    KL(temperature=0.5),
    CVaR(0.2),
]
EVERY = inputs.FINITE + inputs.MINUS_INF + inputs.POISONED + inputs.EMPTY
SHORT = [case for case in EVERY if len(case.losses) <= 200]
each_set = pytest.mark.parametrize("ambiguity", inputs.SETS, ids=str)
each_typical = pytest.mark.parametrize("ambiguity", TYPICAL, ids=str)


of_cpp = pytest.mark.skipif(_kernel._INTERPRETED, reason="Triton's kernel takes no such rows")
of_triton = pytest.mark.skipif(not _kernel._INTERPRETED, reason="the C++ kernel takes rows of any length")


@pytest.fixture(autouse=True)
def one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    share_out(2**15, "rows", monkeypatch)  # Numpy is quicker with large arrays.


def share_out(losses: int, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many losses to a program of Triton."""
    if _kernel._INTERPRETED:
        launches = importlib.import_module(f"robustgrad.ambiguity._triton.launch_{rows}")
        monkeypatch.setattr(launches, "_TILE", losses)


def by_torch(ambiguity: AmbiguitySet, losses: Tensor, base: Tensor | None, mask: Tensor | None) -> Tensor:
    problem = Problem.unchecked(losses, base, mask)
    return problem.finish(ambiguity._worst_case(problem))


def assert_parity(ambiguity: AmbiguitySet, losses: Tensor, base: Tensor | None, mask: Tensor | None) -> None:
    """Ratio within 2e-6 (and what 1 / p makes of rounding), the same NaN, the same zeros outside, the same ties."""
    assert _kernel.solves(losses)
    got, want = ambiguity.solve(losses, base=base, mask=mask).wide_ratio, by_torch(ambiguity, losses, base, mask)
    share = Problem.unchecked(losses, base, mask).base
    rounding = 4e-15 * losses.shape[-1] if share is None else 4e-15 / share.clamp(min=1e-300)
    assert torch.equal(got.isnan(), want.isnan()), ambiguity
    wrong = (got - want).abs() > 2e-6 * (1 + want.abs()) + rounding
    assert not wrong.any(), (ambiguity, wrong.nonzero().tolist(), got[wrong], want[wrong])
    on = torch.ones_like(got, dtype=torch.bool) if share is None else share > 0
    assert (got[~on & ~got.isnan()] == 0).all(), ambiguity
    assert_ties(losses, got, on & ~got.isnan(), ambiguity)


def assert_ties(losses: Tensor, ratio: Tensor, on: Tensor, ambiguity: AmbiguitySet) -> None:
    for row, of_row, counted in zip(*(x.reshape(-1, x.shape[-1]) for x in (losses, ratio, on)), strict=True):
        order = row[counted].sort().indices
        tied = row[counted][order].diff() == 0
        assert (of_row[counted][order].diff()[tied] == 0).all(), (ambiguity, row)


@each_set
def test_every_row_of_the_catalogue(ambiguity: AmbiguitySet) -> None:
    assert_parity(ambiguity, *comparing.stack(SHORT))


@each_typical
def test_every_row_in_float32(ambiguity: AmbiguitySet) -> None:
    assert_parity(ambiguity, *comparing.stack([case.to(torch.float32) for case in SHORT]))


@each_typical
def test_rows_without_base_or_mask(ambiguity: AmbiguitySet) -> None:
    for case in (inputs.ORDINARY[5], inputs.TIED[0], inputs.POISONED[0]):
        assert_parity(ambiguity, case.losses, None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_typical
def test_shapes_and_dtypes(ambiguity: AmbiguitySet, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows over several programs, leading dimensions, strides, a base and a mask of all rows."""
    share_out(2**8, "rows", monkeypatch)
    losses = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    base, mask = torch.linspace(1, 2, 40, dtype=dtype), torch.arange(40) % 7 > 0
    assert_parity(ambiguity, losses, base, mask)
    assert_parity(ambiguity, losses.mT, None, torch.arange(9) > 2)
    assert_parity(ambiguity, losses[:0], None, None)


@each_typical
def test_longest_row(ambiguity: AmbiguitySet) -> None:
    assert_parity(ambiguity, inputs.ORDINARY[-1].losses, None, None)


@of_triton
def test_what_goes_beyond() -> None:
    assert all(_kernel.takes(a._recipe(), torch.empty(4097)) for a in TYPICAL)
    assert not _kernel.takes(KL(0.0)._recipe(), torch.empty(4097))  # ones


def long_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A row with ties and losses of -inf, and one that has no answer; base and mask."""
    losses = torch.randn(2, 4100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    losses[0, ::7], losses[0, 5::9], losses[1, 77] = losses[0, 3], -torch.inf, torch.nan
    return losses, torch.linspace(0, 2, 4100, dtype=dtype), torch.arange(4100) % 5 != 2


@pytest.fixture
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    share_out(2**12, "long_rows", monkeypatch)


@pytest.mark.usefixtures("one_block")
@pytest.mark.parametrize("ambiguity", [*TYPICAL, KL(20.0)], ids=str)
def test_long_rows(ambiguity: AmbiguitySet) -> None:
    losses, base, mask = long_rows(torch.float32)
    assert_parity(ambiguity, losses, base, mask)


@pytest.mark.usefixtures("one_block")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ambiguity", [CVaR(0.2), ChiSquare(1e-6), KL(0.3)], ids=str)
def test_long_rows_of_every_type(ambiguity: AmbiguitySet, dtype: torch.dtype) -> None:
    assert_parity(ambiguity, long_rows(dtype)[0][:1], None, None)


def test_long_rows_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    share_out(2**9, "long_rows", monkeypatch)
    losses = torch.randn(9000, generator=torch.Generator().manual_seed(1)).bfloat16()
    for ambiguity in (TotalVariation(0.3, cap=2.0), ChiSquare(0.5), KL(2.0)):
        assert_parity(ambiguity, losses, None, None)
    assert torch.equal(ambiguity.solve(losses).wide_ratio, ambiguity.solve(losses).wide_ratio)


@pytest.mark.usefixtures("one_block")
@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_long_rows_of_any_scale(scale: float) -> None:
    losses = scale * torch.randn(4100, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for ambiguity in (ChiSquare(0.5), KL(0.3)):
        assert_parity(ambiguity, losses, None, None)


# Of 20,000: the C++ kernel begins with a sample of long rows, of one in 16 or 27, which some of these mislead.
LONG = torch.arange(20_000, dtype=torch.float64)
LONG_ROWS = {
    "normal": inputs._normal(20_000),
    "heavy tail": inputs._uniform(20_000).reciprocal(),
    "ascending": LONG,
    "descending": -LONG,
    "two values": (LONG % 3 == 0).double(),
    "all equal": torch.ones_like(LONG),
    "rounded": (inputs._normal(20_000) * 2).round(),
    "one outlier": torch.where(LONG == 4321, 1e6, inputs._normal(20_000)),
    "sampled ones are large": torch.where((LONG % 16 == 0) | (LONG % 27 == 0), 9.0, 0.0) + inputs._normal(20_000),
    "sampled ones are small": torch.where((LONG % 16 == 0) | (LONG % 27 == 0), -9.0, 0.0) + inputs._normal(20_000),
    "gaps double": -(2.0 ** (LONG % 900)),
    "many -inf": torch.where(LONG % 5 < 3, -torch.inf, inputs._normal(20_000)),
}


@of_cpp
@pytest.mark.parametrize("name", LONG_ROWS)
@each_typical
def test_long_rows_that_mislead(ambiguity: AmbiguitySet, name: str) -> None:
    losses, base, mask = LONG_ROWS[name], inputs._uniform(20_000) + 0.01, LONG % 7 != 2
    assert_parity(ambiguity, losses, None, None)
    assert_parity(ambiguity, losses.float(), None, mask)
    assert_parity(ambiguity, losses.flip(0), base, mask)


@of_cpp
@pytest.mark.parametrize("radius", [1e-6, 1e-3, 0.3, 2.0])
def test_kl_of_a_long_row_is_exact(radius: float) -> None:
    """Its series around the answer of a sample leaves out less than a loss rounds by."""
    several = torch.randn(12, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for losses in (several, several[:2].exp().float()):
        got, want = KL(radius).solve(losses).wide_ratio, by_torch(KL(radius), losses, None, None)
        torch.testing.assert_close(got - 1, want - 1, rtol=1e-8, atol=1e-8 * radius**0.5)


@of_cpp
def test_a_light_loss_beside_nearly_all_the_mass() -> None:
    losses = inputs._normal(200).reshape(10, 20)
    base = inputs._uniform(200).reshape(10, 20).where(losses > losses.amin(-1, keepdim=True), 1e-9)
    ratio = TotalVariation(1e-18).solve(losses, base=base).ratio
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-12, atol=1e-12)


@of_cpp
@pytest.mark.parametrize("case", [*inputs.ORDINARY[:6], *inputs.SCALES, *inputs.WEIGHTED], ids=str)
def test_at_saturation(case: inputs.Case) -> None:
    for ambiguity in inputs.near_saturation(case):
        laws.assert_feasible(comparing.alone, ambiguity, case)
        laws.assert_optimal(comparing.alone, ambiguity, case)


@pytest.mark.parametrize("base", [None, torch.linspace(1, 2, 6)], ids=["uniform", "weighted"])
@each_typical
def test_zeros_of_either_sign_are_tied(ambiguity: AmbiguitySet, base: Tensor | None) -> None:
    ratio = ambiguity.solve(torch.tensor([-0.0, 0.0, -1.0, 0.0, -0.0, -2.0]), base=base).wide_ratio
    assert ratio[[0, 1, 3, 4]].unique().numel() == 1
    assert_parity(ambiguity, torch.tensor([-0.0, 1.0, 0.0, -1.0, -0.0, -2.0]), base, None)


@pytest.mark.parametrize("radius", [1e-18, 1e-15, 1e-9, 1e-5, 1e-2])
@pytest.mark.parametrize("kind", [KL, ChiSquare])
def test_a_small_radius_is_spent(kind: type[KL] | type[ChiSquare], radius: float) -> None:
    """Within 2e-6 of 1 every ratio would be right."""
    found = kind(radius).solve(inputs.ORDINARY[3].losses).divergence.item()
    assert found == pytest.approx(radius, rel=1e-3, abs=0)


@each_typical
def test_a_gradient_is_the_weighted_sum(ambiguity: AmbiguitySet) -> None:
    """Compiled in one graph and not: the ratio is a constant of the gradient."""
    torch._dynamo.reset()
    values = torch.randn(9, generator=torch.Generator().manual_seed(1))
    losses, want = values.clone().requires_grad_(), ambiguity.solve(values).weights
    for loss in (robust_loss, torch.compile(robust_loss, fullgraph=True, backend="aot_eager")):
        (gradient,) = torch.autograd.grad(loss(losses, ambiguity), losses)
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("ambiguity", TYPICAL[::2], ids=str)
def test_laws(ambiguity: AmbiguitySet) -> None:
    for case in (inputs.ORDINARY[4], inputs.WEIGHTED[3], inputs.MASKED[4]):
        laws.assert_feasible(comparing.alone, ambiguity, case)
        laws.assert_optimal(comparing.alone, ambiguity, case)
        laws.assert_summaries(comparing.alone, ambiguity, case)
    laws.assert_rows_are_independent(ambiguity, inputs.TIED[:4], inputs.POISONED[0])
    laws.assert_detached(ambiguity, inputs.WEIGHTED[0])


@each_typical
def test_bad_base_makes_its_row_nan(ambiguity: AmbiguitySet) -> None:
    base = torch.tensor([[1.0, -0.5, 1.0], [1.0, torch.inf, 1.0], [1.0, torch.nan, 1.0], [1.0, 2.0, 1.0]])
    ratio = ambiguity.solve_unchecked(torch.tensor([0.1, 0.7, 0.4]).expand(4, 3), base).ratio
    assert ratio[:3].isnan().all() and ratio[3].isfinite().all()


@each_typical
def test_deterministic(ambiguity: AmbiguitySet) -> None:
    losses = torch.randn(5, 100)
    assert torch.equal(ambiguity.solve(losses).wide_ratio, ambiguity.solve(losses).wide_ratio)


@of_cpp
@pytest.mark.parametrize("recipe", [("ball", [0.5]), ("top", [0.9, 1.0, 0.0, 0.0, 0.1])], ids=["ball", "top"])
def test_the_operator_keeps_to_the_rules_of_torch(recipe: tuple[str, list[float]]) -> None:
    given = (torch.randn(3, 5).mT, torch.rand(3), torch.ones(5, 3, dtype=torch.bool))
    torch.library.opcheck(torch.ops.robustgrad.worst_ratio.default, (*given, *recipe))


@pytest.mark.parametrize("ambiguity", TYPICAL[::4], ids=str)
def test_compiled_and_transformed(ambiguity: AmbiguitySet) -> None:
    torch._dynamo.reset()
    losses, base = torch.randn(3, 7, dtype=torch.float64), torch.rand(3, 7, dtype=torch.float64) + 0.1

    def ratio(losses: Tensor, base: Tensor | None = None) -> Tensor:
        return ambiguity.solve_unchecked(losses, base).ratio

    want = ratio(losses, base)
    traced = torch.compile(ratio, fullgraph=True, backend="aot_eager")
    every = torch.vmap(ratio, in_dims=(None, 0))(losses, base[:, None].expand(3, 3, 7))
    for got in (traced(losses, base), torch.vmap(ratio)(losses, base), every.diagonal().mT):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    single = torch.vmap(ratio, in_dims=(0, None))(losses, base[0])
    torch.testing.assert_close(single, ratio(losses, base[0]), rtol=1e-12, atol=1e-12)
