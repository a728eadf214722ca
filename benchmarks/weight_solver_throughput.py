"""How fast is the exact solve, beside every alternative?

    python benchmarks/weight_solver_throughput.py [--quick] [--device cuda] [--out benchmarks/results]

Per ambiguity set and problem size: the exact solve, the same by the C++ kernel (`fused`, where there is a compiler)
and the kernel's operator alone (`operator`: no checks, no rounding to float32), bisection on the dual at equal
accuracy, scipy's root finding (one row, CPU), entmax's sparsemax (chi-square penalty, where installed), a convex
solver whose problem was built beforehand, and the bare `sort` and `mean` of the same losses. All of them run
interleaved in the same rounds; a time is the median over rounds. Writes a CSV and a picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from measuring import Row, build_cpp, by_cpp, interleaved, machine, peak_memory, print_table, write_csv
from torch import Tensor
from weight_solver_baselines import bisection, convex_program, root_finding, sparsemax

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

SETS: list[AmbiguitySet] = [
    TotalVariation(0.1),
    TotalVariation(0.1, cap=2.0),
    TotalVariation(penalty=1.0),
    ChiSquare(0.5),
    ChiSquare(penalty=1.0),
    KL(0.5),
    KL(temperature=1.0),
    CVaR(0.2),
]
PROBLEMS = [(1, 8), (1, 64), (1, 512), (1, 4096), (1, 65536), (1, 2**20), (64, 64), (4096, 64)]
QUICK = [(1, 8), (1, 512), (64, 64)]
CONVEX_LIMIT = 4096
CHECKED = ("fused", "bisection", "scipy", "entmax", "cvxpy")
COLORS = {
    "exact": "C3",
    "fused": "C6",
    "operator": "C8",
    "bisection": "C0",
    "scipy": "C4",
    "entmax": "C5",
    "cvxpy": "C1",
    "sort": "C2",
    "mean": "C7",
}


def measure(ambiguity: AmbiguitySet, rows: int, n: int, rounds: int, device: str, cpp: bool) -> Row:
    generator = torch.Generator().manual_seed(n)
    losses = torch.nn.functional.softplus(torch.randn(rows, n, generator=generator)).to(device)
    losses = losses[0] if rows == 1 else losses

    def exact() -> Tensor:
        return ambiguity.solve(losses).ratio

    runs: dict[str, Callable[[], object]] = {
        "exact": exact,
        "sort": lambda: losses.sort(-1),
        "mean": lambda: losses.mean(-1),
    }
    # Accuracy without the rounding of the answer to float32.
    ratio, found = ambiguity.solve(losses.double()).ratio.cpu(), {}
    for name, other in {"bisection": bisection, "scipy": root_finding, "entmax": sparsemax}.items():
        if name == "scipy" and (rows > 1 or device != "cpu"):
            continue
        answer = other(ambiguity, losses)
        if answer is not None:
            runs[name], found[name] = (lambda other=other: other(ambiguity, losses)), answer.cpu()
    if cpp:
        recipe = ambiguity._recipe()
        runs["fused"] = by_cpp(exact)
        runs["operator"] = lambda: torch.ops.robustgrad.worst_ratio.default(losses, None, None, *recipe)
        found["fused"] = by_cpp(lambda: ambiguity.solve(losses.double()).ratio)()
    gave_up = False
    if rows == 1 and n <= CONVEX_LIMIT and find_spec("cvxpy"):
        program = convex_program(ambiguity, n)
        solution = attempt(program, losses)
        gave_up = solution is None
        if solution is not None:
            runs["cvxpy"], found["cvxpy"] = lambda: program(losses), solution
    spent = interleaved(runs, rounds, device)
    return {
        "set": repr(ambiguity),
        "rows": rows,
        "n": n,
        **{f"{name}_us": round(spent[name], 2) if name in spent else None for name in COLORS},
        **({"cvxpy_us": "failed"} if gave_up else {}),
        "problems_per_s": round(rows / spent["exact"] * 1e6),
        "bisection_times": round(spent["bisection"] / spent["exact"], 1) if "bisection" in spent else None,
        "cvxpy_times": round(spent["cvxpy"] / spent["exact"], 1) if "cvxpy" in spent else None,
        **{f"ratio_error_{k}": float(f"{(ratio - found[k]).abs().max():.1e}") if k in found else None
           for k in CHECKED},
        "peak_bytes_per_loss": round(peak_memory(exact, device) / losses.numel(), 1),
    }  # fmt: skip


def attempt(program: Callable[[Tensor], Tensor], losses: Tensor) -> Tensor | None:
    """The convex solver's answer, or None where it gives up."""
    from cvxpy.error import SolverError

    try:
        return program(losses)
    except SolverError:
        return None


def show(rows: list[Row], about: Row) -> None:
    heads = ["set", "rows", "n", *(f"{name}_us" for name in COLORS), "problems_per_s", "bisection_times",
             "cvxpy_times", *(f"ratio_error_{name}" for name in CHECKED),
             "peak_bytes_per_loss"]  # fmt: skip
    print_table(rows, heads, about)


def draw(rows: list[Row], about: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 4, figsize=(16, 7), sharex=True, sharey=True, layout="constrained")
    for panel, ambiguity in zip(panels.flat, SETS, strict=True):
        own = [row for row in rows if row["set"] == repr(ambiguity) and row["rows"] == 1]
        for name, color in COLORS.items():
            points = [(row["n"], row[f"{name}_us"]) for row in own if row[f"{name}_us"] not in (None, "failed")]
            if points:
                panel.loglog(*zip(*points, strict=True), "o-", color=color, label=name, markersize=4)
        panel.set_title(repr(ambiguity), fontsize=10)
        panel.grid(alpha=0.3)
    panels[0, 0].legend()
    figure.supxlabel("losses n")
    figure.supylabel("microseconds per solve")
    figure.suptitle(f"{about['device']}: {about['cpu']}, {about['threads']} threads, torch {about['torch']}")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sizes and three rounds, in seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device, about = arguments.device, machine(arguments.device)
    rows, cpp = [], device == "cpu" and build_cpp() is not None
    for ambiguity in SETS:
        for count, n in QUICK if arguments.quick else PROBLEMS:
            rows.append(measure(ambiguity, count, n, 3 if arguments.quick else 9, device, cpp))
            if sys.stderr.isatty():
                print(f"\r{ambiguity!r}, {count} x {n} ".ljust(70), end="\r", file=sys.stderr, flush=True)
    show(rows, about)
    path = arguments.out / f"weight_solver_throughput_{device}.csv"
    write_csv(path, rows, about)
    if find_spec("matplotlib"):
        draw(rows, about, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
