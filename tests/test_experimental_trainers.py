"""TRL's experimental trainers: where capture finds the losses, and what is said where it does not."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
import experimental_trainers
import tiny
from experimental_trainers import SIMPO, build, online, online_losses, simpo, spy
from peft import TaskType
from trainer_steps import SET, gradient, steps, worst
from trl.trainer.base_trainer import _BaseTrainer

from robustgrad.integrations.trl import robustify

pytestmark = [*tiny.OTHERS_WARNINGS, pytest.mark.filterwarnings("ignore")]
CUTS = pytest.mark.parametrize("cut", [(8, 1), (2, 4), (1, 8)], ids=str)


@CUTS
def test_simpo(cut: tuple[int, int], tmp_path: Path) -> None:
    trainer = build("CPO", tmp_path, *cut, **SIMPO)
    each = torch.stack([simpo(trainer.model, row) for row in trainer.train_dataset])
    want = gradient(worst(each), trainer.model)
    assert tiny.relative_error(steps(robustify(trainer, SET, pool="window"))[0], want) < 1e-5


@CUTS
@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_with_the_likelihood_term(name: str, cut: tuple[int, int], tmp_path: Path) -> None:
    """It is reduced inside cross_entropy, over the tokens of the micro-batch."""
    trainer = build(name, tmp_path, *cut)
    each = experimental_trainers.losses(name, trainer.model, list(trainer.train_dataset), cut[0])
    want = gradient(worst(each), trainer.model)
    assert tiny.relative_error(steps(robustify(trainer, SET, pool="window"))[0], want) < 1e-5


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_lora(name: str, tmp_path: Path) -> None:
    trainer = build(name, tmp_path, 8, 1, peft_config=tiny.lora(TaskType.CAUSAL_LM))
    each = experimental_trainers.losses(name, trainer.model, list(trainer.train_dataset), 8)
    want = gradient(worst(each), trainer.model)
    assert tiny.relative_error(steps(robustify(trainer, SET, pool="window"))[0], want) < 1e-5


@pytest.mark.parametrize("cut", [(8, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("groups", [None, "domain"])
def test_online_dpo(groups: str | None, cut: tuple[int, int], tmp_path: Path) -> None:
    """Each micro-batch generates its own pairs and sends their losses back inside training_step."""
    trainer = online(tmp_path, *cut, learning_rate=0.0)
    seen = spy(trainer)
    got = steps(robustify(trainer, SET, pool="batch", groups=groups))[0]
    parts = [online_losses(trainer, batch) for batch in seen]
    scores = parts if groups is None else [mean_of_domain(part) for part in parts]
    ratios = [SET.solve(score).ratio for score in scores]
    # Its loop does not divide by the accumulation; that is its own scale, and stays.
    total = sum((ratio * part).mean() for ratio, part in zip(ratios, parts, strict=True))
    assert tiny.relative_error(got, gradient(total, trainer.model)) < 1e-5
    assert trainer.state.log_history[0]["robust/gap"] > 0


def mean_of_domain(losses: torch.Tensor) -> torch.Tensor:
    return losses.detach().reshape(-1, 2).mean(0).repeat(len(losses) // 2)


def test_online_dpo_remembers(tmp_path: Path) -> None:
    trainer = robustify(online(tmp_path, 1, 8, max_steps=10), SET)
    trainer.train()
    assert trainer.state.log_history[8]["robust/plain"] == 0.0 < trainer.state.log_history[8]["robust/gap"]
    with pytest.raises(ValueError, match=r"generates its samples.*pool=\"memory\""):
        robustify(online(tmp_path, 1, 8), SET, pool="window")


def test_an_unknown_trainer_is_an_error() -> None:
    """Also where it is TRL's own subclass of a known one, as its losses are others."""
    for name in ("tpo.TPO", "gkd.GKD"):
        module, kind = name.split(".")
        unknown = getattr(importlib.import_module(f"trl.experimental.{module}"), f"{kind}Trainer")
        assert issubclass(unknown, _BaseTrainer)
        with pytest.raises(TypeError, match=rf"RewardTrainer, DPOTrainer.*got {kind}Trainer"):
            robustify(object.__new__(unknown), SET)
