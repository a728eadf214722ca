"""What the benchmarks compare with is right, and their page is what their results say."""

from __future__ import annotations

import sys
from pathlib import Path

import inputs
import numpy as np
import oracle
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import everything  # noqa: E402
import page  # noqa: E402
import weight_solver_baselines as baselines  # noqa: E402
from weight_solver_throughput import SETS  # noqa: E402

# Not saturated: there the baselines find no bracket.
CASES = [*inputs.ORDINARY[3:5], inputs.TIED[0], inputs.SIGNS[0]]


@pytest.mark.parametrize("ambiguity", SETS, ids=repr)
@pytest.mark.parametrize("solver", ["bisection", "root_finding", "sparsemax"])
def test_a_baseline_is_the_oracle(solver: str, ambiguity: object) -> None:
    if solver == "sparsemax":
        pytest.importorskip("entmax")
    for case in CASES:
        found = getattr(baselines, solver)(ambiguity, case.losses)
        if found is not None:
            want = oracle.solve(ambiguity, case.losses.numpy())[0]
            np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6, err_msg=repr((ambiguity, case)))


def test_bisection_solves_rows_together() -> None:
    losses = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for ambiguity in SETS:
        found = baselines.bisection(ambiguity, losses)
        if found is not None:
            torch.testing.assert_close(found, ambiguity.solve(losses).ratio, rtol=1e-6, atol=1e-6)


def test_the_page_is_what_the_results_say() -> None:
    made = page.page(page.read())
    assert page.PAGE.read_text() == made, "run python benchmarks/page.py"


def test_the_page_without_results_measures_nothing() -> None:
    made = page.page({})
    figures = [line.split("|")[2].strip() for line in made.splitlines() if line.startswith("| ") and "|" in line[2:]]
    assert made.count(page.NOT_MEASURED) >= 20
    assert all(figure in ("figure", "---", page.NOT_MEASURED) or "tests/" in figure for figure in figures)


def test_a_loss_to_a_competitor_and_a_missed_target_are_shown() -> None:
    row = {"set": "ChiSquare(radius=0.5)", "rows": "1", "n": "512", "exact_us": "90.0", "sort_us": "8", "mean_us": "3"}
    row |= {"bisection_us": "80.5", "scipy_us": "", "entmax_us": "", "cvxpy_us": "failed"}
    made = page.page({"weight_solver_throughput_cpu": [row]})
    assert "| ChiSquare(radius=0.5) | 1 x 512 | bisection | 90.0 | 80.5 |" in made
    assert "chi-square, up to 512 losses: at most 80 us | 90 us | **no** |" in made


def test_make_bench_runs_files_that_exist() -> None:
    assert all((BENCHMARKS / f"{name}.py").exists() for name in everything.BENCHMARKS)
