"""What is worst case: ambiguity sets, from losses to weights."""

from .base import AmbiguitySet, Rule, WorstCase
from .chi_square import ChiSquare
from .cvar import CVaR
from .groups import group_means
from .kl import KL
from .total_variation import TotalVariation

__all__ = ["KL", "AmbiguitySet", "CVaR", "ChiSquare", "Rule", "TotalVariation", "WorstCase", "group_means"]
