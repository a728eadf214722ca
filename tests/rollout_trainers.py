"""TRL's policy-gradient trainers as cases, and the gradient of their first step, one completion at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import trl
from datasets import Dataset
from torch import Tensor, nn

PROMPTS, GENERATIONS, LONGEST = 4, 2, 5
KINDS = ("grpo", "rloo", "gmpo")
Lengths = Tensor  # tokens of each completion of the step

# On the first step every importance ratio is 1, and the loss types differ by what divides the sum over tokens.
DIVISOR: dict[str, Callable[[Lengths], Tensor]] = {
    "rloo": lambda lengths: torch.full_like(lengths, len(lengths)),
    "gmpo": lambda lengths: len(lengths) * lengths,
    "grpo": lambda lengths: len(lengths) * lengths,
    "sapo": lambda lengths: len(lengths) * lengths,
    "luspo": lambda lengths: torch.full_like(lengths, len(lengths)),
    "dr_grpo": lambda lengths: torch.full_like(lengths, len(lengths) * LONGEST),
    "bnpo": lambda lengths: lengths.sum().expand(len(lengths)),  # in one micro-batch
    "dapo": lambda lengths: lengths.sum().expand(len(lengths)),
    "cispo": lambda lengths: lengths.sum().expand(len(lengths)),
    "vespo": lambda lengths: lengths.sum().expand(len(lengths)),
}


def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """Words differ in worth, and so do prompts."""
    return [len(prompt) + sum(map(ord, text)) % 17 / 4 for prompt, text in zip(prompts, completions, strict=True)]


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": tiny.texts(PROMPTS, 6, 1), "domain": ["a", "b", "a", "b"]})


def build(kind: str, folder: Path, *cut: int, **changes: Any) -> Any:
    module = importlib.import_module("trl.experimental.gmpo") if kind == "gmpo" else trl
    trainer, config = getattr(module, f"{kind.upper()}Trainer"), getattr(module, f"{kind.upper()}Config")
    options = {"num_generations": GENERATIONS, "max_completion_length": LONGEST, "beta": 0.0, "temperature": 1.0}
    options |= {"loss_type": "grpo", "use_bias_correction_kl": True} if kind == "grpo" else {}
    objects = ("eval_dataset", "reward_funcs", "peft_config")
    more = {"reward_funcs": reward} | {name: changes.pop(name) for name in objects if name in changes}
    args = config(**tiny.arguments(folder, *cut, **(options | changes)))
    policy = tiny.causal_lm()
    if args.beta:  # the reference is loaded from where the policy came from
        tiny.causal_lm(1).save_pretrained(folder / "reference")
        policy.config._name_or_path = str(folder / "reference")
    torch.manual_seed(7)
    return trainer(model=policy, args=args, train_dataset=prompts(), processing_class=tiny.tokenizer(), **more)


def spy(trainer: Any) -> dict[str, Any]:
    """The rollout before robustness, with the rewards of all ranks; filled in as the trainer goes."""
    seen: dict[str, Any] = {}
    rewards, score = trainer._calculate_rewards, trainer._generate_and_score_completions

    def calculate(*args: Any) -> Tensor:
        seen["rewards"] = rewards(*args)
        return seen["rewards"]

    def generate(inputs: Any) -> dict[str, Any]:
        out = score(inputs)
        seen["rollout"] = {name: value for name, value in out.items() if isinstance(value, Tensor)}
        return out

    trainer._calculate_rewards, trainer._generate_and_score_completions = calculate, generate
    return seen


def prompt_ratio(ambiguity: Any, rewards: Tensor) -> Tensor:
    """Of each completion: the adversary picks prompts by minus their mean reward."""
    risk = -rewards.sum(-1).reshape(-1, GENERATIONS).mean(-1)
    ratio: Tensor = ambiguity.solve(risk).ratio.repeat_interleave(GENERATIONS)
    assert ratio.max() > 1.2
    return ratio


def completions(rollouts: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Prompt, completion, advantage: unpadded, of all ranks."""
    return [
        (
            rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()],
            rollout["completion_ids"][i][rollout["completion_mask"][i].bool()],
            rollout["advantages"][i],
        )
        for rollout in rollouts
        for i in range(len(rollout["advantages"]))
    ]


def log_probabilities(model: nn.Module, prompt: Tensor, completion: Tensor) -> Tensor:
    """Of the tokens of the completion."""
    logits = model(input_ids=torch.cat((prompt, completion))[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion)), completion]


def objective(
    kind: str, model: nn.Module, rollouts: list[dict[str, Tensor]], ratio: Tensor,
    beta: float = 0.0, reference: nn.Module | None = None,
) -> Tensor:  # fmt: skip
    """sum_i (ratio_i policy loss_i + beta KL_i) / divisor_i: has the gradient of the first robust step."""
    rows = completions(rollouts)
    divisor = DIVISOR[kind](torch.tensor([len(completion) for _, completion, _ in rows], dtype=torch.float32))
    total = torch.zeros(())
    for i, (prompt, completion, advantage) in enumerate(rows):
        logp = log_probabilities(model, prompt, completion)
        total = total - ratio[i] * advantage * logp.sum() / divisor[i]
        if reference is not None:
            ahead = log_probabilities(reference, prompt, completion).detach() - logp
            each = ahead.exp() - ahead - 1
            # TRL multiplies the term by the importance ratio: of the token, or of the sequence.
            towards = logp.mean().expand_as(logp) if kind == "luspo" else logp
            total = total + beta * (each + each.detach() * towards).sum() / divisor[i]
    return total
