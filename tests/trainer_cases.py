"""The trainers of TRL as cases: how to build one on tiny models, and the loss of one example, written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.nn.functional as F
import trl
from peft import TaskType
from torch import Tensor, nn
from trainer_steps import SET, N, Row, counted, gradient, remembered, worst
from transformers import Trainer

_OBJECTS = ("peft_config", "model", "train_dataset", "eval_dataset", "data_collator", "callbacks", "ref_model")


def log_probabilities(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Of the tokens of the completion given the prompt: alone, unpadded."""
    ids = torch.tensor([prompt + completion])
    rows = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return rows[torch.arange(len(rows)), ids[0, 1:]][len(prompt) - 1 :]


def log_probability(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    return log_probabilities(model, prompt, completion).sum()


def log_ratio(model: nn.Module, reference: nn.Module, row: Row, name: str = "completion_ids") -> Tensor:
    with torch.no_grad():
        old = log_probability(reference, row["prompt_ids"], row[name])
    return log_probability(model, row["prompt_ids"], row[name]) - old


def rewards(model: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected one."""
    ids = (torch.tensor([row[f"{one}_ids"]]) for one in ("chosen", "rejected"))
    chosen, rejected = (model(input_ids=one).logits[0, 0] for one in ids)
    return chosen, rejected


def reward_loss(model: nn.Module, reference: nn.Module, row: Row) -> Tensor:
    chosen, rejected = rewards(model, row)
    return F.softplus(rejected - chosen)


def centred_reward_loss(model: nn.Module, reference: nn.Module, row: Row) -> Tensor:
    chosen, rejected = rewards(model, row)
    return F.softplus(rejected - chosen) + 0.01 * (chosen + rejected) ** 2


def dpo_margin(model: nn.Module, reference: nn.Module, row: Row) -> Tensor:
    chosen, rejected = (log_ratio(model, reference, row, name) for name in ("chosen_ids", "rejected_ids"))
    return 0.1 * (chosen - rejected)


def dpo_loss(model: nn.Module, reference: nn.Module, row: Row) -> Tensor:
    return F.softplus(-dpo_margin(model, reference, row))


def hinge_loss(model: nn.Module, reference: nn.Module, row: Row) -> Tensor:
    return (1 - dpo_margin(model, reference, row)).clamp_min(0)


def kto_loss(model: nn.Module, reference: nn.Module, row: Row, kl: Tensor | float = 0.0) -> Tensor:
    sign = 1 if row["label"] else -1
    return torch.sigmoid(-0.1 * sign * (log_ratio(model, reference, row) - kl))


def sft_loss(model: nn.Module, reference: nn.Module, row: Row) -> Tensor:
    """The sum over its tokens; see `Case.by_token`."""
    return -log_probability(model, row["input_ids"][:1], row["input_ids"][1:])


def dft_loss(model: nn.Module, reference: nn.Module, row: Row) -> Tensor:
    """Each token's log-probability times its own probability, which is held fixed."""
    logp = log_probabilities(model, row["input_ids"][:1], row["input_ids"][1:])
    return -(logp.exp().detach() * logp).sum()


@dataclass(frozen=True)
class Case:
    """One trainer: how to build it, and the loss of one example."""

    trainer: type
    config: type
    loss: Callable[[nn.Module, nn.Module, Row], Tensor]
    options: tuple[tuple[str, Any], ...] = ()
    by_token: bool = False  # the loop divides the sum over tokens by their count in the whole step

    @property
    def task(self) -> TaskType:
        return TaskType.SEQ_CLS if self.trainer is trl.RewardTrainer else TaskType.CAUSAL_LM

    @property
    def has_reference(self) -> bool:
        return self.trainer in (trl.DPOTrainer, trl.KTOTrainer)

    def model(self, seed: int = 0) -> nn.Module:
        return tiny.classifier(seed=seed) if self.task is TaskType.SEQ_CLS else tiny.causal_lm(seed=seed)

    def dataset(self, n: int = N) -> Any:
        by_trainer = {trl.KTOTrainer: tiny.judged, trl.SFTTrainer: tiny.sentences}
        return by_trainer.get(self.trainer, tiny.pairs)(n)

    def build(self, folder: Path, micro_batch: int = 8, accumulation: int = 1, **changes: Any) -> Trainer:
        more = {"ref_model": self.model(1)} if self.has_reference else {}
        more |= {name: changes.pop(name) for name in _OBJECTS if name in changes}
        if "peft_config" in more:
            more.pop("ref_model", None)
        args = self.config(**tiny.arguments(folder, micro_batch, accumulation, **(dict(self.options) | changes)))
        more = {"model": self.model(), "train_dataset": self.dataset()} | more
        torch.manual_seed(7)
        return self.trainer(args=args, processing_class=tiny.tokenizer(), **more)

    def losses(self, trainer: Trainer, rows: Sequence[Row]) -> Tensor:
        """Of the samples of one optimizer step, in the size that the loop gives them: their mean is its loss."""
        model = trainer.model
        reference = getattr(trainer, "ref_model", None)
        if reference is None:  # of an adapter it is the model below
            reference = copy.deepcopy(self.model(0)) if self.has_reference else model
        each = torch.stack([self.loss(model, reference, row) for row in rows])
        return each * len(rows) / counted(trainer, rows) if self.by_token else each


REWARD = Case(trl.RewardTrainer, trl.RewardConfig, reward_loss)
CENTRED = Case(trl.RewardTrainer, trl.RewardConfig, centred_reward_loss, (("center_rewards_coefficient", 0.01),))
DPO = Case(trl.DPOTrainer, trl.DPOConfig, dpo_loss)
HINGE = Case(trl.DPOTrainer, trl.DPOConfig, hinge_loss, (("loss_type", ["hinge"]),))
KTO = Case(trl.KTOTrainer, trl.KTOConfig, kto_loss, (("loss_type", "apo_zero_unpaired"),))
SFT = Case(trl.SFTTrainer, trl.SFTConfig, sft_loss, by_token=True)
DFT = Case(trl.SFTTrainer, trl.SFTConfig, dft_loss, (("loss_type", "dft"),), by_token=True)
MAIN = {"reward": REWARD, "dpo": DPO, "kto": KTO, "sft": SFT}
CASES = MAIN | {"reward, centred": CENTRED, "dpo hinge": HINGE, "sft dft": DFT}


def expected(case: Case, trainer: Trainer, ambiguity: Any = SET) -> Tensor:
    """sum_i q_i grad loss_i, for the model as it is now, one example at a time."""
    return gradient(worst(case.losses(trainer, list(trainer.train_dataset)), ambiguity), trainer.model)


def ten_remembered_steps(case: Case, trainer: Trainer) -> list[Tensor]:
    """Of eight samples each, in the order of the dataset."""
    rows = list(trainer.train_dataset)
    return remembered([case.losses(trainer, rows[i : i + N]) for i in range(0, 10 * N, N)], trainer.model)


def losses_with_kl(trainer: Trainer, together: int) -> Tensor:
    """KTO's losses with its KL term, of which each `together` examples in a row share one."""
    losses, rows, models = [], list(trainer.train_dataset), (trainer.model, trainer.ref_model)
    for start in range(0, len(rows), together):
        part = rows[start : start + together]
        kl = torch.stack([log_ratio(*models, row, "KL_completion_ids").detach() for row in part]).mean().clamp_min(0)
        losses += [kto_loss(*models, row, kl) for row in part]
    return torch.stack(losses)
