"""The Reweighter under Accelerate: checkpoints, accumulation, and the samples repeated to fill a batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
import accelerate

from robustgrad import ChiSquare, Reweighter
from robustgrad.integrations.accelerate import real_samples

HERE = Path(__file__).parent
ON_RANKS = """
import os, sys, torch
from accelerate import Accelerator
from robustgrad.integrations.accelerate import real_samples
accelerator = Accelerator(cpu=True)
for n in map(int, sys.argv[1:]):
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(n), batch_size=4))
    kept, trusted = [], []
    for batch in loader:
        trusted += accelerator.gather_for_metrics(batch).tolist()
        marked = torch.where(real_samples(accelerator, len(batch)), batch, -1)
        kept += [i for i in accelerator.gather(marked).tolist() if i >= 0]
    assert kept == trusted == list(range(n)), (kept, trusted)
accelerator.wait_for_everyone()
os._exit(0)  # gloo now and then aborts a process that takes it down in order
"""


def test_real_samples_are_those_that_gather_for_metrics_keeps(tmp_path: Path) -> None:
    script = tmp_path / "on_ranks.py"
    script.write_text(ON_RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), "10", "16", "17", "21"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_in_the_middle_of_an_epoch_all_are_real() -> None:
    state = SimpleNamespace(end_of_dataloader=False, remainder=3)
    fake: Any = SimpleNamespace(gradient_state=state, num_processes=2, process_index=1, device="cpu")
    assert real_samples(fake, 4).all()
    state.end_of_dataloader = True
    assert not real_samples(fake, 4).any()
    state.remainder = -1  # a loader without a length
    assert real_samples(fake, 4).all()


def test_state_goes_through_accelerates_checkpoints(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(3, 1))
    data = torch.randn(100, 3)

    def use(reweighter: Reweighter, seed: int) -> torch.Tensor:
        losses = model(data.roll(seed, 0)).squeeze(-1).square()
        reweighter(losses)
        reweighter.step()
        return torch.autograd.grad(losses.mean(), model.weight)[0]

    first, second = Reweighter(ChiSquare(0.5)), Reweighter(ChiSquare(0.5))
    accelerator.register_for_checkpointing(first)
    use(first, 0)
    accelerator.save_state(str(tmp_path))
    want = use(first, 7)
    accelerator._custom_objects[:] = [second]
    accelerator.load_state(str(tmp_path))
    assert torch.equal(use(second, 7), want)
