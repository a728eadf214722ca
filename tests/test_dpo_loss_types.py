"""Every loss of the installed DPOTrainer: the weighted sum of its own losses of single pairs, or refused."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
import tiny
from trainer_cases import DPO
from trainer_steps import SET, gradient, steps, worst
from transformers import Trainer
from trl import DPOTrainer

from robustgrad.integrations.trl import robustify

pytestmark = [*tiny.OTHERS_WARNINGS, pytest.mark.filterwarnings("ignore::UserWarning")]


def known(what: str) -> list[str]:
    """The names that it compares with."""
    source = inspect.getsource(DPOTrainer._compute_loss)
    return sorted(set(re.findall(rf'\b{what} == "(\w+)"', source)))


LOSS_TYPES, DIVERGENCES = known("loss_type"), known("f_divergence_type")
# By ranks of the batch, or one number for it.
WITHOUT_SAMPLES = {"aot", "aot_unpaired", "sft"}
FORMS = {
    **{name: {"loss_type": [name]} for name in sorted(set(LOSS_TYPES) - WITHOUT_SAMPLES)},
    **{name: {"f_divergence_type": name} for name in DIVERGENCES},
    "two at once": {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0, 0.5]},
    "weighted by the policy": {"use_weighting": True},
    "partly by length": {"ld_alpha": 0.5},
}


def alone(trainer: Trainer) -> Tensor:
    """What the trainer itself makes of each pair alone: its scalar has no other samples to mix it with."""
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return torch.stack([trainer._compute_loss(trainer.model, dict(batch), False) for batch in batches])


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_the_weighted_sum(form: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"label_smoothing": 0.1} | FORMS[form]
    trainer = DPO.build(tmp_path, 2, 4, **options)
    each = alone(trainer)
    want, plain = gradient(worst(each), trainer.model), gradient(each.mean(), trainer.model)
    got = steps(robustify(trainer, SET, pool="window"))[0]
    assert tiny.relative_error(got, want) < 1e-5
    assert tiny.relative_error(plain, want) > 1e-2


def test_the_lists_are_those_of_the_trainer() -> None:
    assert {"sigmoid", "ipo", "sft"} < set(LOSS_TYPES) and len(LOSS_TYPES) > 10
    assert {"reverse_kl", "forward_kl"} < set(DIVERGENCES)


@pytest.mark.parametrize("loss_type", sorted(WITHOUT_SAMPLES))
def test_losses_without_samples_are_refused(loss_type: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one loss per pair"):
        robustify(DPO.build(tmp_path, loss_type=[loss_type]), SET)
