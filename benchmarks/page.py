"""What do the benchmarks say, all on one page?

    python benchmarks/page.py [--check]

Writes benchmarks/README.md from the CSVs in benchmarks/results alone: every target beside its figure, every
table, every loss to a competitor. What has no CSV is "not measured". `--check` only compares.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from page_targets import TARGETS, fused

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "README.md"
ABOUT = ("device", "cpu", "cores", "threads", "load", "torch", "python", "commit")
FOUND = ("latency_us", "mib_per_s", "launches_per_solve")
COMPETITORS = ("bisection", "scipy", "entmax", "cvxpy")
NOT_MEASURED = "not measured"
Row = dict[str, str]
Results = dict[str, list[Row]]

INTRODUCTION = """# Benchmarks

This page is written by `benchmarks/page.py` from the CSV files in `benchmarks/results`; do not edit it.
`make bench` measures everything again on this machine and writes it anew. A time is the median over rounds in
which all contestants take turns. What has no figure says "not measured". Each section names the machine, the
versions and the commit of its figures, and the load of the machine while it measured: with more load than
cores the times are too long, though all contestants suffer alike.
"""

GPU = """On CUDA tensors one Triton kernel launch solves rows of up to 4096 losses
(`robustgrad/ambiguity/_triton/rows.py`). Longer rows take a fixed number of passes over the losses, each one launch,
without a sort (`_triton/long_rows.py`): 3 where the threshold is known beforehand (a penalty of total variation, a
temperature); 28 for a KL radius; otherwise 8 to 10 for bfloat16, 12 to 14 for float32, 20 to 22 for float64. Passes
that come after the answer is found read no losses. CI compares the kernels with the torch path in Triton's
interpreter and compiles them to machine code for sm_80 and sm_90 (`tests/test_kernel.py`). Not measured: how long any
of it takes on a GPU. `make bench ARGS="--device cuda"` and
`pytest -m cuda` measure and test on a GPU.
"""

FUSED = """Decision: there is one, and nobody needs it. `ROBUSTGRAD_KERNEL=cpp` builds `robustgrad/ambiguity/fused`
at import, once for each version of torch, and solves all CPU tensors by it; without the variable no compiler is ever
called. torch.compile of the eager path, which would have been simpler, does not come near the targets. What the
kernel saves, tens of microseconds on the losses of a batch, is not seen beside a training step of milliseconds; it
shows where many small problems, or rows of many thousands, are solved. The memory pool's fit takes the torch path.
`fused` is the whole call, `solve().ratio`, of which the checks, the result's object and the rounding to float32 are
the larger part for short rows; `operator` is the kernel's operator alone.
"""


def read(folder: Path = RESULTS) -> Results:
    found = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


def table(heads: list[str], lines: Iterable[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def machine(rows: list[Row]) -> str:
    return ", ".join(f"{name} {rows[0][name]}" for name in ABOUT + FOUND if rows[0].get(name)) + ".\n"


def section(title: str, results: Results, name: str, heads: list[str], text: str = "") -> str:
    rows = results.get(name)
    if not rows:
        return f"## {title}\n\n{text}\n{NOT_MEASURED}.\n" if text else f"## {title}\n\n{NOT_MEASURED}.\n"
    lines = ([row.get(head, NOT_MEASURED) or "-" for head in heads] for row in rows)
    body = table([head.replace("_", " ") for head in heads], lines)
    parts = [f"## {title}\n", text, body, machine(rows), picture(name, title)]
    return "\n".join(part for part in parts if part)


def picture(name: str, title: str) -> str:
    return f"![{title}](results/{name}.png)\n" if (RESULTS / f"{name}.png").exists() else ""


def targets(results: Results) -> str:
    def line(target: str, figure: Callable[[Results], str | None], met: Callable[[str], bool] | None) -> list[str]:
        found = figure(results)
        verdict = "" if found is None or met is None else "yes" if met(found) else "**no**"
        by_kernel = figure(fused(results))
        return [target, found or NOT_MEASURED, verdict or "-", "-" if by_kernel in (found, None) else by_kernel]

    heads = ["target", "figure", "met", "with the C++ kernel"]
    return "## Targets\n\n" + table(heads, (line(*target) for target in TARGETS))


def losses(results: Results) -> str:
    """Every contest of the solvers that the exact solve lost."""
    lost = [
        [row["set"], f"{row['rows']} x {row['n']}", name, row["exact_us"], row[f"{name}_us"]]
        for row in results.get("weight_solver_throughput_cpu", [])
        for name in COMPETITORS
        if is_number(row.get(f"{name}_us")) and float(row[f"{name}_us"]) < float(row["exact_us"])
    ]
    text = "## Lost to a competitor\n\nSolvers of the same problem that were faster than the exact solve:\n\n"
    return text + (table(["set", "rows x n", "faster", "exact us", "its us"], lost) if lost else "none.\n")


def is_number(cell: str | None) -> bool:
    return bool(cell) and cell.replace(".", "", 1).isdigit()


def page(results: Results) -> str:
    solver = ["set", "rows", "n", "exact_us", "fused_us", *(f"{name}_us" for name in COMPETITORS), "sort_us", "mean_us"]
    pool = ["set", "memory", "fit_us", "ratio_1_us", "ratio_8_us", "call_us", "sort_us", "mean_us"]
    launches = ["set", "memory", "by_torch", "by_kernels", "by_kernels_first_of_step"]
    step = ["model", "method", "step_ms", "times_plain", "low", "high", "memory_times_plain"]
    capture = ["model", "method", "step_ms", "times_plain", "low", "high"]
    scaling = ["how", "ranks", "samples", "mib_per_rank", "collectives", "exchange_ms", "solve_ms"]
    compiled = ["set", "n", "eager_us", "compiled_us", "fused_us", "operator_us", "mean_us"]
    times = ["compiled_times_mean", "fused_times_mean", "operator_times_mean", "compile_s", "build_s"]
    parts = [
        INTRODUCTION,
        targets(results),
        losses(results),
        section("The solve", results, "weight_solver_throughput_cpu", solver, SOLVE),
        section("The memory pool", results, "memory_pool_cost_cpu", pool, POOL),
        section("A training step", results, "step_overhead", step),
        section("Capture", results, "capture_overhead_cpu", capture),
        section("The gradient penalty", results, "gradient_penalty_cost_cpu", ["loss", "ms", "times_plain"]),
        section("Ranks", results, "scaling", [*scaling, "percent_of_1s_step"], SCALING),
        section("A solver in C++?", results, "compiled_solver_cpu", [*compiled, *times], FUSED),
        section("The solve on a GPU", results, "weight_solver_throughput_cuda", solver, GPU),
        section("The memory pool on a GPU", results, "memory_pool_cost_cuda", pool),
        section("Launches of the memory pool", results, "memory_pool_launches", launches, LAUNCHES),
    ]
    return "\n".join(parts)


SOLVE = """Microseconds per call. `fused` is the same solve by the C++ kernel (`ROBUSTGRAD_KERNEL=cpp`). `bisection` is
fast-dro's way, in torch with brackets as tight as the theory allows; `scipy` is Brent's root finding; `entmax` its
sparsemax; `cvxpy` a problem built beforehand. `sort` and `mean` of the same losses solve nothing: they are the
yardstick. "-": the competitor does not solve that set, or not many rows at once, or is left out at that size because
it takes seconds.
"""
POOL = """`fit`: once an optimizer step. `ratio`: of one and of eight new losses. `call`: a whole call on one loss, with
its hook and its share of the commit and fit.
"""
LAUNCHES = """What one call launches on an accelerator, counted without one. `by torch`: its own operations, of a
call within a step. `by kernels`: the Triton kernels (`robustgrad/ambiguity/_triton/memory_meet.py`), in Triton's
interpreter; the first call of a step takes the step before into the memory. A call of 64 samples or more takes one
launch more. The gradient's product with the ratio, in the backward pass, comes to all of them. Nothing waits for the
host, and a CUDA graph of a training step takes the memory along: replayed launch by launch in the interpreter, it goes
on as without a graph (`tests/memory_kernel_parity.py`).
"""
SCALING = """The exchange of one optimizer step's losses and the exact solve over all of them, chi-square; the last
column is their share of a step of one second. "On paper" extrapolates the latency and bandwidth of gloo between
processes of one machine as a ring; a cluster's own network was not measured.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    made = page(read())
    if parser.parse_args().check:
        sys.exit(None if PAGE.read_text() == made else "benchmarks/README.md is not what page.py writes: run it.")
    PAGE.write_text(made)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
