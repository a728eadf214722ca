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
