"""Choosing the set and its radius, one file for each kind of knowledge. docs/radius.md helps to decide."""

from .budget import within_ess, within_loss
from .confidence import against_noise
from .domains import LeftOut, leave_one_domain_out
from .prompts import Estimate, PromptShift, prompt_shift
from .reach import equal_reach, may_change

__all__ = [
    "Estimate",
    "LeftOut",
    "PromptShift",
    "against_noise",
    "equal_reach",
    "leave_one_domain_out",
    "may_change",
    "prompt_shift",
    "within_ess",
    "within_loss",
]
