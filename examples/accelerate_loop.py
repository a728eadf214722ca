"""A loop of your own under Accelerate: accelerate launch examples/accelerate_loop.py, or plain python

Runs on one process or many: the losses of all ranks compete together.
"""

import argparse

import torch
from accelerate import Accelerator
from torch.nn.functional import logsigmoid

import robustgrad  # robustgrad
from robustgrad.integrations.accelerate import real_samples  # robustgrad

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="one short epoch")
args = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=4)
n = 130 if args.smoke else 4002  # the last batch is not full
chosen = torch.randn(n, 16)
rejected = chosen - torch.randn(n, 16).abs() * torch.where(torch.rand(n, 1) < 0.1, -1.0, 1.0)
data = torch.utils.data.TensorDataset(chosen, rejected)
loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
reweighter = robustgrad.Reweighter(robustgrad.ChiSquare(0.5))  # robustgrad
accelerator.register_for_checkpointing(reweighter)  # robustgrad

for epoch in range(1 if args.smoke else 3):
    for better, worse in loader:
        with accelerator.accumulate(model):
            losses = -logsigmoid(model(better) - model(worse)).squeeze(-1)
            reweighter(losses, mask=real_samples(accelerator, len(losses)))  # robustgrad
            accelerator.backward(losses.mean())
            optimizer.step()
            if accelerator.sync_gradients:  # robustgrad
                reweighter.step()  # robustgrad
            optimizer.zero_grad()
    metrics = {name: f"{float(value):.3g}" for name, value in reweighter.metrics().items()}
    accelerator.print(f"epoch {epoch}: {metrics}")
accelerator.save_state("runs/accelerate_loop")
