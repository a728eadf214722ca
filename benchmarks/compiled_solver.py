"""What does a solver in C++ gain on the CPU, and would torch.compile replace it?

    python benchmarks/compiled_solver.py [--quick] [--out benchmarks/results]

The exact solve as it is, compiled by torch (inductor, one graph for each size) and by the C++ kernel (`fused`; its
operator alone as `operator`), beside `mean()`, interleaved in the same rounds; and the seconds that each compilation
and the one build of the kernel took, in caches that were empty.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from measuring import Row, build_cpp, by_cpp, interleaved, machine, print_table, write_csv

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

SETS: list[AmbiguitySet] = [TotalVariation(0.1), ChiSquare(0.5), KL(0.5), CVaR(0.2)]
SIZES = (8, 512, 65536)
HEADS = ["set", "n", "eager_us", "compiled_us", "fused_us", "operator_us", "mean_us", "compiled_times_mean",
         "fused_times_mean", "operator_times_mean", "compile_s", "build_s"]  # fmt: skip


def measure(ambiguity: AmbiguitySet, n: int, rounds: int, build_s: float | None) -> Row:
    torch._dynamo.reset()
    losses = torch.nn.functional.softplus(torch.randn(n, generator=torch.Generator().manual_seed(n)))

    def solve(losses: torch.Tensor) -> torch.Tensor:
        return ambiguity.solve_unchecked(losses).ratio

    compiled, start = torch.compile(solve, fullgraph=True), time.perf_counter()
    torch.testing.assert_close(compiled(losses), solve(losses), rtol=1e-5, atol=1e-6)
    compile_s = time.perf_counter() - start
    runs = {"eager": lambda: solve(losses), "compiled": lambda: compiled(losses), "mean": lambda: losses.mean()}
    if build_s is not None:
        recipe = ambiguity._recipe()
        runs["fused"] = by_cpp(lambda: solve(losses))
        runs["operator"] = lambda: torch.ops.robustgrad.worst_ratio.default(losses, None, None, *recipe)
    spent = interleaved(runs, rounds, "cpu")
    names = ("eager", "compiled", "fused", "operator", "mean")
    return {
        "set": repr(ambiguity),
        "n": n,
        **{f"{name}_us": round(spent[name], 2) if name in spent else None for name in names},
        **{f"{name}_times_mean": round(spent[name] / spent["mean"], 1) if name in spent else None
           for name in names[1:4]},
        "compile_s": round(compile_s, 1),
        "build_s": None if build_s is None else round(build_s, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one set and size, three rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    sets, sizes, rounds = (SETS[:1], SIZES[:1], 3) if arguments.quick else (SETS, SIZES, 9)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that each compilation is one
        os.environ["TORCH_EXTENSIONS_DIR"] = cache
        build_s = build_cpp()
        rows, about = [measure(ambiguity, n, rounds, build_s) for ambiguity in sets for n in sizes], machine("cpu")
    print_table(rows, HEADS, about)
    write_csv(arguments.out / "compiled_solver_cpu.csv", rows, about)


if __name__ == "__main__":
    main()
