"""A reward model in plain torch, without and with robustgrad: python examples/quickstart.py

A response has a length and a quality. Everybody likes quality; 90% of the prompts also reward length, 10%
punish it. The model does not see which prompt is of which kind.
"""

import torch

import robustgrad
from robustgrad.objectives import bradley_terry

torch.manual_seed(0)
minority = torch.rand(4000) < 0.1
better = torch.stack([torch.where(minority, -1.0, 1.0), torch.full((4000,), 0.5)], dim=1)
rejected_features = torch.randn(4000, 2)
chosen_features = rejected_features + better + 0.3 * torch.randn(4000, 2)

for radius in (0.0, 0.1):  # a radius of 0 is plain training
    torch.manual_seed(1)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    optimizer = robustgrad.RobustOptimizer(optimizer, robustgrad.TotalVariation(radius))  # robustgrad
    for batch in torch.randint(4000, (400, 32)):
        chosen, rejected = model(chosen_features[batch]), model(rejected_features[batch])
        losses = bradley_terry(chosen.squeeze(-1), rejected.squeeze(-1))
        optimizer.reweight(losses)  # robustgrad
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    right = (model(chosen_features) > model(rejected_features)).squeeze(-1).float()
    print(f"radius {radius}: {right.mean():.1%} right, {right[minority].mean():.1%} in the minority")
