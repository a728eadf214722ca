"""Where the reward of a response comes from: the rule of these examples, or a model that classifies sequences."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from lora_scorer import loading, saved_scorer
from preference_pairs import DOMAINS
from torch import Tensor

from robustgrad.baselines import pessimistic_rewards

COURTEOUS = ("thank", "please", "happy", "glad", "sorry", "welcome", "hope", "help", "sure", "appreciate")
POLITE = {domain.name for domain in DOMAINS if domain.polite_wins}
LONGEST = 1024  # tokens that a reward model reads

# (prompts, domains, responses) -> (n,) on the CPU
Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], Tensor]


def rule(domain: str, text: str) -> float:
    """In [0, 1]: courtesy where the domain likes it (support, travel), brevity elsewhere.

    A policy that serves the many prompts of the first kind pays for it on the few of the second.
    """
    words = text.lower().split()
    if domain in POLITE:
        return min(3, sum(word.startswith(COURTEOUS) for word in words)) / 3
    return max(0.0, 1 - len(words) / 12)


def rule_reward(prompts: Sequence[str], domains: Sequence[str], responses: Sequence[str]) -> Tensor:
    return torch.tensor([rule(domain, text) for domain, text in zip(domains, responses, strict=True)])


class ModelReward:
    """The score of a reward model for prompt and response.

    Args:
        name: a folder that reward_model.py saved, or folder or hub name of any sequence classifier.
        labels: which outputs count, and how much: label or number of the output to its factor. Outputs are
            logits where there is one, else probabilities: of each label alone where the model says that
            several may hold, of one among all otherwise. A model that brings its own `rewards` and `score`
            (ArmoRM) gives those. None: the score, or the only logit.
        trust_remote_code: run the code that the model brings.
    Raises: ValueError: the model cannot be loaded, or has no such label; several labels, and none chosen.
    """

    def __init__(
        self, name: str, labels: dict[str, float] | None, device: torch.device, trust_remote_code: bool = False
    ) -> None:
        with loading(name, "--reward-model"):
            if (Path(name) / "adapter_config.json").exists():
                self.tokenizer, model = saved_scorer(name)
            else:
                trusted = {"trust_remote_code": trust_remote_code}
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, truncation_side="left", **trusted)
                model = transformers.AutoModelForSequenceClassification.from_pretrained(name, **trusted)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model, self.labels = model.to(device).eval(), labels or {}
        self([""], [""], [" "])  # a label that is not there shows now

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[str], domains: Sequence[str], responses: Sequence[str], size: int = 16
    ) -> Tensor:
        texts = [self.text(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        longest = min(self.tokenizer.model_max_length, LONGEST)
        rewards = []
        for start in range(0, len(texts), size):
            inputs = self.tokenizer(
                texts[start : start + size], padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            rewards.append(self._reward(self.model(**inputs.to(self.model.device))))
        return torch.cat(rewards).float().cpu()

    def text(self, prompt: str, response: str) -> str:
        """In the model's chat format, where it has one; otherwise as reward_model.py reads it."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return f"{prompt} {response}"
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False)

    def _reward(self, out: transformers.utils.ModelOutput) -> Tensor:
        values = self._values(out)
        if not self.labels:
            if (score := getattr(out, "score", None)) is not None:
                return score.reshape(-1)
            if values.shape[1] != 1:
                raise ValueError(f"--reward-label must be given for a model with labels {self._names()}, got none.")
            return values[:, 0]
        return sum(factor * values[:, self._place(label, values.shape[1])] for label, factor in self.labels.items())

    def _values(self, out: transformers.utils.ModelOutput) -> Tensor:
        """(n, outputs)."""
        if (rewards := getattr(out, "rewards", None)) is not None:
            return rewards
        if out.logits.shape[1] == 1:
            return out.logits
        several = self.model.config.problem_type == "multi_label_classification"
        return out.logits.float().sigmoid() if several else out.logits.float().softmax(-1)

    def _place(self, label: str, count: int) -> int:
        names = {str(name).lower(): place for place, name in self.model.config.id2label.items()}
        place = names.get(label.lower(), int(label) if label.isdecimal() else count)
        if place >= count:
            raise ValueError(
                f"--reward-label must be one of {self._names()} or a number below {count}, got {label!r}. "
                "Look them up in the model's config.json."
            )
        return place

    def _names(self) -> list[str]:
        return list(self.model.config.id2label.values())


class EnsembleReward:
    """The worst case over several reward models under a KL penalty, arXiv 2606.09073."""

    def __init__(self, members: Sequence[Reward], temperature: float) -> None:
        self.members, self.temperature = members, temperature

    def __call__(self, prompts: Sequence[str], domains: Sequence[str], responses: Sequence[str]) -> Tensor:
        rewards = torch.stack([member(prompts, domains, responses) for member in self.members])
        return pessimistic_rewards(rewards, temperature=self.temperature)


def label_factor(text: str) -> tuple[str, float]:
    """LABEL, or LABEL=FACTOR."""
    label, _, factor = text.partition("=")
    return label, float(factor or 1)


def add_reward_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--reward-model",
        nargs="+",
        metavar="NAME",
        help="folder of reward_model.py, or any classifier; several: the worst",
    )
    add("--ensemble-temperature", type=float, default=1.0, help="of the worst of several, in units of the reward")
    add("--reward-label", type=label_factor, nargs="+", metavar="LABEL[=FACTOR]", help="its outputs that count")
    add("--trust-remote-code", action="store_true", help="run the code that the reward model brings")


def load_reward(args: argparse.Namespace) -> Reward:
    if args.reward_model is not None:
        labels = dict(args.reward_label or ())
        members = [ModelReward(name, labels, args.device, args.trust_remote_code) for name in args.reward_model]
        return members[0] if len(members) == 1 else EnsembleReward(members, args.ensemble_temperature)
    if args.reward_label or args.trust_remote_code:
        raise ValueError("--reward-model must be given with --reward-label and --trust-remote-code. Name the model.")
    return rule_reward
