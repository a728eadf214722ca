"""A radius against sampling noise alone: c / n."""

from __future__ import annotations

from statistics import NormalDist

from .. import _checks
from ..ambiguity import KL, AmbiguitySet, ChiSquare


def against_noise(kind: type[AmbiguitySet], n: int, *, level: float = 0.95) -> AmbiguitySet:
    """The chi-square or KL ball whose worst case is an upper confidence bound of the population mean.

        P( E loss  <=  max_{q in ball of radius z^2 / (2 n)} <q, losses> )  ->  level,   z the quantile of `level`

    Because the worst case is mean + sqrt(2 radius Var) to first order, which is mean + z sqrt(Var / n).

    Assumption: the samples are independent, from the very distribution that the model will meet, and their
    loss has a variance. It is asymptotic, for one fixed model, and covers the noise of n samples, not a
    shift: of 10000 samples it is ChiSquare(0.000135), which hardly moves anything. The bound costs about as
    much when the losses are heavy-tailed as it then helps.

    Args:
        kind: ChiSquare or KL; for total variation and CVaR no radius ~ 1/n has this property.
        n: number of independent samples (prompts, not tokens), at least 1.
        level: in [0.5, 1), one-sided.
    Raises: ValueError or TypeError: an argument of another kind or range.
    Source: Duchi, Glynn & Namkoong (2021), Statistics of robust optimization, whose radius for the
        divergence sum p (q/p - 1)^2 is rho / n with P(chi2_1 <= rho) = 2 level - 1.

    >>> round(against_noise(ChiSquare, 1000).radius, 6)
    0.001353
    """
    if kind not in (ChiSquare, KL):
        raise ValueError(f"kind must be ChiSquare or KL, got {kind!r}. Others have no radius of this meaning.")
    _checks.whole("n", n, 1, "It is the number of independent samples.")
    _checks.number("level", level, 0.5, 1.0, "It is a one-sided confidence level.", open_high=True)
    return kind(NormalDist().inv_cdf(level) ** 2 / (2 * n))
