"""What does the memory pool cost per optimizer step and per micro-batch?

    python benchmarks/memory_pool_cost.py [--quick] [--memory 512] [--device cuda] [--out benchmarks/results]

Per ambiguity set: `fit` of a full memory, once per optimizer step; `ratio_1` and `ratio_8`, the rule asked
about one and eight new losses; `call`, a whole call of the reweighter on one loss with its hook, and with
the commit and fit of the step shared out over the calls of the step. Beside them the bare `sort` and `mean`
of the remembered losses. All of them run interleaved in the same rounds; a time is the median over rounds.

Counted, not timed, are the launches of one call on an accelerator: `by_torch` with torch's own operations; `by_kernels`
with the Triton kernels, of a call within a step, and `by_kernels_first_of_step` of the one that begins a step and
commits the one before. The kernels are counted in Triton's interpreter, in a process of its own, where Triton is
installed. `--count` does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from measuring import Launches, Row, interleaved, machine, print_table, write_csv
from weight_solver_throughput import SETS

from robustgrad import AmbiguitySet, Reweighter

HERE = Path(__file__).parent
CALLS = 32  # micro-batches of one sample per optimizer step
HEADS = ["set", "memory", "fit_us", "ratio_1_us", "ratio_8_us", "call_us", "sort_us", "mean_us"]
COUNTED = ["set", "memory", "by_torch", "by_kernels", "by_kernels_first_of_step"]


def step_of(ambiguity: AmbiguitySet, memory: int, device: str) -> Callable[[], None]:
    """One optimizer step of `CALLS` calls, of a reweighter whose memory is full."""
    reweighter = Reweighter(ambiguity, memory=memory)
    losses = torch.nn.functional.softplus(torch.randn(64, device=device)).requires_grad_()

    def step() -> None:
        for i in range(CALLS):
            reweighter(losses[i : i + 1])
        reweighter.step()

    for _ in range(memory // CALLS + 2):
        step()
    return step


def launches_of_call(ambiguity: AmbiguitySet, memory: int) -> int:
    """Counted on tensors without values: off the CPU nothing looks at them."""
    reweighter, losses = Reweighter(ambiguity, memory=memory), torch.empty(CALLS, device="meta").requires_grad_()
    reweighter(losses)
    reweighter.step()
    reweighter(losses * 1)
    one = losses[:1] * 1
    with Launches() as counted:
        reweighter(one)
    return counted.count


def launches_by_kernels(ambiguity: AmbiguitySet, memory: int) -> list[int]:
    """Of a call within a step, and of the first of a step: in a process where Triton interprets."""
    reweighter, losses = Reweighter(ambiguity, memory=memory), torch.randn(memory)
    for part in losses.split(memory // 4):
        reweighter(part.requires_grad_())
        reweighter.step()

    def call() -> int:
        one = losses[:1].clone().requires_grad_()
        with Launches() as launches:
            reweighter(one)
        return launches.count

    _, _, within = call(), call(), call()
    reweighter.step()
    return [within, call()]


def counted(memory: int) -> list[Row]:
    """The launches of each set, those of the kernels in a process where Triton interprets."""
    by_kernels: dict[str, list[int]] = {}
    if find_spec("triton"):
        environment = os.environ | {"TRITON_INTERPRET": "1", "ROBUSTGRAD_KERNEL": "triton", "PYTHONWARNINGS": "ignore"}
        code = f"import memory_pool_cost as m, json; print(json.dumps(m.counted_by_kernels({memory})))"
        run = [sys.executable, "-c", code]
        found = subprocess.run(run, env=environment, check=True, capture_output=True, text=True, cwd=HERE)
        by_kernels = json.loads(found.stdout)
    nothing = [None, None]
    return [
        dict(
            zip(COUNTED, (repr(a), memory, launches_of_call(a, memory), *by_kernels.get(repr(a), nothing)), strict=True)
        )
        for a in SETS
    ]


def counted_by_kernels(memory: int) -> dict[str, list[int]]:
    return {repr(ambiguity): launches_by_kernels(ambiguity, memory) for ambiguity in SETS}


def measure(ambiguity: AmbiguitySet, memory: int, rounds: int, device: str) -> Row:
    generator = torch.Generator().manual_seed(memory)
    remembered = torch.randn(memory, dtype=torch.float64, generator=generator).to(device)
    weight, unit = torch.ones_like(remembered), remembered.new_ones(())
    step_size = remembered.new_full((), CALLS)

    def fit() -> object:
        return ambiguity.fit(remembered, weight, unit=unit, step_size=step_size)

    rule, step = ambiguity.fit(remembered, weight, unit=unit, step_size=step_size), step_of(ambiguity, memory, device)
    one, eight = remembered[:1] + 0.01, remembered[:8] + 0.01
    spent = interleaved(
        {
            "fit": fit,
            "ratio_1": lambda: rule.ratio(one, weight[:1]),
            "ratio_8": lambda: rule.ratio(eight, weight[:8]),
            "call": step,
            "sort": lambda: remembered.sort(),
            "mean": lambda: remembered.mean(),
        },
        rounds,
        device,
    )
    spent["call"] /= CALLS
    times = {f"{name}_us": round(us, 2) for name, us in spent.items()}
    return {"set": repr(ambiguity), "memory": memory, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, in seconds")
    parser.add_argument("--memory", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--count", action="store_true", help="only count launches")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    rounds, device, about = 3 if arguments.quick else 15, arguments.device, machine(arguments.device)
    launches = counted(arguments.memory)
    print_table(launches, COUNTED, about)
    write_csv(arguments.out / "memory_pool_launches.csv", launches, about)
    if not arguments.count:
        rows = [measure(ambiguity, arguments.memory, rounds, device) for ambiguity in SETS]
        print_table(rows, HEADS, about)
        write_csv(arguments.out / f"memory_pool_cost_{device}.csv", rows, about)


if __name__ == "__main__":
    main()
