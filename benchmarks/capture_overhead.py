"""What does capture cost beside a plain step?

    python benchmarks/capture_overhead.py [--quick] [--rounds 15] [--out benchmarks/results]

The models and pairs of step_overhead.py, with a loop that makes a scalar loss. Plain steps, steps whose
losses are handed over, and captured ones take turns. Time: median over rounds of the ratio to the plain
step of the same round, with a 95% bootstrap interval; forward_ms is the plain forward of one micro-batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import Row, machine, print_table, write_csv
from step_overhead import ACCUMULATE, Losses, interval, minilm, smollm, timed

from robustgrad import ChiSquare, RobustOptimizer

METHODS = ("plain", "handed over", "captured")


def make_step(method: str, model: torch.nn.Module, losses: Losses) -> Callable[[], None]:
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    if method != "plain":
        optimizer = RobustOptimizer(optimizer, ChiSquare(0.5))

    def loss_of(i: int) -> torch.Tensor:
        if method == "captured":
            with optimizer.capture():
                loss = losses(i).mean()
            return loss
        values = losses(i)
        return (optimizer.reweight(values) if method == "handed over" else values).mean()

    def step() -> None:
        for i in range(ACCUMULATE):
            (loss_of(i) / ACCUMULATE).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, build: Callable[[], tuple[torch.nn.Module, Losses]], rounds: int) -> list[Row]:
    model, losses = build()
    model.train()
    steps = {method: make_step(method, model, losses) for method in METHODS}
    for _ in range(3):
        for step in steps.values():
            step()
    forward = median(timed(lambda: losses(0)) for _ in range(5))
    spent: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in range(rounds):
        for method in METHODS[turn % 3 :] + METHODS[: turn % 3]:
            spent[method].append(timed(steps[method]))
    rows = []
    for method in METHODS:
        ratios = [own / plain for own, plain in zip(spent[method], spent["plain"], strict=True)]
        low, high = interval(ratios)
        rows.append({"model": name, "method": method, "forward_ms": round(1e3 * forward, 1),
                     "step_ms": round(1e3 * median(spent[method]), 1), "times_plain": round(median(ratios), 4),
                     "low": round(low, 4), "high": round(high, 4), "rounds": rounds})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MiniLM only, three rounds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    models = {"MiniLM": minilm} if arguments.quick else {"MiniLM": minilm, "SmolLM2-135M": smollm}
    rounds = 3 if arguments.quick else arguments.rounds
    rows = [row for name, build in models.items() for row in measure(name, build, rounds)]
    about = machine("cpu")
    print_table(rows, list(rows[0]), about)
    write_csv(arguments.out / "capture_overhead_cpu.csv", rows, about)


if __name__ == "__main__":
    main()
