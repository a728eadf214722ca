"""The radius that would have helped on domains that were held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .. import _checks

Domain = TypeVar("Domain", bound=Hashable)


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Loss on each domain of a model that never saw it, at each radius.

    `losses` is (radii, domains), float64.
    """

    radii: tuple[float, ...]
    domains: tuple[Hashable, ...]
    losses: Tensor

    @property
    def by_mean(self) -> float:
        """The radius with the lowest mean over the held-out domains; of equals the smallest."""
        return self._lowest(self.losses.mean(1))

    @property
    def by_worst(self) -> float:
        """The radius whose worst held-out domain is best; of equals the smallest."""
        return self._lowest(self.losses.amax(1))

    def gain(self, radius: float) -> tuple[float, float]:
        """How much lower the mean loss is than at the smallest radius, and the standard error of that number
        over the domains, NaN for one domain. A gain within two errors is not known to be one."""
        gains = self.losses[0] - self.losses[self.radii.index(radius)]
        error = gains.std().item() / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        return gains.mean().item(), error

    def _lowest(self, losses: Tensor) -> float:
        return self.radii[int(losses.argmin())]


def leave_one_domain_out(
    loss_without: Callable[[float, Domain], float], radii: Sequence[float], domains: Sequence[Domain]
) -> LeftOut:
    """Train without each domain in turn, at each radius, and look at the loss on the domain left out.

    Assumption: the domain to come differs from those at hand as each of them differs from the others. With
    few domains that is a guess: see the standard error of `gain`. It takes len(radii) * len(domains) runs;
    a model on frozen features makes them cheap.

    Args:
        loss_without: trains at a radius without a domain, returns the mean loss on that domain. Use the same
            seed for all radii, so that their differences are paired.
        radii: ascending; begin with 0.0, plain averaging, to see what robustness gains at all.
        domains: at least two, each to be left out once.
    Raises: ValueError: fewer than two domains, radii that do not ascend, or a loss that is not finite.
    Source: Gulrajani & Lopez-Paz (2021), leave-one-domain-out selection.

    >>> found = leave_one_domain_out(lambda radius, domain: (radius - 0.1) ** 2, [0.0, 0.1, 0.3], ["chat", "code"])
    >>> found.by_mean
    0.1
    """
    if len(set(domains)) != len(domains) or len(domains) < 2:
        raise ValueError(f"domains must be two or more, all different, got {list(domains)}. Give each one once.")
    if not radii or sorted(set(radii)) != list(radii):
        raise ValueError(f"radii must ascend, got {list(radii)}. Begin with 0.0 for plain averaging.")

    def measured(radius: float, domain: Domain) -> float:
        remedy = f"loss_without({radius:g}, {domain!r}) gave it; its training may have diverged."
        return _checks.number("loss", loss_without(radius, domain), -math.inf, math.inf, remedy)

    rows = [[measured(radius, domain) for domain in domains] for radius in radii]
    return LeftOut(tuple(radii), tuple(domains), torch.tensor(rows, dtype=torch.float64))
