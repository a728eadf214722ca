"""Tiny models, a tokenizer and data for the trainers of other libraries: random weights, no download."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

# What the libraries say about their own options is not about us.
OTHERS_WARNINGS = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
WORDS = [*"abcdefghijklmnopqrstu"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"vocab_size": len(WORDS) + 4, "max_position_embeddings": 64, "attn_implementation": "eager"}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    return LlamaConfig(**(sizes | options | tokens | {"num_key_value_heads": 2} | changes))


def causal_lm(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**changes))


def classifier(labels: int = 1, seed: int = 0, **changes: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(num_labels=labels, **changes))


def lora(task: TaskType) -> LoraConfig:
    # init_lora_weights=False: with zeros half of the gradients would be zero.
    return LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0)


def texts(n: int, length: int, seed: int) -> list[str]:
    """Sentences of 2 to `length` words."""
    random = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=random))

    return [" ".join(WORDS[draw(len(WORDS))] for _ in range(2 + draw(length - 1))) for _ in range(n)]


def pairs(n: int = 8) -> Dataset:
    return Dataset.from_dict({"prompt": texts(n, 4, 1), "chosen": texts(n, 6, 2), "rejected": texts(n, 6, 3)})


def judged(n: int = 8) -> Dataset:
    label = [i % 3 != 1 for i in range(n)]
    return Dataset.from_dict({"prompt": texts(n, 4, 1), "completion": texts(n, 6, 2), "label": label})


def sentences(n: int = 8) -> Dataset:
    return Dataset.from_dict({"text": texts(n, 8, 4)})


def arguments(folder: Any, micro_batch: int, accumulation: int, **changes: Any) -> dict[str, Any]:
    """One optimizer step, in float32 on the CPU; the gradient is not clipped."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim": "sgd",
        "dataloader_pin_memory": False,
    } | changes


class Gradients(TrainerCallback):
    """The gradient of every optimizer step, all trainable parameters in one vector."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(flat_gradient(model))


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """Whole, where it is sharded."""
    grads = [p.grad for p in trainable(model)]
    return torch.cat([(grad.full_tensor() if isinstance(grad, DTensor) else grad).flatten() for grad in grads])


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
