"""What does a robust step cost beside a plain one?

    python benchmarks/step_overhead.py [--quick] [--rounds 15] [--out benchmarks/results]

An optimizer step of LoRA training on two real models: MiniLM (22M, reward head) and SmolLM2-135M (DPO without
reference), 4 micro-batches a step. Plain, memory and window steps take turns on the same pairs, so whatever
else the machine does hits them alike. Time: median over rounds of the ratio to the plain step of the same
round, with a 95% bootstrap interval. Memory: most tensor bytes alive at once during a step beyond those before it.
"""

from __future__ import annotations

from typing import Any

import torch
from lora_steps import ACCUMULATE, Losses, Step, in_turns, run
from measuring import Row, peak_memory
from torch import Tensor

from robustgrad import ChiSquare, RobustOptimizer

METHODS = ("plain", "memory", "window")


def make_step(method: str, model: torch.nn.Module, losses: Losses) -> Step:
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    if method != "plain":
        optimizer = RobustOptimizer(optimizer, ChiSquare(0.5), pool=method)

    def loss_fn(i: int) -> Tensor:
        values = losses(i)
        return (values if method == "plain" else optimizer.reweight(values)).mean() / ACCUMULATE

    def step() -> None:
        batches = range(ACCUMULATE)
        window = method == "window"
        for loss in optimizer.window(loss_fn, batches, model=model) if window else map(loss_fn, batches):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, model: torch.nn.Module, losses: Losses, rounds: int) -> list[Row]:
    steps = {method: make_step(method, model, losses) for method in METHODS}
    times = in_turns(steps, rounds)
    memory = {method: peak_memory(step, "cpu") for method, step in steps.items()}
    return [
        {"model": name, "method": method, **times[method],
         "peak_mib": round(memory[method] / 2**20, 2),
         "memory_times_plain": round(memory[method] / memory["plain"], 4), "rounds": rounds}
        for method in METHODS
    ]  # fmt: skip


if __name__ == "__main__":
    run(__doc__, measure, "step_overhead")
