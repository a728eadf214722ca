"""Distributionally robust gradients for any PyTorch training loop.

>>> import torch
>>> import robustgrad
>>> model = torch.nn.Linear(4, 1)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> optimizer = robustgrad.RobustOptimizer(optimizer, robustgrad.TotalVariation(0.1))
>>> losses = model(torch.randn(8, 4)).square()
>>> optimizer.reweight(losses).mean().backward()
>>> optimizer.step()
"""

from ._version import __version__
from .ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation, WorstCase
from .optimizer import RobustOptimizer
from .reweighter import Reweighter
from .robust_loss import robust_loss

__all__ = [
    "KL",
    "AmbiguitySet",
    "CVaR",
    "ChiSquare",
    "Reweighter",
    "RobustOptimizer",
    "TotalVariation",
    "WorstCase",
    "__version__",
    "robust_loss",
]
