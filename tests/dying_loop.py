"""What the processes of `test_faults` do: a training loop that may be killed anywhere, and a copy that goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustgrad import ChiSquare, Reweighter, RobustOptimizer

STEPS, MICRO_BATCHES = 24, 4


def train(folder: Path, pool: str, dies: Callable[[], None]) -> None:
    """A loop with a checkpoint after each second step; `dies` is asked before each place where a process may die."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Linear(4, 1).double()
    optimizer = RobustOptimizer(torch.optim.AdamW(net.parameters(), lr=0.05), ChiSquare(0.5), pool=pool)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "robust": optimizer.reweighter}
    path, start = folder / "checkpoint.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    def loss_fn(x: Tensor) -> Tensor:
        return optimizer.reweight(nn.functional.softplus(net(x).squeeze(-1) + x[:, 0] * x[:, 1])).sum() / 16

    for step in range(start, STEPS):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        batches = x.split(16 // MICRO_BATCHES)
        for loss in optimizer.window(loss_fn, batches, model=net) if pool == "window" else map(loss_fn, batches):
            dies()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}, f"{path}.new")
            dies()
            os.replace(f"{path}.new", path)
    torch.save(net.state_dict(), folder / "final.pt")


def until_killed(folder: Path, pool: str, places: int) -> None:
    """Dies by SIGKILL at the given place, counted from where it starts."""
    left = iter(range(places))

    def dies() -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    train(folder, pool, dies)


def ratio_elsewhere(reweighter: Reweighter, losses: Tensor, answer: Any) -> None:
    # Without autograd, whose threads do not live on in a fork.
    answer.send(reweighter.ratio(losses).tolist())
