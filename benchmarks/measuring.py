"""What the benchmarks share: interleaved timing, peak memory, on which machine it was, tables and CSV files."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustgrad.ambiguity import _fused, _kernel

Row = dict[str, Any]
T = TypeVar("T")


class PeakMemory(TorchDispatchMode):
    """Most bytes alive at once among the tensors made inside; what an operation, or numpy, uses within is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._made(tensor.untyped_storage())
        return result

    def _made(self, storage: Any) -> None:
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would launch: views launch nothing, nor does asking for memory."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.overloadpacket.__name__.startswith("empty"))
        return func(*args, **(kwargs or {}))


def peak_memory(solve: Callable[[], object], device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        solve()
        return int(torch.cuda.max_memory_allocated() - before)
    with PeakMemory() as memory:
        solve()
    return memory.peak


def seconds(run: Callable[[], object], times: int, device: str) -> float:
    """Mean time of one of `times` calls in a row."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median microseconds per call. Every contestant runs in every round, so a disturbance hits them alike."""
    once = {name: min(seconds(run, 1, device) for _ in range(3)) for name, run in runs.items()}
    times = {name: max(1, min(200, int(0.01 / spent))) for name, spent in once.items()}
    kept: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            kept[name].append(seconds(run, times[name], device))
    return {name: 1e6 * median(values) for name, values in kept.items()}


def build_cpp() -> float | None:
    """Seconds to build the C++ kernel, or to find it built; None where it cannot be."""
    start = time.perf_counter()
    try:
        _fused.build()
    except ImportError as error:
        print(f"not measured: {error}")
        return None
    return time.perf_counter() - start


def by_cpp(run: Callable[[], T]) -> Callable[[], T]:
    """The same with the C++ kernel, once it is built."""

    def switched() -> T:
        before, _kernel._KERNEL = _kernel._KERNEL, "cpp"
        try:
            return run()
        finally:
            _kernel._KERNEL = before

    return switched


def machine(device: str) -> Row:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": names[0].split(":")[1].strip() if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # of the last minute: what else ran shows in it
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def print_table(rows: list[Row], heads: list[str], about: Row) -> None:
    """Print the table, with rich where it is installed."""
    lines = [["-" if row[head] is None else f"{row[head]:,}" if isinstance(row[head], float | int) and head != "n"
              else str(row[head]) for head in heads] for row in rows]  # fmt: skip
    title = ", ".join(f"{key} {value}" for key, value in about.items())
    if not find_spec("rich"):
        print(title, "\t".join(heads), *("\t".join(line) for line in lines), sep="\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for head in heads:
        table.add_column(head.replace("_", " "), justify="left" if head == "set" else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=220).print(table)


def write_csv(path: Path, rows: list[Row], about: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    print(f"wrote {path}")
