"""Optimizer steps of LoRA training on two real models, timed in turns: what step and capture benchmarks share."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from measuring import Row, machine, print_table, write_csv
from torch import Tensor

from robustgrad.objectives import bradley_terry

sys.path.append(str(Path(__file__).parents[1] / "examples"))
ACCUMULATE = 4
Losses = Callable[[int], Tensor]  # the per-sample losses of one micro-batch
Step = Callable[[], None]
Measure = Callable[[str, torch.nn.Module, Losses, int], list[Row]]


def minilm() -> tuple[torch.nn.Module, Losses]:
    from lora_scorer import Scorer, encode, load_tokenizer, packaged_model
    from preference_pairs import generate

    tokenizer = load_tokenizer(packaged_model())
    scorer = Scorer(packaged_model(), tokenizer, torch.device("cpu"), seed=0)
    pairs = encode(tokenizer, generate(8 * ACCUMULATE, 0), 128)
    return scorer.model, lambda i: bradley_terry(*scorer(pairs[8 * i : 8 * i + 8]))


def smollm() -> tuple[torch.nn.Module, Losses]:
    from peft import LoraConfig, get_peft_model
    from small_models import language_model

    packed, _ = language_model(None, smoke=False)
    model = get_peft_model(packed, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.05))
    ids = torch.randint(100, 40000, (ACCUMULATE, 2, 48), generator=torch.Generator().manual_seed(0))

    def losses(i: int) -> Tensor:
        logits = model(input_ids=ids[i]).logits[:, :-1]
        score = logits.log_softmax(-1).gather(-1, ids[i][:, 1:, None]).squeeze(-1).sum(-1)
        return -torch.nn.functional.logsigmoid(0.1 * (score[:1] - score[1:]))

    return model, losses


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, Row]:
    """Of each method its time, and its ratio to the plain step of the same round with a 95% bootstrap interval."""
    methods, spent = list(steps), {method: list[float]() for method in steps}
    for _ in range(3):  # caches warm up; MiniLM fills the memory, 32 pairs a step
        for step in steps.values():
            step()
    for turn in range(rounds):
        first = turn % len(methods)
        for method in methods[first:] + methods[:first]:
            spent[method].append(timed(steps[method]))
    return {method: _beside(spent[method], spent["plain"]) for method in methods}


def _beside(spent: list[float], plain: list[float]) -> Row:
    ratios = [own / other for own, other in zip(spent, plain, strict=True)]
    rng = random.Random(0)
    medians = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"step_ms": round(1e3 * median(spent), 1), "times_plain": round(median(ratios), 4),
            "low": round(medians[50], 4), "high": round(medians[-51], 4)}  # fmt: skip


def run(about: str | None, measure: Measure, name: str) -> None:
    """The command line of a benchmark: measure on each model, print the table, write NAME.csv."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MiniLM only, three rounds, nothing written")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = []
    for title, build in {"MiniLM": minilm, **({} if arguments.quick else {"SmolLM2-135M": smollm})}.items():
        model, losses = build()
        model.train()
        rows += measure(title, model, losses, 3 if arguments.quick else arguments.rounds)
    where = machine("cpu")
    print_table(rows, list(rows[0]), where)
    if not arguments.quick:
        write_csv(arguments.out / f"{name}.csv", rows, where)
