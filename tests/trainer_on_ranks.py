"""Run by torchrun: robust optimizer steps of many trainers on each rank; rank 0 writes what came of them.

python -m torch.distributed.run --standalone --nproc_per_node=2 tests/trainer_on_ranks.py FOLDER

One start for all: the imports take longer than the steps.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experimental_trainers
import plain_trainers
import rollout_trainers
import tiny
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from trainer_cases import KTO, MAIN, REWARD
from trainer_steps import SET, N, in_order
from transformers import Trainer

from robustgrad.integrations.trl import robustify

HALF = (2, 2)  # of the eight samples of a step
TEN = {"max_steps": 10, "learning_rate": 0.0}


def runs() -> dict[str, tuple[Callable[[Path], Trainer], str | None]]:
    """Name: how to build the trainer, and its pool, or None for an untouched one."""
    made: dict[str, tuple[Callable[[Path], Trainer], str | None]] = {}
    for name, case in MAIN.items():
        adapter = {"peft_config": tiny.lora(case.task)}
        made[f"{name} window"] = lambda folder, case=case: case.build(folder, *HALF), "window"
        made[f"{name} lora"] = lambda folder, case=case, more=adapter: case.build(folder, *HALF, **more), "window"
        made[f"{name} memory"] = (
            lambda folder, case=case: in_order(case.build(folder, *HALF, train_dataset=case.dataset(10 * N), **TEN)),
            "memory",
        )
    for kind in plain_trainers.KINDS:
        made[f"{kind} plain"] = lambda folder, kind=kind: plain_trainers.build(folder, kind, HALF), None
        made[f"{kind} window"] = lambda folder, kind=kind: plain_trainers.build(folder, kind, HALF), "window"
        made[f"{kind} lora"] = (
            lambda folder, kind=kind: plain_trainers.build(
                folder, kind, HALF, model=plain_trainers.model(kind, adapter=True)
            ),
            "window",
        )
        made[f"{kind} memory"] = (
            lambda folder, kind=kind: in_order(plain_trainers.build(folder, kind, HALF, n=10 * N, **TEN)),
            "memory",
        )
    with_kl = {"loss_type": "kto", "train_sampling_strategy": "sequential"}
    made["kto with kl"] = lambda folder: KTO.build(folder, *HALF, **with_kl), "window"
    for name in ("CPO", "ORPO"):
        made[name] = lambda folder, name=name: experimental_trainers.build(name, folder, *HALF), "window"
    for kind in rollout_trainers.KINDS:
        made[kind] = lambda folder, kind=kind: rollout_trainers.build(kind, folder, *HALF, learning_rate=0.0), "window"
    made["online"] = lambda folder: experimental_trainers.online(folder, 4, 1, learning_rate=0.0), "batch"
    made["sharded window"] = lambda folder: sharded(folder), "window"
    made["sharded memory"] = (
        lambda folder: in_order(sharded(folder, train_dataset=REWARD.dataset(10 * N), **TEN)),
        "memory",
    )
    return made


def sharded(folder: Path, **changes: Any) -> Trainer:
    """FSDP2 as Accelerate sets it up. On a CPU it would not, and use DDP instead: so it is told that this is none."""
    create = Trainer.create_accelerator_and_postprocess

    def on_accelerators(self: Trainer) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_NPU
        create(self)

    config = {"version": 2, "reshard_after_forward": True, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
              "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}  # fmt: skip
    Trainer.create_accelerator_and_postprocess = on_accelerators
    try:
        trainer = REWARD.build(folder, *HALF, fsdp=True, fsdp_config=config, **changes)
    finally:
        Trainer.create_accelerator_and_postprocess = create
    assert trainer.is_fsdp_enabled
    return trainer


def spied(trainer: Trainer) -> Any:
    """What it will generate, if it does."""
    if hasattr(trainer, "_generate_and_score_completions"):
        return rollout_trainers.spy(trainer)
    return experimental_trainers.spy(trainer) if hasattr(trainer, "_calculate_rewards_from_functions") else {}


def run(build: Callable[[Path], Trainer], pool: str | None, folder: Path) -> dict[str, Any]:
    trainer, gradients = build(folder), tiny.Gradients()
    seen = spied(trainer)
    trainer.add_callback(gradients)
    (trainer if pool is None else robustify(trainer, SET, pool=pool)).train()
    rollouts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rollouts, seen)
    return {"gradients": gradients.steps, "log": trainer.state.log_history, "rollouts": rollouts}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    out = {}
    for name, (build, pool) in runs().items():
        try:
            out[name] = run(build, pool, folder / "run")
        except RuntimeError as error:  # of older Accelerates, which look for a device themselves
            if "no available devices" not in str(error):
                raise
    if dist.get_rank() == 0:
        torch.save(out, folder / "out.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.barrier()
    os._exit(0)  # gloo now and then aborts a process that takes it down in order
