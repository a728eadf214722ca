"""Direct preference losses: the implicit reward of a policy is beta log pi/pi_ref."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ._inputs import per_sample
from .bradley_terry import bradley_terry


def log_ratios(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """log pi/pi_ref of the preferred and of the other responses, each (n,), in float32 or wider.

    Args:
        chosen, rejected: (n,) log-probabilities of the responses under the policy, summed over tokens.
        reference_chosen, reference_rejected: (n,) the same under the reference model.
    Raises: TypeError or ValueError: no reference, or another shape, type or device.
    """
    for name, given in (("reference_chosen", reference_chosen), ("reference_rejected", reference_rejected)):
        if given is None:
            raise ValueError(
                f"{name} must be the reference model's log-probabilities (n,), got None. "
                "Compute them under torch.no_grad() with the frozen model, or use simpo, which needs none."
            )
    policy_chosen, policy_rejected, base_chosen, base_rejected = per_sample(
        chosen=chosen, rejected=rejected, reference_chosen=reference_chosen, reference_rejected=reference_rejected
    )
    return policy_chosen - base_chosen, policy_rejected - base_rejected


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation, conservative where `label_smoothing` is above 0.

        -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)
        h = log pi/pi_ref(chosen) - log pi/pi_ref(rejected)

    Args:
        chosen, rejected: (n,) log-probabilities under the policy, summed over tokens.
        reference_chosen, reference_rejected: (n,) the same under the reference model.
        beta: > 0, strength of the pull towards the reference.
        label_smoothing: eps in [0, 0.5), the share of the labels that is taken to be wrong.
    Returns: (n,) losses in float32 or wider; log 2 where the policy is the reference.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range, or no reference.
    Source: arXiv 2305.18290, eq. 7; its robust form is arXiv 2503.00539, Algorithm 3.

    >>> import torch
    >>> dpo(torch.tensor([-5.0]), torch.tensor([-7.0]), torch.tensor([-6.0]), torch.tensor([-6.0]), beta=0.5)
    tensor([0.3133])
    """
    _positive("beta", beta)
    first, second = log_ratios(chosen, rejected, reference_chosen, reference_rejected)
    return bradley_terry(beta * first, beta * second, label_smoothing=label_smoothing)


def hinge_dpo(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """Hinge loss on the implicit rewards, (n,):  max(0, 1 - beta h),  h as in `dpo`.

    Arguments, errors and types as in `dpo`. Source: SLiC-HF (2305.10425) in the form of 2309.06657.

    >>> import torch
    >>> hinge_dpo(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.zeros(1), torch.zeros(1), beta=0.25)
    tensor([0.5000])
    """
    _positive("beta", beta)
    first, second = log_ratios(chosen, rejected, reference_chosen, reference_rejected)
    return torch.relu(1 - beta * (first - second))


def ipo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
) -> Tensor:
    """Identity preference optimisation, (n,):  (h - 1 / (2 beta))^2,  h as in `dpo`.

    Args:
        chosen_length, rejected_length: (n,) tokens of the responses, floating point: the log-ratios are
            then means over tokens, as in TRL. Give both or none. A length below 1 counts as 1.
        beta: > 0, the paper's tau; the loss is 1 / (4 beta^2) where the policy is the reference.
    The rest as in `dpo`. Source: arXiv 2310.12036, eq. 17.

    >>> import torch
    >>> ipo(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.zeros(1), torch.zeros(1), beta=0.5)
    tensor([1.])
    """
    _positive("beta", beta)
    first, second = log_ratios(chosen, rejected, reference_chosen, reference_rejected)
    if (chosen_length is None) != (rejected_length is None):
        raise ValueError("chosen_length must come with rejected_length, got one of the two. Give both or none.")
    if chosen_length is not None and rejected_length is not None:
        _checks.same_samples("chosen_length", chosen_length, "chosen", chosen)
        _checks.same_samples("rejected_length", rejected_length, "chosen", chosen)
        first, second = first / chosen_length.clamp_min(1), second / rejected_length.clamp_min(1)
    return (first - second - 1 / (2 * beta)).square()


def flip_corrected_dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    flip_rate: float = 0.1,
) -> Tensor:
    """DPO loss that is unbiased where a share `flip_rate` of the labels was flipped at random, (n,).

        ((1 - eps) l(h) - eps l(-h)) / (1 - 2 eps),    l(h) = -log sigmoid(beta h)

    It can be negative. `flip_rate` eps in [0, 0.5); the other arguments as in `dpo`.
    Known as robust DPO (rDPO): robust to label noise, not to a shift of the prompts.
    Source: arXiv 2403.00409.

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> flip_corrected_dpo(zero, zero, zero, zero, flip_rate=0.2)
    tensor([0.6931])
    """
    _positive("beta", beta)
    _checks.number("flip_rate", flip_rate, 0.0, 0.5, "It is the share of flipped labels.", open_high=True)
    first, second = log_ratios(chosen, rejected, reference_chosen, reference_rejected)
    right = bradley_terry(beta * first, beta * second)
    wrong = bradley_terry(beta * second, beta * first)
    return ((1 - flip_rate) * right - flip_rate * wrong) / (1 - 2 * flip_rate)


def simpo(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, margin: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """Preference loss without a reference model, (n,):  -log sigmoid(beta (chosen - rejected) - margin).

    Args:
        chosen, rejected: (n,) *mean* log-probability per token (`sequence_log_probs(..., average=True)`).
        beta: > 0.
        margin: >= 0, the paper's gamma, in units of beta times a log-probability.
        label_smoothing: in [0, 0.5), as in `dpo`.
    Returns: (n,) losses in float32 or wider.
    Raises: TypeError or ValueError: an argument of another shape, type, device or range.
    Source: arXiv 2405.14734.

    >>> import torch
    >>> simpo(torch.tensor([-1.0]), torch.tensor([-1.5]), beta=2.0, margin=1.0)
    tensor([0.6931])
    """
    _positive("beta", beta)
    _checks.number("margin", margin, 0.0, torch.inf, "Use 0 for no margin.")
    wide_chosen, wide_rejected = per_sample(chosen=chosen, rejected=rejected)
    return bradley_terry(beta * wide_chosen, beta * wide_rejected, margin=margin, label_smoothing=label_smoothing)


def _positive(name: str, value: float) -> None:
    remedy = "It multiplies the log-ratio; 0 would make every loss the same."
    _checks.number(name, value, 0.0, torch.inf, remedy, open_low=True)
