"""Micro-batch 1 with accumulation, three ways: python examples/accumulation.py

The task of quickstart.py, 32 pairs a step, one pair per forward pass. Weights solved inside a micro-batch of one
are all 1, so that run is plain training; the memory and the window are robust at any size.
"""

import argparse
import time
import warnings

import torch

import robustgrad
from robustgrad.objectives import bradley_terry

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
parser.add_argument("--smoke", action="store_true", help="in seconds")
arguments = parser.parse_args()
steps = 20 if arguments.smoke else arguments.steps

torch.manual_seed(0)
minority = torch.rand(4000) < 0.1
better = torch.stack([torch.where(minority, -1.0, 1.0), torch.full((4000,), 0.5)], dim=1)
rejected_features = torch.randn(4000, 2)
chosen_features = rejected_features + better + 0.3 * torch.randn(4000, 2)


def train(pool: str) -> None:
    torch.manual_seed(1)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    optimizer = robustgrad.RobustOptimizer(optimizer, robustgrad.TotalVariation(0.1), pool=pool)  # robustgrad

    def loss_fn(pairs: torch.Tensor) -> torch.Tensor:
        chosen, rejected = model(chosen_features[pairs]), model(rejected_features[pairs])
        losses = bradley_terry(chosen.squeeze(-1), rejected.squeeze(-1))
        optimizer.reweight(losses)  # robustgrad
        return losses.sum() / 32

    start = time.perf_counter()
    for batch in torch.randint(4000, (steps, 32)):
        micro_batches = batch.split(1)
        if pool == "window":  # a second forward pass, exact for the step
            losses = optimizer.window(loss_fn, micro_batches, model=model)  # robustgrad
        else:
            losses = map(loss_fn, micro_batches)
        for loss in losses:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = (model(chosen_features) > model(rejected_features)).squeeze(-1).float()
    seconds = time.perf_counter() - start
    print(f"{pool:>6}: {right.mean():.1%} right, {right[minority].mean():.1%} in the minority, {seconds:.0f} s")


for pool in ("batch", "memory", "window"):
    with warnings.catch_warnings():
        if pool == "batch":
            warnings.filterwarnings("ignore", message=".*plain averaging")  # this is the point here
        train(pool)
