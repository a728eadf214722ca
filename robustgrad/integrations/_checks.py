"""What a trainer must be for its losses to have samples: errors with the remedy."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

_FUSED = "use_liger_kernel must not fuse the loss, which then exists as one number only: got {value}. {remedy}"


def plain_trainer(trainer: Any) -> None:
    is_trainer(trainer)
    if any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__):
        raise TypeError(
            f"trainer must be a transformers.Trainer, got TRL's {type(trainer).__name__}. "
            "Use robustify from robustgrad.integrations.trl."
        )


def is_trainer(trainer: Any) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer must be a Trainer instance, got {trainer!r}. "
            "For a loop of your own use robustgrad.RobustOptimizer and its capture()."
        )


def ready(trainer: Any, attribute: str) -> None:
    if hasattr(trainer, attribute):
        raise ValueError(
            f"trainer must be robustified once, got one with {trainer.reweighter!r}. Call unrobustify(trainer) first."
        )
    if trainer.is_in_train:
        raise ValueError("trainer must not be training yet, got one that is. Call robustify before trainer.train().")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"the trainer must have one process per GPU, got one process for {trainer.args.n_gpu} (DataParallel). "
            "Launch it with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES."
        )
    _not_fused(trainer.args)


def loss_outside(trainer: Any) -> None:
    """A plain Trainer's loss is made inside the model, where a compiled one shows nothing."""
    smoothed = trainer.label_smoother is not None
    if trainer.args.torch_compile and trainer.compute_loss_func is None and not smoothed:
        raise ValueError(
            "torch_compile must leave the loss outside the model, got torch_compile=True and a loss inside. Pass "
            "compute_loss_func=, for a causal LM around transformers.loss.loss_utils.ForCausalLMLoss."
        )


def not_compiled(trainer: Any) -> None:
    """Seen with torch 2.13 and TRL 1.16: TypeError: 'torch.device' object is not subscriptable."""
    if trainer.args.torch_compile:
        raise ValueError(
            f"torch_compile must be False for {type(trainer).__name__}, got True: torch's compiler fails on TRL's "
            "fused LM head while the losses are being captured. Set torch_compile=False."
        )


def _not_fused(args: Any) -> None:
    config = getattr(args, "liger_kernel_config", None) or {}
    if getattr(args, "use_liger_kernel", False) and config.get("fused_linear_cross_entropy", True):
        remedy = 'Set liger_kernel_config={"fused_linear_cross_entropy": False}, or leave Liger out.'
        raise ValueError(_FUSED.format(value="use_liger_kernel=True", remedy=remedy))
    if getattr(args, "use_liger_loss", False):
        raise ValueError(_FUSED.format(value="use_liger_loss=True", remedy="Set use_liger_loss=False."))


def robust(trainer: Any, attribute: str) -> None:
    if not hasattr(trainer, attribute):
        raise ValueError(f"trainer must be robust, got a plain {type(trainer).__name__}. Call robustify first.")


def fired(calls: int, trainer: Any) -> None:
    if calls == 0:
        raise RuntimeError(
            f"the losses of every optimizer step must be captured, got none: {type(trainer).__name__} does not call "
            "compute_loss. Reweight its losses where they are made: trainer.reweighter(losses)."
        )


def not_packed(args: Any) -> None:
    for name in ("packing", "padding_free"):
        if getattr(args, name, False):
            raise ValueError(
                f"{name} must be False, got True: it puts several examples into one row, and their losses can no "
                f"longer be told apart. Set {name}=False."
            )


def dpo_losses(types: list[str], keeps: bool) -> None:
    sorting = [name for name in types if name.startswith("aot")]
    if sorting:
        raise ValueError(
            f"loss_type must have one loss per pair, got {sorting}, which sorts the batch and compares by rank. "
            'Use "sigmoid" or another pairwise loss.'
        )
    if "sft" in types and (not keeps or len(types) == 1):
        raise ValueError(
            f"loss_type must have one loss per pair, got {types}: its 'sft' term is one number for the batch. "
            'Use auxiliary="keep" to leave that term its own gradient beside another loss, or leave it out.'
        )


def no_second_pass(trainer: Any, pool: str | None) -> None:
    if pool == "window":
        raise ValueError(
            f"pool must be 'memory' or 'batch' for {type(trainer).__name__}, which generates its samples as it trains "
            "on them, got 'window': a second pass would see others. Use pool=\"memory\"."
        )


def more_than_one_sample(args: Any, pool: str) -> None:
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if pool == "window" and step == 1:
        raise ValueError(
            "an optimizer step must have several samples with pool='window', got 1: that is plain averaging. "
            'Use pool="memory", or raise gradient_accumulation_steps.'
        )
