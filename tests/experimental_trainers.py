"""TRL's experimental preference trainers as cases, and the losses of their pairs written by hand."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_steps import in_order

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
DEFAULTS = {"CPO": {"cpo_alpha": 1.0, "beta": 0.1}, "ORPO": {"beta": 0.1}}
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 0.1}
BETA = 0.1


def build(name: str, folder: Path, *cut: int, **changes: Any) -> Any:

    module = importlib.import_module(f"trl.experimental.{name.lower()}")
    trainer, config = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    more = {"peft_config": changes.pop("peft_config")} if "peft_config" in changes else {}
    args = config(**tiny.arguments(folder, *cut, **(DEFAULTS.get(name, {}) | changes)))
    data, tokenizer = tiny.pairs(), tiny.tokenizer()
    torch.manual_seed(7)
    return in_order(trainer(model=tiny.causal_lm(), args=args, train_dataset=data, processing_class=tokenizer, **more))


def token_log_probabilities(model: nn.Module, ids: list[int]) -> Tensor:
    """Of all tokens but the first, alone and unpadded."""
    logp = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logp[torch.arange(len(logp)), torch.tensor(ids[1:])]


def completion(model: nn.Module, row: dict[str, Any], name: str) -> Tensor:
    """Log-probabilities of the labelled tokens."""
    kept = torch.tensor(row[f"{name}_labels"][1:]) != -100
    return token_log_probabilities(model, row[f"{name}_input_ids"])[kept]


def simpo(model: nn.Module, row: dict[str, Any]) -> Tensor:
    margin = completion(model, row, "chosen").mean() - completion(model, row, "rejected").mean()
    return F.softplus(-BETA * (margin - 0.5 / BETA))


def odds_ratio(model: nn.Module, row: dict[str, Any]) -> Tensor:
    """ORPO's, of mean log-probabilities."""
    logp = [completion(model, row, name).mean() for name in ("chosen", "rejected")]
    chosen, rejected = (one - torch.log(-torch.expm1(one)) for one in logp)
    return -BETA * F.logsigmoid(chosen - rejected)


def cpo(model: nn.Module, row: dict[str, Any]) -> Tensor:
    return F.softplus(-BETA * (completion(model, row, "chosen").sum() - completion(model, row, "rejected").sum()))


def losses(name: str, model: nn.Module, rows: Sequence[dict[str, Any]], together: int) -> Tensor:
    """With the likelihood of the chosen one, a mean over the tokens of each micro-batch (`together` pairs)."""
    likelihoods, preferences = [], []
    for row in rows:
        preferences.append(odds_ratio(model, row) if name == "ORPO" else cpo(model, row))
        whole = name == "ORPO"  # prompt and completion
        ids = row["chosen_input_ids"]
        likelihoods.append(-(token_log_probabilities(model, ids) if whole else completion(model, row, "chosen")))
    shares = []
    for start in range(0, len(rows), together):
        part = likelihoods[start : start + together]
        shares += [tokens.sum() * len(part) / sum(map(len, part)) for tokens in part]
    return torch.stack(preferences) + torch.stack(shares)


def length_reward(completions: Sequence[str], **kwargs: Any) -> list[float]:
    return [sum(map(ord, text)) % 17 / 4 for text in completions]


def online(folder: Path, *cut: int, **changes: Any) -> Any:
    """OnlineDPO over the prompts, which differ in their domain."""

    module = importlib.import_module("trl.experimental.online_dpo")
    options = {"max_new_tokens": 5, "beta": BETA, "temperature": 1.0} | changes
    args = module.OnlineDPOConfig(**tiny.arguments(folder, *cut, **options))
    data = tiny.pairs().select_columns(["prompt"]).add_column("domain", [0, 1] * 4)
    torch.manual_seed(7)
    models = {"model": tiny.causal_lm(), "ref_model": tiny.causal_lm(1)}
    trainer = module.OnlineDPOTrainer(
        args=args, reward_funcs=length_reward, train_dataset=data, processing_class=tiny.tokenizer(), **models
    )
    return in_order(trainer)


def spy(trainer: Any) -> list[Any]:
    """What each micro-batch generated, and the rewards of it; filled in as the trainer goes."""
    seen: list[Any] = []
    generate, score = trainer._generate, trainer._calculate_rewards_from_functions

    def generating(*args: Any) -> Any:
        seen.append([generate(*args)])
        return seen[-1][0]

    def scoring(*args: Any, **kwargs: Any) -> Tensor:
        seen[-1].append(score(*args, **kwargs))
        return seen[-1][1]

    trainer._generate, trainer._calculate_rewards_from_functions = generating, scoring
    return seen


def online_losses(trainer: Any, batch: Any) -> Tensor:
    """Of the pairs of one micro-batch: the first halves of the completions against the second ones."""
    (prompt, prompt_mask, completion, completion_mask, *_), rewards = batch

    def ahead(i: int) -> Tensor:
        start, end = prompt[i][prompt_mask[i].bool()], completion[i][completion_mask[i].bool()]
        ids = torch.cat((start, end)).tolist()
        ours, theirs = (token_log_probabilities(m, ids)[-len(end) :].sum() for m in (trainer.model, trainer.ref_model))
        return ours - theirs.detach()

    n = len(rewards) // 2
    margins = torch.stack([ahead(i) - ahead(i + n) for i in range(n)])
    return F.softplus(-BETA * torch.where(rewards[:n] >= rewards[n:], margins, -margins))
