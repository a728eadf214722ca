"""Every law of `laws.py`, for every set, over the catalogue of `inputs.py`, alone and in a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import comparing
import inputs
import laws
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import Case

from robustgrad.ambiguity import AmbiguitySet, ChiSquare, CVaR, TotalVariation

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL = [case for case in inputs.FINITE if len(case.losses) < 1000]
RANKED = [ball for ball in inputs.BALLS if isinstance(ball, (TotalVariation, CVaR))]
each_set = pytest.mark.parametrize("ambiguity", inputs.SETS, ids=str)
each_ball = pytest.mark.parametrize("ambiguity", inputs.BALLS, ids=str)
each_solve = pytest.mark.parametrize("solve", [comparing.alone, comparing.in_a_batch], ids=["alone", "batch"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small problems: a second thread would only wait for its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_dtype(cases: list[Case], dtype: torch.dtype) -> list[Case]:
    """The cases whose valid losses stay finite in `dtype`."""
    converted = [case.to(dtype) for case in cases]
    return [case for case in converted if case.losses[case.valid].isfinite().all()]


@each_dtype
@each_set
def test_feasible(ambiguity: AmbiguitySet, dtype: torch.dtype) -> None:
    for case in in_dtype(inputs.FINITE, dtype):
        laws.assert_feasible(comparing.alone, ambiguity, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_set
def test_optimal(ambiguity: AmbiguitySet, dtype: torch.dtype) -> None:
    for case in in_dtype(inputs.FINITE if dtype == torch.float64 else SMALL, dtype):
        laws.assert_optimal(comparing.alone, ambiguity, case)


@each_set
def test_batched_row_is_feasible(ambiguity: AmbiguitySet) -> None:
    for case in SMALL:
        laws.assert_feasible(comparing.in_a_batch, ambiguity, case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_near_saturation(case: Case) -> None:
    for ambiguity in inputs.near_saturation(case):
        laws.assert_feasible(comparing.alone, ambiguity, case)
        laws.assert_optimal(comparing.alone, ambiguity, case)
        laws.assert_monotone_in_loss(comparing.alone, ambiguity, case)


@each_dtype
@each_set
def test_precision_of_caller(ambiguity: AmbiguitySet, dtype: torch.dtype) -> None:
    for case in in_dtype(inputs.FINITE, dtype):
        laws.assert_precision_of_caller(ambiguity, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@each_solve
@each_set
def test_summaries(ambiguity: AmbiguitySet, solve: comparing.Solve, dtype: torch.dtype) -> None:
    for case in in_dtype(SMALL, dtype):
        laws.assert_summaries(solve, ambiguity, case)


@each_solve
@each_set
def test_between_mean_and_maximum(ambiguity: AmbiguitySet, solve: comparing.Solve) -> None:
    for case in SMALL:
        laws.assert_between_mean_and_maximum(solve, ambiguity, case)


@pytest.mark.parametrize("shift", [1e4, -3.0, 2.0**20])
@each_set
def test_shift_invariant(ambiguity: AmbiguitySet, shift: float) -> None:
    for case in SMALL:
        laws.assert_shift_invariant(comparing.alone, ambiguity, case, shift)


@each_ball
def test_positive_scale_invariant(ambiguity: AmbiguitySet) -> None:
    for case in SMALL:
        for scale in (2.0**-9, 2.0**20):  # powers of two: the scaled losses are not rounded
            laws.assert_scale_invariant(comparing.alone, ambiguity, case, scale)


@pytest.mark.parametrize("ambiguity", RANKED, ids=str)
def test_only_ranks_matter(ambiguity: AmbiguitySet) -> None:
    for case in SMALL:
        laws.assert_only_ranks_matter(comparing.alone, ambiguity, case)


@each_solve
@each_set
def test_permutation_equivariant(ambiguity: AmbiguitySet, solve: comparing.Solve) -> None:
    for case in SMALL:
        laws.assert_permutation_equivariant(solve, ambiguity, case)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@each_set
def test_monotone_in_loss_and_ties_share(ambiguity: AmbiguitySet, dtype: torch.dtype) -> None:
    for case in in_dtype(inputs.FINITE, dtype):
        laws.assert_monotone_in_loss(comparing.alone, ambiguity, case)


@each_solve
@pytest.mark.parametrize("family", inputs.BY_RADIUS)
def test_value_is_monotone_and_concave_in_radius(family: str, solve: comparing.Solve) -> None:
    radii = [0.0, 1e-6, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0]
    radii += [] if "Total" in family else [1.5, 3.0, 10.0, 1e3]
    for case in SMALL:
        laws.assert_concave_in_radius(solve, inputs.BY_RADIUS[family], radii, case)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@each_solve
@pytest.mark.parametrize("ambiguity", inputs.PLAIN, ids=str)
def test_radius_zero_is_the_mean(ambiguity: AmbiguitySet, solve: comparing.Solve, dtype: torch.dtype) -> None:
    for case in in_dtype(inputs.FINITE, dtype):
        laws.assert_plain_mean(solve, ambiguity, case)


@each_set
def test_samples_twice_have_the_same_ratios(ambiguity: AmbiguitySet) -> None:
    for case in SMALL:
        laws.assert_replication_invariant(comparing.alone, ambiguity, case)


@each_set
def test_duplicate_sample_is_a_doubled_base_weight(ambiguity: AmbiguitySet) -> None:
    for case in SMALL:
        laws.assert_duplicate_is_double_weight(comparing.alone, ambiguity, case)


@each_solve
@each_set
def test_padded_is_unpadded(ambiguity: AmbiguitySet, solve: comparing.Solve) -> None:
    for case in in_dtype(SMALL, torch.float32):
        laws.assert_padding_invariant(solve, ambiguity, case)


@pytest.mark.parametrize("poison", inputs.POISONED[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_set
def test_rows_are_independent(ambiguity: AmbiguitySet, poison: Case, dtype: torch.dtype) -> None:
    laws.assert_rows_are_independent(ambiguity, in_dtype(SMALL, dtype), poison.to(dtype))


@each_set
def test_detached(ambiguity: AmbiguitySet) -> None:
    for case in SMALL:
        laws.assert_detached(ambiguity, case)


@pytest.mark.parametrize("n", [1, 2, 4096])
@each_dtype
@each_set
def test_weights_sum_to_one(ambiguity: AmbiguitySet, dtype: torch.dtype, n: int) -> None:
    losses = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    sums = ambiguity.solve(losses).weights.double().sum(-1)
    torch.testing.assert_close(sums, torch.ones(3, dtype=torch.float64), rtol=0, atol=2e-7)


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """Rows of 1 to 40 losses over many magnitudes, often tied, sometimes weighted or masked."""
    n = draw(st.integers(1, 40))
    number = st.floats(-3, 3, allow_subnormal=False)
    step = draw(st.sampled_from([0.0, 0.5, 2.0**-20]))
    raw = torch.tensor(draw(st.lists(number, min_size=n, max_size=n)), dtype=torch.float64)
    # Hypothesis tries constants of whatever modules a process has loaded, 1e-30 among them. The solver of KL ties the
    # ninth power of that with 0: it tells losses apart down to 1e-153 of their range.
    raw = torch.where(raw.abs() < 1e-12, 0.0, raw)
    power = draw(st.sampled_from([1.0, 9.0]))
    losses = (raw / step).round() * step if step else raw.sign() * raw.abs() ** power
    losses = losses * 10.0 ** draw(st.integers(-6, 6)) + draw(st.sampled_from([0.0, 0.0, 100.0]))
    base = draw(st.none() | st.lists(st.floats(1e-3, 1), min_size=n, max_size=n))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    return Case(
        "drawn",
        losses,
        None if base is None else torch.tensor(base, dtype=torch.float64),
        None if mask is None else torch.tensor(mask),
    )


radius = st.floats(0, 1) | st.floats(-9, 0).map(lambda x: 10**x)
price = st.floats(-3, 3).map(lambda x: 10**x)
SETS_DRAWN = {
    "total variation": radius.map(TotalVariation),
    "total variation with a cap": st.builds(TotalVariation, radius, cap=st.floats(1.01, 50)),
    "total variation penalty": price.map(lambda x: TotalVariation(penalty=x)),
    "chi-square": (radius | price).map(ChiSquare),
    "chi-square penalty": price.map(lambda x: ChiSquare(penalty=x)),
    "KL": (radius | price).map(inputs.KL),
    "KL temperature": price.map(lambda x: inputs.KL(temperature=x)),
    # The quotients of a subnormal share have no digits, in the oracle either.
    "CVaR": radius.filter(lambda x: x > 1e-300).map(CVaR),
}


@pytest.mark.parametrize("kind", SETS_DRAWN)
def test_random_problems_reach_the_dual_bound(kind: str) -> None:
    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(SETS_DRAWN[kind], problems())
    def check(ambiguity: AmbiguitySet, case: Case) -> None:
        laws.assert_feasible(comparing.alone, ambiguity, case)
        laws.assert_optimal(comparing.alone, ambiguity, case)
        laws.assert_monotone_in_loss(comparing.alone, ambiguity, case)

    check()


@pytest.mark.parametrize("ambiguity", inputs.SETS, ids=str)
def test_oracle_agrees_with_a_convex_solver(ambiguity: AmbiguitySet) -> None:
    """The oracle, its dual bound and an interior-point solver: three methods, one value."""
    pytest.importorskip("cvxpy")
    for seed, n in enumerate((2, 6, 15)):
        rng = np.random.default_rng(seed)
        losses, base = np.round(rng.normal(size=n), 1 if n == 15 else 9), rng.random(n) + 0.05
        value, bound = oracle.solve(ambiguity, losses, base)[1], oracle.dual_bound(ambiguity, losses, base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A radius near 0 leaves no interior: the solver says so.
            convex = oracle.cvxpy_value(ambiguity, losses, base)
        assert abs(value - bound) < 1e-12, (ambiguity, n)
        rough = 1e-3 if getattr(ambiguity, "radius", None) in (0.0, 1e-18) else 1e-6
        assert abs(value - convex) < rough, (ambiguity, n, value, convex)
