"""What do many ranks cost: the exchange of a step's losses, and the solve over all of them?

    python benchmarks/scaling.py [--quick] [--out benchmarks/results]

Measured: 1 to 4 gloo processes on this machine share out 1e3 to 1e6 samples of one optimizer step; the exchange
is the memory pool's (two collectives: sizes, then 32 bytes a sample), the solve is exact and runs on every rank.
On paper: the same for up to 1024 ranks, from the latency and bandwidth that the measured exchanges give,
as if the ranks stood in a ring: seconds = 2 (ranks - 1) latency + bytes (ranks - 1) / ranks / bandwidth.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import Launches, Row, machine, print_table, write_csv

from robustgrad import ChiSquare
from robustgrad.distributed import Ranks
from robustgrad.samples import Samples

RANKS, SAMPLES = (1, 2, 3, 4), (1_000, 10_000, 100_000, 1_000_000)
ON_PAPER = (8, 64, 256, 1024)
BYTES = 32  # a sample: score, weight, group, ratio
AMBIGUITY = ChiSquare(0.5)
HEADS = ["how", "ranks", "samples", "mib_per_rank", "collectives", "exchange_ms", "solve_ms", "percent_of_1s_step"]


def seconds_of(run: Callable[[], object], rounds: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    once()
    return median(once() for _ in range(rounds))


def of_rank(rank: int, world: int, folder: str, sizes: tuple[int, ...], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    ranks, spent = Ranks(None), {}
    for size in sizes:
        generator = torch.Generator().manual_seed(rank)
        losses = torch.randn(size // world, generator=generator).requires_grad_()
        samples = Samples.of_call(losses, None, None, None, None)
        dist.barrier()
        exchange = seconds_of(lambda samples=samples: ranks.gather(samples), rounds)
        together, _ = ranks.gather(samples)
        solve = seconds_of(lambda all_of=together: AMBIGUITY.solve_unchecked(all_of.scores).ratio, rounds)
        spent[size] = exchange, solve
    if rank == 0:
        torch.save(spent, Path(folder) / "spent.pt")
    dist.barrier()
    os._exit(0)  # without gloo's teardown


def measured(world: int, sizes: tuple[int, ...], rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(of_rank, (world, folder, sizes, rounds), nprocs=world)
        spent = torch.load(Path(folder) / "spent.pt")
    return [row("measured", world, size, *seconds) for size, seconds in spent.items()]


def row(how: str, world: int, size: int, exchange: float, solve: float) -> Row:
    return {
        "how": how,
        "ranks": world,
        "samples": size,
        "mib_per_rank": round(BYTES * size * (world - 1) / world / 2**20, 3),
        "collectives": 2 if world > 1 else 0,
        "exchange_ms": round(1e3 * exchange, 3),
        "solve_ms": round(1e3 * solve, 3),
        "percent_of_1s_step": round(100 * (exchange + solve), 3),
    }


def line_of(rows: list[Row]) -> tuple[float, float]:
    """Latency in seconds and seconds per byte that fit the measured exchanges best, in relative error."""
    several = [one for one in rows if one["ranks"] > 1]
    exchange = np.array([one["exchange_ms"] / 1e3 for one in several])
    terms = np.array([[2 * (one["ranks"] - 1), one["mib_per_rank"] * 2**20] for one in several])
    latency, per_byte = np.linalg.lstsq(terms / exchange[:, None], np.ones(len(several)), rcond=None)[0]
    return max(float(latency), 0.0), max(float(per_byte), 0.0)


def on_paper(rows: list[Row], latency: float, per_byte: float) -> list[Row]:
    alone = {one["samples"]: one["solve_ms"] / 1e3 for one in rows if one["ranks"] == 1}
    return [
        row("on paper", world, size, 2 * (world - 1) * latency + BYTES * size * (world - 1) / world * per_byte, solve)
        for world in ON_PAPER
        for size, solve in alone.items()
    ]


def launches() -> int:
    """Operations of one solve that looks at no value, as on an accelerator without the kernel."""
    losses = torch.empty(10_000, device="meta")
    with Launches() as mode:
        AMBIGUITY.solve_unchecked(losses)
    return mode.count


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, size in enumerate(sorted({one["samples"] for one in rows})):
        for how, line in (("measured", "o-"), ("on paper", "o:")):
            points = [one for one in rows if one["samples"] == size and one["how"] == how]
            ranks, share = [one["ranks"] for one in points], [one["percent_of_1s_step"] for one in points]
            panel.loglog(ranks, share, line, color=f"C{number}", label=f"{size:,} samples, {how}", markersize=4)
    panel.set(xlabel="ranks", ylabel="percent of a step of 1 s: exchange and solve")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two numbers of ranks, small sizes, in seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    worlds, sizes, rounds = ((1, 2), SAMPLES[:2], 3) if arguments.quick else (RANKS, SAMPLES, 7)
    rows = [one for world in worlds for one in measured(world, sizes, rounds)]
    latency, per_byte = line_of(rows)
    found = {"latency_us": round(1e6 * latency, 2), "mib_per_s": round(1 / per_byte / 2**20) if per_byte else None}
    about = {**machine("cpu"), "threads": 1, **found, "launches_per_solve": launches()}
    rows += on_paper(rows, latency, per_byte)
    print_table(rows, HEADS, about)
    path = arguments.out / "scaling.csv"
    write_csv(path, rows, about)
    if find_spec("matplotlib"):
        draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
