"""What a reward model is worth on an evaluation set."""

from __future__ import annotations

import base64

import torch
from torch import Tensor

from robustgrad import ChiSquare, TotalVariation
from robustgrad.objectives import bradley_terry

from .tasks import Judged

BINS = 10
# The population's worst cases that are reported: what a shift of the prompts can cost.
_WORST = {"tv10": TotalVariation(0.1), "tv40": TotalVariation(0.4), "chi10": ChiSquare(0.1)}


def measured(lead: Tensor, judged: Judged) -> dict[str, float]:
    """Of leads (n,) on one set. `accuracy` and `loss` are weighted to the population, `mean` and `worst` are over
    its domains, and `length_controlled` counts the pairs where longer is right and those where it is wrong alike:
    "longer wins" gets one half."""
    right = rights(lead)
    losses = bradley_terry(lead, torch.zeros_like(lead))
    by_domain = accuracies(right, judged.domains)
    longer = [right[judged.longer == side].mean().item() for side in (1, -1) if (judged.longer == side).any()]
    worst = {name: ball.solve(losses, base=judged.weight).value.item() for name, ball in _WORST.items()}
    return {
        "accuracy": (judged.weight @ right).item(),
        "mean": sum(by_domain.values()) / len(by_domain),
        "worst": min(by_domain.values()),
        "ece": calibration_error(lead, right),
        "length_controlled": sum(longer) / max(1, len(longer)),
        "loss": (judged.weight @ losses).item(),
        **worst,
    }


def rights(lead: Tensor) -> Tensor:
    """1 where the better response leads; a tie is worth as much as a guess."""
    return (lead > 0).float() + (lead == 0).float() / 2


def accuracies(right: Tensor, domains: list[str]) -> dict[str, float]:
    return {
        name: right[torch.tensor([domain == name for domain in domains])].mean().item() for name in sorted(set(domains))
    }


def calibration_error(lead: Tensor, right: Tensor) -> float:
    """Expected calibration error of the preferred response's probability, in ten bins of [1/2, 1]."""
    sure = lead.abs().sigmoid()
    place = ((sure - 0.5) * 2 * BINS).long().clamp_max(BINS - 1)
    gap = torch.zeros(BINS).index_add(0, place, sure - right)
    return (gap.abs().sum() / len(lead)).item()


def outcomes(lead: Tensor) -> dict[str, str]:
    """Which pairs were right and, where there are any, which were ties: a bit each, to compare item by item."""
    return {"right": _packed(lead > 0)} | ({"tied": _packed(lead == 0)} if (lead == 0).any() else {})


def unpacked(row: dict[str, str], count: int) -> Tensor:
    """(count,) float64: 1 where the pair was right, 1/2 where it was a tie."""
    return _bits(row["right"], count) + (_bits(row["tied"], count) / 2 if "tied" in row else 0)


def _packed(flags: Tensor) -> str:
    bits = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).reshape(-1, 8)
    numbers = (bits * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return base64.b64encode(bytes(numbers.tolist())).decode()


def _bits(text: str, count: int) -> Tensor:
    numbers = torch.tensor(list(base64.b64decode(text)))
    return ((numbers[:, None] >> torch.arange(7, -1, -1)) & 1).flatten()[:count].double()
