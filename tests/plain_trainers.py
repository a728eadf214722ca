"""The plain Trainer as cases: classifier, regression, causal LM, and the loss of one example written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from peft import TaskType, get_peft_model
from torch import Tensor, nn
from trainer_steps import N, Row, counted, gradient, steps
from transformers import Trainer, TrainingArguments

LENGTH, LABELS = 6, 3
KINDS = ("classes", "regression", "tokens")


def rows(kind: str, n: int = N) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 20, (n, LENGTH), generator=random)
    labels = {
        "classes": torch.arange(n) % LABELS,
        "regression": torch.randn(n, generator=random),
        "tokens": ids.masked_fill(torch.arange(LENGTH) >= 3 + torch.arange(n)[:, None] % 4, -100),
    }[kind]
    return [{"input_ids": ids[i], "attention_mask": torch.ones_like(ids[i]), "labels": labels[i]} for i in range(n)]


def model(kind: str, adapter: bool = False) -> nn.Module:
    bare = tiny.causal_lm() if kind == "tokens" else tiny.classifier({"classes": LABELS, "regression": 1}[kind])
    task = TaskType.CAUSAL_LM if kind == "tokens" else TaskType.SEQ_CLS
    return get_peft_model(bare, tiny.lora(task)) if adapter else bare


def build(folder: Path, kind: str, cut: tuple[int, int] = (8, 1), n: int = N, **changes: Any) -> Trainer:
    objects = {name: changes.pop(name) for name in ("model", "train_dataset", "compute_loss_func") if name in changes}
    args = TrainingArguments(**tiny.arguments(folder, *cut, **changes))
    return Trainer(args=args, **({"model": model(kind), "train_dataset": rows(kind, n)} | objects))


def loss(kind: str, model: nn.Module, row: Row) -> Tensor:
    """Of a causal LM, the sum over its tokens."""
    logits = model(input_ids=row["input_ids"][None]).logits
    if kind == "tokens":
        return F.cross_entropy(logits[0, :-1], row["labels"][1:], reduction="sum")
    if kind == "classes":
        return F.cross_entropy(logits, row["labels"][None])
    return (logits[0, 0] - row["labels"]).square()


def losses(kind: str, trainer: Trainer, rows: Sequence[Row]) -> Tensor:
    each = torch.stack([loss(kind, trainer.model, row) for row in rows])
    return each * len(rows) / counted(trainer, rows) if kind == "tokens" else each


def own_scale(kind: str, folder: Path, cut: tuple[int, int]) -> float:
    """By how much the untouched loop's gradient exceeds that of the mean; ours to keep, not to mend."""
    trainer = build(folder, kind, cut, learning_rate=0.0)
    want = gradient(losses(kind, trainer, trainer.train_dataset).mean(), trainer.model)
    return scale_between(steps(trainer)[0], want)


def scale_between(got: Tensor, want: Tensor) -> float:
    scale = (got.norm() / want.norm()).item()
    assert tiny.relative_error(got, scale * want) < 1e-5
    return scale
