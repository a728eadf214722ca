"""A reward model in plain torch: 10% of the prompts want the opposite of what the others want.

Run it: python examples/quickstart.py
"""

import torch

import robustgrad
from robustgrad.objectives import bradley_terry

torch.manual_seed(0)
domain = (torch.rand(2000) < 0.1).float()  # 0 for most prompts, 1 for the minority
cue = torch.where(domain == 1, -1.0, 1.0) + torch.randn(2000)  # how much longer the chosen response is
pairs = torch.stack([domain, cue], dim=1)

for radius in (0.0, 0.3):  # a radius of 0 is plain training
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = robustgrad.RobustOptimizer(optimizer, robustgrad.TotalVariation(radius))  # robustgrad
    for batch in torch.randint(len(pairs), (300, 32)):
        chosen = model(pairs[batch]).squeeze(-1)
        rejected = model(pairs[batch] * torch.tensor([1.0, -1.0])).squeeze(-1)
        losses = bradley_terry(chosen, rejected)
        optimizer.reweight(losses)  # robustgrad
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        lead = (model(pairs) - model(pairs * torch.tensor([1.0, -1.0]))).squeeze(-1)
    right = (lead > 0).float()
    print(f"radius {radius}: {right.mean():.1%} right, {right[domain == 1].mean():.1%} in the minority")
