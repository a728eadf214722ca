"""Sets to try first, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ambiguity import AmbiguitySet, ChiSquare, TotalVariation
from ..radius import against_noise, equal_reach, within_ess
from .worst import GroupShare


@dataclass(frozen=True)
class Suggestion:
    ambiguity: AmbiguitySet
    reason: str

    @property
    def code(self) -> str:
        """As it is typed, to four digits."""
        one = self.ambiguity
        radius = getattr(one, "radius", None)
        return repr(one) if radius is None else f"{type(one).__name__}({radius:.4g})"


def suggestions(
    ambiguity: AmbiguitySet, losses: Tensor, base: Tensor, groups: Sequence[GroupShare]
) -> tuple[Suggestion, ...]:
    half = float(ChiSquare(0.0).solve(losses, base=base).ess) / 2
    found = [
        Suggestion(TotalVariation(0.1), "up to 10% of the prompts may change: a size to begin with"),
        Suggestion(
            equal_reach(ambiguity, ChiSquare, losses, base=base),
            f"the worst-case mean of {ambiguity!r} on these losses",
        ),
        Suggestion(
            within_ess(ChiSquare, losses, ess=max(half, 1.0), base=base),
            "the largest that keeps half of the samples effective",
        ),
        Suggestion(against_noise(ChiSquare, len(losses)), "covers the noise of this many samples, and no shift"),
    ]
    if groups and 0 < groups[0].share <= 0.5:
        reason = f"the group {groups[0].group} may become twice as frequent"
        found.insert(1, Suggestion(TotalVariation(groups[0].share), reason))
    return tuple(found)
