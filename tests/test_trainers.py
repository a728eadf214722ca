"""Trainers of other libraries, unmodified: one optimizer step follows the hand-written weighted sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("trl")
import tiny
import trl
from peft import TaskType
from transformers import Trainer

from robustgrad import ChiSquare
from robustgrad.integrations.trl import robustify

pytestmark = tiny.OTHERS_WARNINGS
SET = ChiSquare(0.5)
CUTS = pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)], ids=lambda n: str(n))
N = 8


def log_probability(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Of the completion given the prompt: alone, unpadded."""
    ids = torch.tensor([prompt + completion])
    rows = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return rows[torch.arange(len(rows)), ids[0, 1:]][len(prompt) - 1 :].sum()


def reward_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    chosen, rejected = (
        model(input_ids=torch.tensor([row[f"{one}_ids"]])).logits[0, 0] for one in ("chosen", "rejected")
    )
    return F.softplus(rejected - chosen)


def centred_reward_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    chosen, rejected = (
        model(input_ids=torch.tensor([row[f"{one}_ids"]])).logits[0, 0] for one in ("chosen", "rejected")
    )
    return F.softplus(rejected - chosen) + 0.01 * (chosen + rejected) ** 2


def dpo_margin(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    def ratio(name: str) -> Tensor:
        with torch.no_grad():
            old = log_probability(reference, row["prompt_ids"], row[name])
        return log_probability(model, row["prompt_ids"], row[name]) - old

    return 0.1 * (ratio("chosen_ids") - ratio("rejected_ids"))


def dpo_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    return F.softplus(-dpo_margin(model, reference, row))


def hinge_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    return (1 - dpo_margin(model, reference, row)).clamp_min(0)


def kto_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        old = log_probability(reference, row["prompt_ids"], row["completion_ids"])
    ratio = log_probability(model, row["prompt_ids"], row["completion_ids"]) - old
    return torch.sigmoid(-0.1 * ratio) if row["label"] else torch.sigmoid(0.1 * ratio)


def sft_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    ids = row["input_ids"]
    return -log_probability(model, ids[:1], ids[1:]) * N / (sum(lengths_of_sentences()) - N)


def lengths_of_sentences() -> list[int]:
    return [len(text.split()) + 1 for text in tiny.sentences()["text"]]  # with the end token


@dataclass(frozen=True)
class Case:
    """One trainer: how to build it, and the loss of one example."""

    trainer: type
    config: type
    losses: Callable[[nn.Module, nn.Module, dict[str, Any]], Tensor]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def task(self) -> TaskType:
        return TaskType.SEQ_CLS if self.trainer is trl.RewardTrainer else TaskType.CAUSAL_LM

    def model(self, seed: int = 0) -> nn.Module:
        return tiny.classifier(seed=seed) if self.task is TaskType.SEQ_CLS else tiny.causal_lm(seed=seed)

    def dataset(self) -> Any:
        by_trainer = {trl.KTOTrainer: tiny.judged, trl.SFTTrainer: tiny.sentences}
        return by_trainer.get(self.trainer, tiny.pairs)()

    def build(self, folder: Path, micro_batch: int = 8, accumulation: int = 1, **changes: Any) -> Trainer:
        more = {"ref_model": self.model(1)} if self.trainer in (trl.DPOTrainer, trl.KTOTrainer) else {}
        for name in (
            "peft_config",
            "model",
            "train_dataset",
            "eval_dataset",
            "data_collator",
            "callbacks",
            "ref_model",
        ):
            if name in changes:
                more[name] = changes.pop(name)
        if "peft_config" in more:
            more.pop("ref_model", None)
        args = self.config(**tiny.arguments(folder, micro_batch, accumulation, **dict(self.options), **changes))
        more = {"model": self.model(), "train_dataset": self.dataset()} | more
        torch.manual_seed(7)
        return self.trainer(args=args, processing_class=tiny.tokenizer(), **more)


REWARD = Case(trl.RewardTrainer, trl.RewardConfig, reward_losses)
DPO = Case(trl.DPOTrainer, trl.DPOConfig, dpo_losses)
KTO = Case(trl.KTOTrainer, trl.KTOConfig, kto_losses, (("loss_type", "apo_zero_unpaired"),))
SFT = Case(trl.SFTTrainer, trl.SFTConfig, sft_losses)
CASES = {
    "reward": REWARD,
    "reward, centred": Case(
        trl.RewardTrainer, trl.RewardConfig, centred_reward_losses, (("center_rewards_coefficient", 0.01),)
    ),
    "dpo": DPO,
    "dpo hinge": Case(trl.DPOTrainer, trl.DPOConfig, hinge_losses, (("loss_type", ["hinge"]),)),
    "kto": KTO,
    "sft": SFT,
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MAIN = pytest.mark.parametrize("case", [REWARD, DPO, KTO, SFT], ids=["reward", "dpo", "kto", "sft"])


def expected(case: Case, trainer: Trainer, ambiguity: Any = SET, losses: Any = None) -> Tensor:
    """sum_i q_i grad loss_i, for the model as it is now, one example at a time."""
    model = trainer.model
    reference = getattr(trainer, "ref_model", None)
    if reference is None:
        reference = copy.deepcopy(case.model(0)) if case.losses in (dpo_losses, hinge_losses, kto_losses) else model
    losses = losses or (lambda row: case.losses(model, reference, row))
    each = torch.stack([losses(row) for row in trainer.train_dataset])
    weights = ambiguity.solve(each).weights
    grads = torch.autograd.grad((weights * each).sum(), tiny.trainable(model))
    return torch.cat([grad.flatten() for grad in grads])


def one_step(trainer: Trainer) -> Tensor:
    gradients = tiny.Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps[0]


@CUTS
@each_case
def test_window_is_exact_for_any_cut(case: Case, micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    trainer = case.build(tmp_path, micro_batch, accumulation)
    want = expected(case, trainer)
    got = one_step(robustify(trainer, SET, pool="window"))
    assert tiny.relative_error(got, want) < 1e-5
    assert tiny.relative_error(expected(case, trainer, ChiSquare(0.0)), want) > 0.1  # not plain averaging


@CUTS
@MAIN
def test_lora(case: Case, micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    trainer = case.build(tmp_path, micro_batch, accumulation, peft_config=tiny.lora(case.task))
    want = expected(case, trainer)
    got = one_step(robustify(trainer, SET, pool="window"))
    assert len(got) < 1000 and tiny.relative_error(got, want) < 1e-5
