"""OpenRLHF: robust reward models, DPO, SFT and PPO; DeepSpeed's engine goes on owning the step.

In a copy of its `train_rm.py`, `train_dpo.py` or `train_sft.py`, after the trainer is made:

    from robustgrad import TotalVariation
    from robustgrad.integrations.openrlhf import robustify

    trainer = RewardModelTrainer(...)
    robustify(trainer, TotalVariation(0.1))                              # robustgrad
    trainer.reweighter.load_state_dict(states["robustgrad"])             # robustgrad, only where a run is resumed
    trainer.fit(args, consumed_samples, num_update_steps_per_epoch)

For PPO and its relatives the trainer is a Ray actor, and the line goes into its constructor, see `robustify`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ambiguity import AmbiguitySet
from ..reweighter import Reweighter
from . import _config

__all__ = ["RobustLoss", "robustify"]

_LOGGED = ("value", "mean", "gap", "ess", "max_ratio", "plain")


def robustify(trainer: Any, ambiguity: AmbiguitySet, **options: Any) -> Any:
    """Make an OpenRLHF trainer's gradients follow the worst case over an ambiguity set; returns the trainer.

    RewardModelTrainer, DPOTrainer, SFTTrainer: a sample is a pair or an example. The trainer's loss becomes a
    `RobustLoss`, with the same value. An optimizer step is over when DeepSpeed's engine says so (its
    `global_steps`), whatever the accumulation; the logs get robust/value and friends, and the client state of
    each checkpoint a "robustgrad" entry, which `load_ckpt` gives back. Losses of all data-parallel ranks
    compete (`strategy.ds_device_mesh`), those of tensor and sequence parallelism count once.

    PPOTrainer and the asynchronous TrainingActor: a sample is a prompt, which the adversary picks by minus its
    mean reward. The ratio multiplies the advantages of the whole rollout, so a KL or entropy term of the loss
    keeps its own weight. In the constructor of a subclass, since both are Ray actors:

        @ray.remote
        class RobustPPOTrainer(ppo_trainer.PPOTrainer.__ray_metadata__.modified_class):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                robustify(self, TotalVariation(0.1))

        ppo_trainer.PPOTrainer = RobustPPOTrainer    # before train(args) of train_ppo_ray.py

    Args:
        trainer: one of these, before `fit`; or a RemoteExperienceMaker.
        ambiguity: the set.
        options: of `Reweighter`. The pool is the memory by default; for rollouts it is "batch", all prompts
            of the rollout, solved exactly: nothing of it needs a checkpoint.
    Raises: TypeError or ValueError: another object, one that is robust already, or pool="window".
    """
    maker = getattr(trainer, "experience_maker", trainer)
    if hasattr(trainer, "reweighter"):
        raise ValueError(f"trainer must be robustified once, got one with {trainer.reweighter!r}. Make a new one.")
    if hasattr(maker, "compute_advantages_and_returns"):
        trainer.reweighter = _reweighter(ambiguity, {"pool": "batch"} | options)
        _Rollouts(maker, trainer.reweighter)
    elif isinstance(getattr(trainer, "loss_fn", None), nn.Module):
        group = {"process_group": getattr(trainer.strategy, "ds_device_mesh", None)}
        trainer.reweighter = _reweighter(ambiguity, group | options)
        trainer.loss_fn = RobustLoss(trainer.loss_fn, trainer.reweighter)
        _Steps(trainer)
    else:
        raise TypeError(
            f"trainer must be OpenRLHF's RewardModelTrainer, DPOTrainer, SFTTrainer or PPOTrainer, got {trainer!r}. "
            "Elsewhere wrap the loss module itself in a RobustLoss."
        )
    return trainer


class RobustLoss(nn.Module):
    """A loss module of OpenRLHF whose gradient follows the worst case over the samples; its value is unchanged.

        trainer.loss_fn = RobustLoss(trainer.loss_fn, reweighter)

    Args:
        loss_fn: PairWiseLoss, LogExpLoss, DPOLoss, SFTLoss, PolicyLoss, or any module whose first argument has
            a row per sample and whose (first) result is a scalar reduced from one row per sample.
        reweighter: told with `reweighter.step()` when the engine has taken a step; untold, its memory takes in
            what it has seen after every quarter of its size.
    Raises: when called, what `robustgrad.capture.Capture` raises: no per-sample losses lie behind the scalar.
    """

    def __init__(self, loss_fn: nn.Module, reweighter: Reweighter) -> None:
        super().__init__()
        self.loss_fn, self.reweighter = loss_fn, reweighter

    def forward(self, first: Tensor, *rest: Any, **named: Any) -> Any:
        with self.reweighter.capture(rows=len(first), samples=_samples(named)) as capture:
            out = self.loss_fn(first, *rest, **named)
            capture(out[0] if isinstance(out, tuple) else out)
        return out


def _samples(named: dict[str, Any]) -> Any:
    """Over how many samples of this rank the loss is an average; None: those of the call.

    The loop gives the number as a tensor. Reading it waits for the device, as the loop does after each call.
    """
    total = named.get("global_batch_size")
    return None if total is None else float(total) / named.get("dp_size", 1)


def _reweighter(ambiguity: AmbiguitySet, options: dict[str, Any]) -> Reweighter:
    _config.one_pass(options.get("pool", "memory"), "OpenRLHF")
    return Reweighter(ambiguity, **options)


class _Steps:
    """Tells the reweighter of the engine's steps, and the trainer's logs and checkpoints of the reweighter."""

    def __init__(self, trainer: Any) -> None:
        self.reweighter: Reweighter = trainer.reweighter
        self.step, trainer.strategy.optimizer_step = trainer.strategy.optimizer_step, self.optimizer_step
        self.save, trainer.save_logs_and_checkpoints = trainer.save_logs_and_checkpoints, self.save_logs_and_checkpoints
        self.reweighter.expects_steps = True

    def optimizer_step(self, optimizer: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        # Called for every micro-batch; an Actor keeps its engine inside.
        engine = model if hasattr(model, "global_steps") else model.model
        before = engine.global_steps
        self.step(optimizer, model, *args, **kwargs)
        if engine.global_steps != before:
            self.reweighter.step()

    def save_logs_and_checkpoints(
        self, args: Any, global_step: int, step_bar: Any, logs_dict: Any = None, client_states: Any = None
    ) -> None:
        logs, states = dict(logs_dict or {}), dict(client_states or {})
        if global_step % args.logger.logging_steps == 0:
            metrics = self.reweighter.metrics()
            logs.update({f"robust/{name}": float(metrics[name]) for name in _LOGGED if name in metrics})
        states["robustgrad"] = self.reweighter.state_dict()
        self.save(args, global_step, step_bar, logs, states)


class _Rollouts:
    """The ratio of its prompt multiplies the advantages of each response of a rollout."""

    def __init__(self, maker: Any, reweighter: Reweighter) -> None:
        self.reweighter, self.per_prompt = reweighter, maker.args.rollout.n_samples_per_prompt
        self.prompts = 0
        self.compute, maker.compute_advantages_and_returns = maker.compute_advantages_and_returns, self

    def __call__(self, experiences: list[Any]) -> list[Any]:
        experiences = self.compute(experiences)
        rewards = torch.cat([one.rewards for one in experiences])
        index = torch.tensor([i for one in experiences for i in one.index], device=rewards.device)
        ratio = self.reweighter.ratio(-rewards, groups=index // self.per_prompt + self.prompts)
        self.prompts += len(index)  # an id is never used again
        self.reweighter.step()
        for one, own in zip(experiences, torch.split(ratio, [len(one.index) for one in experiences]), strict=True):
            one.advantages = one.advantages * own.to(one.advantages).unsqueeze(-1)
        return experiences
