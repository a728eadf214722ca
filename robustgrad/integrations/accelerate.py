"""Accelerate: the Reweighter in its checkpoints, and the samples that it repeats to fill the last batch.

reweighter = robustgrad.Reweighter(robustgrad.TotalVariation(0.1))
accelerator.register_for_checkpointing(reweighter)
for batch in loader:
    with accelerator.accumulate(model):
        losses = reweighter(loss_fn(batch), mask=real_samples(accelerator, len(batch)))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["real_samples"]


def real_samples(accelerator: Accelerator, n: int) -> Tensor:
    """Which of the `n` samples of this rank's batch are real, (n,) bool.

    With `even_batches=True` a prepared loader fills the last batch of an epoch with samples from its start, so
    that all ranks get equally many: they would count twice in the worst case. `gather_for_metrics` drops
    them; this is the same for a `mask=`. The gradient of the repeated samples becomes 0; the mean that
    the loop divides by still counts them.

    Args:
        accelerator: the one that prepared the loader, asked while the batch is being used.
        n: samples of this rank's batch.
    """
    state = accelerator.gradient_state
    real: int = n * accelerator.num_processes
    # In the global batch, ranks in order, the real samples come first. -1: the length is unknown.
    if state.end_of_dataloader and state.remainder > 0:
        real = state.remainder
    start: int = accelerator.process_index * n
    return torch.lt(torch.arange(start, start + n, device=accelerator.device), real)
