"""A language model with LoRA adapters as the reward model: the same tasks, texts instead of features."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import transformers
from lora_scorer import Encoded, Scorer
from preference_pairs import Pair
from torch import Tensor

from robustgrad.objectives import bradley_terry

from .measures import measured, outcomes
from .methods import Batch, Make
from .runs import Row, rounded
from .tasks import Task

BATCH = 16
LEARNING_RATE = {"LoRA": 3e-4, "full": 1e-4}


class Training(NamedTuple):
    steps: int
    max_length: int  # tokens of a sequence
    rate: float


@dataclass(frozen=True)
class Texts:
    """The texts behind the rows of a task."""

    pool: list[Pair]
    evals: dict[str, list[Pair]]


def swapped(pairs: Sequence[Pair], swap: Tensor) -> list[Pair]:
    return [
        Pair(p.prompt, p.rejected, p.chosen, p.domain) if other else p
        for p, other in zip(pairs, swap.tolist(), strict=True)
    ]


def encode(tokenizer: transformers.PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int) -> list[Encoded]:
    """The end of the prompt, in a quarter of the room, and the beginning of the response: as the features have it."""
    room = max_length // 4

    def tokens(texts: list[str], side: str, most: int) -> list[list[int]]:
        tokenizer.truncation_side = side
        return tokenizer(texts, truncation=True, max_length=most)["input_ids"]

    prompts = tokens([pair.prompt for pair in pairs], "left", room)
    chosen = tokens([pair.chosen for pair in pairs], "right", max_length - room)
    rejected = tokens([pair.rejected for pair in pairs], "right", max_length - room)
    begins = int(tokenizer.cls_token_id is not None)  # a response begins no text
    return [(p + a[begins:], p + b[begins:]) for p, a, b in zip(prompts, chosen, rejected, strict=True)]


class Averaged(Scorer):
    """Of the mean of the last hidden states, as MiniLM was trained to be read; its first token's was not."""

    def rewards(self, inputs: transformers.BatchEncoding) -> Tensor:
        hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-1].float()
        real = inputs["attention_mask"][..., None]
        rewards: Tensor = self.model.classifier((hidden * real).sum(1) / real.sum(1))
        return rewards


def run_language(
    load: Callable[[int], Scorer], task: Task, texts: Texts, make: Make, seed: int, training: Training
) -> Row:
    """Train one model and judge it; no validation: only the last iterate is reported."""
    began, scorer = time.perf_counter(), load(seed)
    rows = task.index[seed]
    pairs = swapped([texts.pool[i] for i in rows.tolist()], task.swapped[seed])
    pairs = encode(scorer.tokenizer, pairs, training.max_length)
    _train(scorer, pairs, task, rows, make(task.counts(seed)), seed, training)
    lead = {name: scorer.leads(encode(scorer.tokenizer, own, training.max_length)) for name, own in texts.evals.items()}
    return {
        "seed": seed,
        "measures": {"last": rounded({name: measured(lead[name], task.evals[name]) for name in lead})},
        "outcomes": {name: outcomes(own) for name, own in lead.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }


def _train(
    scorer: Scorer, pairs: list[Encoded], task: Task, rows: Tensor, method: Callable, seed: int, training: Training
) -> None:
    torch.manual_seed(seed)
    scorer.model.train()
    parameters = [p for p in scorer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=training.steps)
    for place in _batches(len(pairs), training.steps, seed):
        chosen, rejected = scorer([pairs[i] for i in place.tolist()])
        losses, own = bradley_terry(chosen, rejected), rows[place]
        method(Batch(chosen - rejected, losses, task.domains[own], task.membership[own])).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The same for every method."""
    generator, left = torch.Generator().manual_seed(1000 + seed), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(left) < BATCH:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:BATCH]
        left = left[BATCH:]
