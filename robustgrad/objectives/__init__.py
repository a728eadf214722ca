"""Per-sample losses: one number for each preference pair, higher is worse, ready for `reweight`."""

from .bradley_terry import bradley_terry

__all__ = ["bradley_terry"]
