"""Would torch.compile replace a solver of our own in C++ on the CPU?

    python benchmarks/compiled_solver.py [--quick] [--out benchmarks/results]

The exact solve as it is and compiled by torch (inductor, one graph for each size), beside `mean()`, interleaved
in the same rounds; and the seconds that each compilation took.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from measuring import Row, interleaved, machine, print_table, write_csv

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

SETS: list[AmbiguitySet] = [TotalVariation(0.1), ChiSquare(0.5), KL(0.5), CVaR(0.2)]
SIZES = (8, 512, 65536)
HEADS = ["set", "n", "eager_us", "compiled_us", "mean_us", "compiled_times_mean", "compile_s"]


def measure(ambiguity: AmbiguitySet, n: int, rounds: int) -> Row:
    torch._dynamo.reset()
    losses = torch.nn.functional.softplus(torch.randn(n, generator=torch.Generator().manual_seed(n)))

    def solve(losses: torch.Tensor) -> torch.Tensor:
        return ambiguity.solve_unchecked(losses).ratio

    compiled, start = torch.compile(solve, fullgraph=True), time.perf_counter()
    torch.testing.assert_close(compiled(losses), solve(losses), rtol=1e-5, atol=1e-6)
    compile_s = time.perf_counter() - start
    runs = {"eager": lambda: solve(losses), "compiled": lambda: compiled(losses), "mean": lambda: losses.mean()}
    spent = interleaved(runs, rounds, "cpu")
    return {
        "set": repr(ambiguity),
        "n": n,
        **{f"{name}_us": round(us, 2) for name, us in spent.items()},
        "compiled_times_mean": round(spent["compiled"] / spent["mean"], 1),
        "compile_s": round(compile_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one set and size, three rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    sets, sizes, rounds = (SETS[:1], SIZES[:1], 3) if arguments.quick else (SETS, SIZES, 9)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that each compilation is one
        rows, about = [measure(ambiguity, n, rounds) for ambiguity in sets for n in sizes], machine("cpu")
    print_table(rows, HEADS, about)
    write_csv(arguments.out / "compiled_solver_cpu.csv", rows, about)


if __name__ == "__main__":
    main()
