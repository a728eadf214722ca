"""One optimizer step of a trainer, and what its gradient ought to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer

from robustgrad import ChiSquare, Reweighter

SET = ChiSquare(0.5)
N = 8  # samples of a step
Row = Mapping[str, Any]


def in_order(trainer: Trainer) -> Trainer:
    """The examples come as they stand in the dataset."""
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    return trainer


def steps(trainer: Trainer) -> list[Tensor]:
    """Train; the gradient of each optimizer step."""
    gradients = tiny.Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    trainer.remove_callback(gradients)
    return gradients.steps


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """Of all trainable parameters, flat."""
    grads = torch.autograd.grad(loss, tiny.trainable(model), retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads])


def worst(losses: Tensor, ambiguity: Any = SET) -> Tensor:
    """sum_i q_i loss_i, with q the worst case."""
    return (ambiguity.solve(losses).weights * losses).sum()


def remembered(losses: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    """The gradients of steps whose losses are handed to a memory one step after the other."""
    reweighter, gradients = Reweighter(SET), []
    reweighter.expects_steps = True
    for each in losses:
        gradients.append(gradient(reweighter(each * 1).mean(), model))
        reweighter.step()
    return gradients


def counted(trainer: Trainer, rows: Sequence[Row]) -> int:
    """By how many tokens the loop divides; older ones count the first of each example too."""
    batch = trainer.data_collator(list(rows))
    return int(trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))[1])
