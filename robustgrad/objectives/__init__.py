"""Per-sample losses of the papers, higher is worse, ready for `reweight`, and what they are made of."""

from .advantages import generalized_advantages, whiten
from .bradley_terry import bradley_terry
from .dpo import dpo, flip_corrected_dpo, hinge_dpo, ipo, log_ratios, simpo
from .grpo import group_advantages
from .kl_penalty import kl_estimate, penalised_rewards
from .ppo import clipped_surrogate, value_loss
from .rebel import rebel
from .sequences import sequence_log_probs, sequence_mean, sequence_sum, token_log_probs

__all__ = [
    "bradley_terry",
    "clipped_surrogate",
    "dpo",
    "flip_corrected_dpo",
    "generalized_advantages",
    "group_advantages",
    "hinge_dpo",
    "ipo",
    "kl_estimate",
    "log_ratios",
    "penalised_rewards",
    "rebel",
    "sequence_log_probs",
    "sequence_mean",
    "sequence_sum",
    "simpo",
    "token_log_probs",
    "value_loss",
    "whiten",
]
