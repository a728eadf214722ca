"""What does capture cost beside a plain step?

    python benchmarks/capture_overhead.py [--quick] [--rounds 15] [--out benchmarks/results]

The models and pairs of step_overhead.py, with a loop that makes a scalar loss. Plain steps, steps whose
losses are handed over, and captured ones take turns. Time: median over rounds of the ratio to the plain
step of the same round, with a 95% bootstrap interval; forward_ms is the plain forward of one micro-batch.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from lora_steps import ACCUMULATE, Losses, Step, in_turns, run, timed
from measuring import Row

from robustgrad import ChiSquare, RobustOptimizer

METHODS = ("plain", "handed over", "captured")


def make_step(method: str, model: torch.nn.Module, losses: Losses) -> Step:
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


def measure(name: str, model: torch.nn.Module, losses: Losses, rounds: int) -> list[Row]:
    times = in_turns({method: make_step(method, model, losses) for method in METHODS}, rounds)
    forward = median(timed(lambda: losses(0)) for _ in range(5))
    return [
        {"model": name, "method": method, "forward_ms": round(1e3 * forward, 1), **times[method], "rounds": rounds}
        for method in METHODS
    ]


if __name__ == "__main__":
    run(__doc__, measure, "capture_overhead_cpu")
