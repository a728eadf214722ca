"""Frozen features: every prompt and every response embedded once, and kept in a cache outside the repository."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from preference_pairs import Pair
from torch import Tensor

from .sets import Sets

MAX_LENGTH = 128
_SIZE = 64  # texts in a forward pass


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "robustgrad" / "ood_protocol"


@dataclass(frozen=True)
class Features:
    """Embeddings of the pairs of a set, (n, d) each, of length 1."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor

    def at(self, index: Tensor) -> Features:
        return Features(self.prompt[index], self.chosen[index], self.rejected[index])

    def without_prompts(self) -> Features:
        return Features(self.prompt[:, :0], self.chosen, self.rejected)

    def swapped(self, swap: Tensor) -> Features:
        """With the two responses exchanged where `swap` (n,) says so."""
        a, b, other = self.chosen, self.rejected, swap[:, None]
        return Features(self.prompt, torch.where(other, b, a), torch.where(other, a, b))


def embed_sets(sets: Sets, cache: Path) -> dict[str, Features]:
    return {name: _cached(name, pairs, cache) for name, pairs in sets.all().items()}


def _cached(name: str, pairs: Sequence[Pair], cache: Path) -> Features:
    digest = hashlib.sha256(f"minilm {MAX_LENGTH}".encode())
    for pair in pairs:
        digest.update("\0".join((pair.prompt, pair.chosen, pair.rejected)).encode())
    path = cache / f"{name}-{digest.hexdigest()[:16]}.pt"
    if not path.exists():
        features = [
            # The question stands at the end of a prompt, the answer begins a response.
            embed([pair.prompt for pair in pairs], "left"),
            embed([pair.chosen for pair in pairs], "right"),
            embed([pair.rejected for pair in pairs], "right"),
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(features, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        print(f"embedded {name}: {len(pairs)} pairs", flush=True)
    return Features(*torch.load(path, weights_only=True))


@torch.inference_mode()
def embed(texts: Sequence[str], side: str) -> Tensor:
    """Mean of the last hidden states, normalised, as MiniLM was trained."""
    model, tokenizer = _encoder(side)
    unique = list(dict.fromkeys(texts))
    ids = tokenizer(unique, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    order = sorted(range(len(unique)), key=lambda i: len(ids[i]))
    out = torch.empty(len(unique), model.config.hidden_size)
    for start in range(0, len(order), _SIZE):
        places = order[start : start + _SIZE]
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in places]}, return_tensors="pt")
        hidden, real = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        out[places] = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)
    place = {text: i for i, text in enumerate(unique)}
    return out[[place[text] for text in texts]].clone()


def _encoder(side: str):
    import transformers
    from lora_scorer import loading, packaged_model

    name = packaged_model()
    with loading(name):
        model = transformers.AutoModel.from_pretrained(name).eval()
        return model, transformers.AutoTokenizer.from_pretrained(name, truncation_side=side)
