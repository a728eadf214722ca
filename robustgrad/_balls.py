"""One number for the size of every ball: what a warm-up scales and a search for a radius walks along."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from .ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

# The sets by the names that a command line and a table use.
BALLS: dict[str, type[AmbiguitySet]] = {"tv": TotalVariation, "chi2": ChiSquare, "kl": KL, "cvar": CVaR}


def size(ambiguity: AmbiguitySet) -> float:
    """The radius, or 1/alpha - 1 for CVaR: 0 is plain averaging, and the worst case grows with it.

    Raises: ValueError: the set prices its divergence instead of bounding it.
    """
    if isinstance(ambiguity, CVaR):
        return 1 / ambiguity.alpha - 1
    radius: float | None = getattr(ambiguity, "radius", None)
    if radius is None:
        raise ValueError(
            f"ambiguity must have a radius (or alpha), got {ambiguity!r}. A penalty or temperature has no size that "
            "could be compared with others'."
        )
    return radius


def resized(ambiguity: AmbiguitySet, new: float) -> AmbiguitySet:
    """The set with another size, and all else, such as a cap, as it is."""
    changed = {"alpha": 1 / (1 + new)} if isinstance(ambiguity, CVaR) else {"radius": new}
    return replace(ambiguity, **changed)  # type: ignore[type-var]  # every set is a dataclass


def plain(kind: type[AmbiguitySet]) -> AmbiguitySet:
    """The set of this kind of size 0.

    Raises: TypeError: `kind` is not one of the four sets.
    """
    if kind not in BALLS.values():
        raise TypeError(f"kind must be TotalVariation, ChiSquare, KL or CVaR, got {kind!r}. Pass the class itself.")
    return kind(1.0 if kind is CVaR else 0.0)  # type: ignore[call-arg]


def largest(start: AmbiguitySet, within: Callable[[AmbiguitySet], bool], steps: int = 100) -> AmbiguitySet:
    """The largest set of this kind that is `within` a bound, which smaller ones are too; bisection.

    `start` itself, where not even that is. Where all are, the largest there is.
    """
    low, high = 0.0, 1.0
    while not isinstance(start, TotalVariation) and within(resized(start, high)) and high < 1e9:
        low, high = high, 2 * high
    if within(resized(start, high)):
        return resized(start, high)
    for _ in range(steps):
        middle = (low + high) / 2
        if middle in (low, high) or math.isclose(low, high, rel_tol=1e-9):
            break
        low, high = (middle, high) if within(resized(start, middle)) else (low, middle)
    return resized(start, low)
