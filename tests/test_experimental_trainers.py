"""TRL's experimental trainers: where capture finds the losses, and what is said where it does not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("trl")
import tiny

from robustgrad import ChiSquare
from robustgrad.integrations.trl import robustify

pytestmark = [*tiny.OTHERS_WARNINGS, pytest.mark.filterwarnings("ignore")]
SET = ChiSquare(0.5)
N = 8


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def build(name: str, folder: Path, *cut: int, **options: Any) -> Any:
    module = importlib.import_module(f"trl.experimental.{name.lower()}")
    trainer, config = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    args = config(**tiny.arguments(folder, *cut, **options))
    return trainer(model=tiny.causal_lm(), args=args, train_dataset=tiny.pairs(), processing_class=tiny.tokenizer())


def completion(model: nn.Module, row: dict[str, Any], name: str) -> Tensor:
    """Log-probabilities of the labelled tokens, alone and unpadded."""
    ids, labels = (torch.tensor(row[f"{name}_{what}"]) for what in ("input_ids", "labels"))
    logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    kept = labels[1:] != -100
    return logp[torch.arange(len(logp)), ids[1:]][kept]


def expected(trainer: Any, each: Tensor) -> Tensor:
    grads = torch.autograd.grad((SET.solve(each).weights * each).sum(), tiny.trainable(trainer.model))
    return torch.cat([grad.flatten() for grad in grads])


def step(trainer: Any) -> Tensor:
    gradients = tiny.Gradients()
    trainer.add_callback(gradients)
    robustify(trainer, SET, pool="window").train()
    return gradients.steps[0]


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)], ids=str)
def test_simpo(micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 0.1}
    trainer = build("CPO", tmp_path, micro_batch, accumulation, **options)
    margins = [
        completion(trainer.model, row, "chosen").mean() - completion(trainer.model, row, "rejected").mean()
        for row in trainer.train_dataset
    ]
    want = expected(trainer, F.softplus(-0.1 * (torch.stack(margins) - 0.5 / 0.1)))
    assert tiny.relative_error(step(trainer), want) < 1e-5


def test_cpo_with_its_likelihood_term(tmp_path: Path) -> None:
    """The likelihood is reduced inside cross_entropy, over the tokens of the batch."""
    trainer = build("CPO", tmp_path, 8, 1, cpo_alpha=1.0, beta=0.1)
    chosen = [completion(trainer.model, row, "chosen") for row in trainer.train_dataset]
    rejected = [completion(trainer.model, row, "rejected") for row in trainer.train_dataset]
    margins = torch.stack([c.sum() - r.sum() for c, r in zip(chosen, rejected, strict=True)])
    likelihood = torch.stack([-c.sum() for c in chosen]) * N / sum(len(c) for c in chosen)
    want = expected(trainer, F.softplus(-0.1 * margins) + likelihood)
    assert tiny.relative_error(step(trainer), want) < 1e-5


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (1, 8)], ids=str)
def test_orpo_makes_up_the_whole_loss(micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    trainer = build("ORPO", tmp_path, micro_batch, accumulation)
    robustify(trainer, SET, pool="window").train()
    log = trainer.state.log_history[0]
    assert log["robust/mean"] == pytest.approx(log["loss"], rel=1e-5) and log["robust/gap"] > 0


def test_an_unknown_trainer_is_an_error() -> None:
    module = importlib.import_module("trl.experimental.online_dpo")
    trainer = object.__new__(module.OnlineDPOTrainer)
    with pytest.raises(TypeError, match=r"RewardTrainer, DPOTrainer.*got OnlineDPOTrainer"):
        robustify(trainer, SET)
