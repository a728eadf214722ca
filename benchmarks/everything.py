"""All speed benchmarks, one after the other, and the page of their results: `make bench`.

    python benchmarks/everything.py [--quick] [--device cuda]

On 2 cores in less than 15 minutes, the slowest ones with fewer rounds than they have by default. A benchmark that
fails does not stop the others; the exit code tells.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS: dict[str, list[str]] = {
    "weight_solver_throughput": [],
    "memory_pool_cost": [],
    "compiled_solver": [],
    "scaling": [],
    "step_overhead": ["--rounds", "5"],
    "capture_overhead": ["--rounds", "5"],
    "gradient_penalty_cost": ["--rounds", "3"],
}
ON_DEVICE = ("weight_solver_throughput", "memory_pool_cost")


def bar(done: int, name: str, start: float) -> None:
    filled = "#" * done + "." * (len(BENCHMARKS) - done)
    print(f"[{filled}] {time.perf_counter() - start:4.0f} s  {name}", file=sys.stderr, flush=True)


def run(name: str, arguments: list[str]) -> bool:
    return subprocess.run([sys.executable, str(HERE / f"{name}.py"), *arguments]).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each in its shortest form, to see that it runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of the solver and the memory pool")
    given, start, failed = parser.parse_args(), time.perf_counter(), []
    for done, (name, arguments) in enumerate(BENCHMARKS.items()):
        bar(done, name, start)
        device = ["--device", given.device] if given.device and name in ON_DEVICE else []
        # Figures of a quick run are no results.
        short = ["--quick", "--out", tempfile.gettempdir()] if given.quick else arguments
        failed += [] if run(name, short + device) else [name]
    failed += [] if given.quick or run("page", []) else ["page"]
    bar(len(BENCHMARKS), "failed: " + ", ".join(failed) if failed else "done", start)
    sys.exit(len(failed))


if __name__ == "__main__":
    main()
