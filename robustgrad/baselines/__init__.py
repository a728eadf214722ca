"""What a robust method is compared with, and its relatives: one idea a file.

Those that weigh samples return a ratio (n,), detached, for `(ratio * losses).mean()`; the others return a
loss. They see the losses that they are given and nothing else: in small micro-batches, or with several ranks,
gather first. WDPO is `robustgrad.gradient_penalty.wasserstein_loss` of the DPO losses. Token- and span-level worst
cases (DRTO) are `Reweighter(...)(losses, units="token")`.
"""

from .difficulty_bins import DifficultyBins
from .doro import doro_ratio
from .dpo_pro import dpo_pro
from .dr_dpo import dr_dpo_loss
from .group_dro import GroupDRO
from .hardest_fraction import hardest_fraction_ratio
from .inverse_frequency import inverse_frequency_ratio
from .kldpo import kldpo_ratio
from .prompt_gdro import PromptGDRO
from .reward_ensemble import pessimistic_rewards, worst_regret
from .rollout_counts import rollout_counts
from .rollout_gdro import RolloutGDRO

__all__ = [
    "DifficultyBins",
    "GroupDRO",
    "PromptGDRO",
    "RolloutGDRO",
    "doro_ratio",
    "dpo_pro",
    "dr_dpo_loss",
    "hardest_fraction_ratio",
    "inverse_frequency_ratio",
    "kldpo_ratio",
    "pessimistic_rewards",
    "rollout_counts",
    "worst_regret",
]
