"""A training loop with checkpoints, on one rank or several: resumable_loop.py FOLDER POOL [--hang-at STEP]."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustgrad import ChiSquare, RobustOptimizer

folder, pool, *more = sys.argv[1:]
hang_at = int(more[1]) if more else None
path = Path(folder) / "checkpoint.pt"
if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
optimizer = RobustOptimizer(torch.optim.AdamW(net.parameters(), lr=0.05), ChiSquare(0.5), pool=pool)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=30)
parts = {"net": net, "optimizer": optimizer, "schedule": schedule, "robust": optimizer.reweighter}
start = 0
if path.exists():
    saved = torch.load(path, weights_only=True)
    start = saved.pop("step")
    for name, part in parts.items():
        part.load_state_dict(saved[name])


def loss_fn(x: Tensor) -> Tensor:
    losses = nn.functional.softplus(net(x).squeeze(-1) + x[:, 0] * x[:, 1])
    return optimizer.reweight(losses).sum() * world / 16


for step in range(start, 30):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    batches = x.split((10, 6))[rank].split(4) if world == 2 else x.split(4)
    losses = optimizer.window(loss_fn, batches, model=net) if pool == "window" else map(loss_fn, batches)
    for loss in losses:
        loss.backward()
        if step == hang_at:
            (Path(folder) / f"hanging-{rank}").write_text(str(os.getpid()))
            time.sleep(100)
    for p in net.parameters() if world > 1 else ():
        dist.all_reduce(p.grad)
        p.grad /= world
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 5 == 4 and rank == 0:
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}, f"{path}.new")
        os.replace(f"{path}.new", path)
if rank == 0:
    torch.save(torch.cat([p.detach().flatten() for p in net.parameters()]), Path(folder) / "final.pt")
if world > 1:
    dist.barrier()
    os._exit(0)  # gloo now and then aborts a process that takes it down in order
