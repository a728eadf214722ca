"""Trainers on two gloo ranks: the gradient of one process with all samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
import tiny
from datasets import concatenate_datasets
from test_trainers import DPO, KTO, REWARD, SET, SFT, Case, expected

from robustgrad.integrations.trl import robustify

pytestmark = tiny.OTHERS_WARNINGS
HERE = Path(__file__).parent
CASES = {"reward": REWARD, "dpo": DPO, "kto": KTO, "sft": SFT}
each_case = pytest.mark.parametrize("kind", CASES)


def on_two_ranks(kind: str, pool: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    script = [str(HERE / "trainer_on_ranks.py"), kind, pool, str(folder)]
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "out.pt", weights_only=True)


def one_process(case: Case, folder: Path) -> list[torch.Tensor]:
    data = concatenate_datasets([case.dataset()] * 10)
    trainer = case.build(folder, 8, 1, max_steps=10, train_dataset=data)
    gradients = tiny.Gradients()
    trainer.add_callback(gradients)
    robustify(trainer, SET).train()
    return gradients.steps


@each_case
def test_window(kind: str, tmp_path: Path) -> None:
    case = CASES[kind]
    want = expected(case, case.build(tmp_path))
    out = on_two_ranks(kind, "window", tmp_path)
    assert tiny.relative_error(out["gradients"][0], want) < 1e-5
    assert out["log"][0]["robust/gap"] > 0


@each_case
def test_memory(kind: str, tmp_path: Path) -> None:
    out = on_two_ranks(kind, "memory", tmp_path)
    for got, want in zip(out["gradients"], one_process(CASES[kind], tmp_path), strict=True):
        assert tiny.relative_error(got, want) < 2e-3
