"""TRL's own losses on given log-probabilities: its trainers' code, run on a stand-in for a trainer.

Nothing is loaded or trained: the methods are called with an object that holds just what they read.
"""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs trl, whose losses these are compared with")
# TRL and what it imports call names that others have deprecated.
quiet = pytest.mark.filterwarnings("ignore")


def _same(tensor: Tensor) -> Tensor:
    return tensor


_ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=_same, gather_for_metrics=_same, reduce=lambda t, reduction: t, num_processes=1
)


def _trainer(**settings: object) -> SimpleNamespace:
    return SimpleNamespace(
        accelerator=_ACCELERATOR,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        **settings,
    )


def dpo_losses(
    loss_type: str, token_log_probs: Tensor, mask: Tensor, reference: Tensor, *, beta: float, eps: float
) -> Tensor:
    """DPOTrainer's loss of every pair. `token_log_probs` and `mask` (2, n, T), `reference` (2, n): chosen, rejected."""
    from trl import DPOTrainer

    trainer = _trainer(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[loss_type], loss_weights=[1.0], beta=beta, label_smoothing=eps, use_weighting=False,
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    losses = []
    # The trainer takes the mean itself: one pair at a time gives back the pairs.
    for i in range(token_log_probs.shape[1]):
        rows, real = token_log_probs[:, i], mask[:, i]
        outputs = SimpleNamespace(
            log_probs=torch.where(real, rows, 0.0), entropy=torch.zeros_like(rows),
            mean_logits=torch.zeros_like(rows), is_top1=torch.zeros_like(real),
        )  # fmt: skip
        with_first = torch.cat([torch.zeros_like(real[:, :1]), real], 1)
        inputs = {
            "input_ids": torch.zeros_like(with_first, dtype=torch.long),
            "attention_mask": torch.ones_like(with_first),
            "completion_mask": with_first.long(),
            "ref_chosen_logps": reference[0, i : i + 1],
            "ref_rejected_logps": reference[1, i : i + 1],
        }
        losses.append(DPOTrainer._compute_loss(trainer, lambda outputs=outputs, **_: outputs, inputs, False))
    return torch.stack(losses)


def simpo_losses(chosen: Tensor, rejected: Tensor, *, beta: float, margin: float, eps: float) -> Tensor:
    from trl.experimental.cpo import CPOTrainer

    trainer = _trainer(alpha=0.0, loss_type="simpo", simpo_gamma=margin, beta=beta, label_smoothing=eps)
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


def grpo_losses(
    log_probs: Tensor,
    old: Tensor,
    reference: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    beta: float,
    clip: float,
    clip_high: float,
    level: str,
) -> Tensor:
    """GRPOTrainer's loss of every response, with loss_type "grpo" (the mean over its tokens)."""
    from trl import GRPOTrainer

    args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
    losses = []
    for i in range(len(log_probs)):
        row = slice(i, i + 1)
        scored = (log_probs[row], torch.zeros_like(log_probs[row]), None)
        trainer = _trainer(
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            importance_sampling_level=level, beta=beta, loss_type="grpo", epsilon_low=clip, epsilon_high=clip_high,
            args=args, use_vllm=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
            _get_per_token_logps_and_entropies=lambda *_, scored=scored, **__: scored,
        )  # fmt: skip
        ids = torch.zeros_like(mask[row], dtype=torch.long)
        inputs = {
            "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask[row].long(),
            "advantages": advantages[row], "old_per_token_logps": old[row], "ref_per_token_logps": reference[row],
        }  # fmt: skip
        losses.append(GRPOTrainer._compute_loss(trainer, None, inputs))
    return torch.stack(losses)
