"""Run by torchrun: one robust optimizer step of a trainer on each rank; rank 0 writes what came of it.

python -m torch.distributed.run --standalone --nproc_per_node=2 tests/trainer_on_ranks.py KIND POOL FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import test_trainers
import tiny
import torch
import torch.distributed as dist
from test_trainers import DPO, KTO, REWARD, SET, SFT

from robustgrad.integrations.trl import robustify


def main(kind: str, pool: str, folder: Path) -> None:
    case = {"reward": REWARD, "dpo": DPO, "kto": KTO, "sft": SFT}[kind]
    more = {} if pool == "window" else {"max_steps": 10, "train_dataset": ten_times(case)}
    trainer = case.build(folder, 2, 2, **more)
    gradients = tiny.Gradients()
    trainer.add_callback(gradients)
    robustify(trainer, SET, pool=pool).train()
    if trainer.args.process_index == 0:
        torch.save({"gradients": gradients.steps, "log": trainer.state.log_history}, folder / "out.pt")


def ten_times(case: test_trainers.Case) -> object:
    return test_trainers.concatenate_datasets([case.dataset()] * 10)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    dist.barrier()
    os._exit(0)  # gloo now and then aborts a process that takes it down in order
