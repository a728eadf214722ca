"""Data parallel, two ranks of unequal size: torchrun --nproc-per-node 2 examples/two_ranks.py

Losses of all ranks compete together, once per step, without a further line. The loop divides by the number of
samples of all ranks, and DDP averages over ranks: hence `world /`. With one rank it gives the same numbers.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import robustgrad
from robustgrad.objectives import bradley_terry

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default: %(default)s)")
parser.add_argument("--smoke", action="store_true", help="in seconds")
arguments = parser.parse_args()

cuda = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("WORLD_SIZE", 1))
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
if "RANK" in os.environ:
    dist.init_process_group("nccl" if cuda else "gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

torch.manual_seed(0)
minority = torch.rand(4000) < 0.1
better = torch.stack([torch.where(minority, -1.0, 1.0), torch.full((4000,), 0.5)], dim=1)
rejected_features = torch.randn(4000, 2)
chosen_features = rejected_features + better + 0.3 * torch.randn(4000, 2)

model = torch.nn.Linear(2, 1).to(device)
parallel = DistributedDataParallel(model) if world > 1 else model
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
optimizer = robustgrad.RobustOptimizer(optimizer, robustgrad.TotalVariation(0.1))  # robustgrad
for batch in torch.randint(4000, (20 if arguments.smoke else arguments.steps, 32)):
    # The first rank takes a little less than the others.
    own = batch.tensor_split([32 // world * i - 1 for i in range(1, world)])[rank]
    chosen, rejected = parallel(chosen_features[own].to(device)), parallel(rejected_features[own].to(device))
    losses = bradley_terry(chosen.squeeze(-1), rejected.squeeze(-1))
    optimizer.reweight(losses)  # robustgrad
    (losses.sum() * world / 32).backward()
    optimizer.step()
    optimizer.zero_grad()

if rank == 0:
    right = (model(chosen_features.to(device)) > model(rejected_features.to(device))).squeeze(-1).float().cpu()
    pool_size = int(optimizer.reweighter.metrics()["pool_size"])
    print(f"{world} ranks: {right.mean():.1%} right, {right[minority].mean():.1%} in the minority, {pool_size} compete")
if dist.is_initialized():
    dist.destroy_process_group()
