"""Named losses, ordinary and hostile, and the ambiguity sets that every law is held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustgrad.ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation

INF, NAN = math.inf, math.nan


@dataclass(frozen=True, eq=False)
class Case:
    """One row of losses (float64 until `to`), its base weights and its mask."""

    name: str
    losses: Tensor
    base: Tensor | None = None
    mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, losses=self.losses.to(dtype))

    @property
    def valid(self) -> Tensor:
        """True where the sample takes part: not masked, base weight above zero."""
        on = torch.ones_like(self.losses, dtype=torch.bool) if self.mask is None else self.mask
        return on if self.base is None else on & (self.base > 0)

    @property
    def reference(self) -> Tensor:
        """Normalised base distribution, 0 where the sample takes no part; float64."""
        p = torch.ones_like(self.losses, dtype=torch.float64) if self.base is None else self.base.double()
        p = torch.where(self.valid, p, 0.0)
        return p / p.sum().clamp(min=1e-300)

    def take(self, index: Tensor) -> Case:
        def at(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index]

        return replace(self, losses=self.losses[index], base=at(self.base), mask=at(self.mask))

    def __repr__(self) -> str:
        return f"{self.name}[{str(self.losses.dtype).removeprefix('torch.')}]"


def _normal(n: int) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def _uniform(n: int) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def _row(name: str, *losses: float, base: list[float] | None = None, mask: list[int] | None = None) -> Case:
    return Case(
        name,
        torch.tensor(losses, dtype=torch.float64),
        None if base is None else torch.tensor(base, dtype=torch.float64),
        None if mask is None else torch.tensor(mask, dtype=torch.bool),
    )


k = torch.arange(50, dtype=torch.float64)

ORDINARY = [
    _row("one", 0.7),
    _row("two", 0.3, -0.2),
    _row("three", 0.3, 1.9, 0.4),
    Case("seven", _normal(7)),
    Case("softplus of 64", torch.nn.functional.softplus(_normal(64))),
    Case("513 exponential", -_uniform(513).log()),
    Case("4096 normal", _normal(4096)),
]
TIED = [
    _row("ties", 1, 1, 0, 2, 2, 2, 0, -1),
    _row("all equal", 3.1, 3.1, 3.1, 3.1, 3.1),
    Case("all log 2", torch.full((64,), math.log(2), dtype=torch.float64)),
    _row("all zero", 0, 0, 0),
    Case("zero or one", (_uniform(32) < 0.3).double()),
    Case("one positive of 40", torch.eye(40, dtype=torch.float64)[7]),
    Case("rounded", (_normal(200) * 4).round() / 4),
]
SIGNS = [
    Case("all negative", -_uniform(16) - 0.5),
    _row("maximum zero", -1, -0.5, 0, -3),
    Case("shifted by 1e4", _normal(33) + 1e4),
    Case("shifted by -1e4", _normal(33) - 1e4),
    Case("ascending", torch.linspace(-2, 5, 17, dtype=torch.float64)),
    Case("descending", torch.linspace(5, -2, 17, dtype=torch.float64)),
]
SCALES = [
    Case("spread 1e-8 to 1e8", torch.logspace(-8, 8, 33, dtype=torch.float64)),
    Case("around 1e-30", _normal(20) * 1e-30),
    Case("around 1e30", _normal(20) * 1e30),
    Case("gaps halve towards the maximum", -(2.0**-k)),
    Case("gaps double away from the maximum", -(2.0**k)),
    Case("one ulp apart", 1 + k[:9] * 2.0**-52),
    _row("one outlier", *([0.1, 0.2, 0.3, 0.4] * 4), 1e6),
    _row("second just below the maximum", 0, 0.2, 0.5, 1 - 1e-12, 1),
    Case("Cauchy", (math.pi * (_uniform(100) - 0.5)).tan()),
    Case("bfloat16 values", _normal(77).bfloat16().double()),
]
WEIGHTED = [
    Case("base", _normal(12), _uniform(12) + 0.05),
    Case("base summing to 7", _normal(12), 7 * _uniform(12) / _uniform(12).sum()),
    Case("base over ten decades", _normal(21), torch.logspace(-10, 0, 21, dtype=torch.float64)),
    Case("tied, with a base", (_normal(30) * 2).round(), _uniform(30) + 0.05),
    _row("base with zeros", 0.1, 0.5, -0.3, 0.9, 0.2, base=[1, 0, 2, 1, 0]),
    _row("base zero at the maximum", 0.1, 9, -0.3, 0.9, base=[1, 0, 2, 1]),
    _row("base on one sample", 0.1, 9, -0.3, base=[0, 0, 2]),
    _row("maximum of weight 1e-9", 0.1, 0.5, -0.3, 0.9, base=[1, 1, 2, 1e-9]),
]
MASKED = [
    _row("NaN masked", 0.1, NAN, 0.4, 0.3, mask=[1, 0, 1, 1]),
    _row("+inf masked", 0.1, INF, 0.4, 0.3, -INF, mask=[1, 0, 1, 1, 0]),
    _row("maximum masked", 0.1, 50, 0.4, 0.3, mask=[1, 0, 1, 1]),
    _row("all but one masked", NAN, 0.2, INF, 0.1, mask=[0, 1, 0, 0]),
    _row("mask and base", 0.1, NAN, 0.4, 0.3, 0.9, base=[1, 2, 3, 4, 0], mask=[1, 0, 1, 1, 1]),
    Case("masked head", _normal(21), None, torch.arange(21) > 10),
    Case("masked tail", torch.cat([_normal(40), torch.full((24,), 1e3)]), None, torch.arange(64) < 40),
]
FINITE = ORDINARY + TIED + SIGNS + SCALES + WEIGHTED + MASKED

MINUS_INF = [
    _row("one -inf", 0.1, 0.7, -INF, 0.4, 0.2),
    _row("many -inf", 0.1, 0.7, -INF, 0.4, 0.2, -INF, -INF, -INF),
    _row("all but one -inf", -INF, 0.3, -INF, -INF),
    _row("-inf and ties", 1, 1, -INF, -INF),
    _row("all -inf", -INF, -INF, -INF),
    _row("-inf with a base", 0.1, -INF, 0.5, base=[1, 0.5, 2]),
]
POISONED = [
    _row("NaN", 0.1, NAN, 0.4),
    _row("+inf", 0.1, INF, 0.4),
    _row("only NaN", NAN),
    _row("only +inf", INF, INF),
    _row("NaN, +inf and -inf", 0.1, NAN, INF, -INF),
    _row("NaN beside a mask", 0.1, NAN, 0.4, 0.2, mask=[1, 1, 0, 1]),
    _row("+inf with a base", 0.1, INF, 0.4, base=[1, 2, 3]),
]
EMPTY = [
    _row("nothing valid", 0.1, 0.2, mask=[0, 0]),
    _row("nothing valid, garbage", NAN, INF, -INF, mask=[0, 0, 0]),
    _row("base only under the mask", 0.1, 0.2, base=[0, 1], mask=[1, 0]),
]

CAPPED = [(0.0, 2.0), (1e-18, 2.0), (0.1, 2.0), (0.4, 1.5), (1.0, 4.0), (0.05, 100.0)]
BALLS: list[AmbiguitySet] = [
    *(TotalVariation(radius) for radius in (0.0, 1e-18, 1e-6, 0.1, 0.4, 0.97, 1.0)),
    *(TotalVariation(radius, cap=cap) for radius, cap in CAPPED),
    *(ChiSquare(radius) for radius in (0.0, 1e-18, 1e-6, 0.1, 0.5, 1.0, 10.0, 1e4)),
    *(KL(radius) for radius in (0.0, 1e-18, 1e-6, 0.05, 0.5, 3.0, 50.0)),
    *(CVaR(alpha) for alpha in (1.0, 1 - 2**-53, 0.999999, 0.5, 0.2, 0.01, 1e-6)),
]
PENALISED: list[AmbiguitySet] = [
    *(TotalVariation(penalty=price) for price in (0.1, 1.0, 100.0)),
    *(ChiSquare(penalty=price) for price in (0.1, 1.0, 100.0)),
    *(KL(temperature=price) for price in (0.1, 1.0, 100.0)),
]
SETS = BALLS + PENALISED
PLAIN = [TotalVariation(0.0), TotalVariation(0.0, cap=2.0), ChiSquare(0.0), KL(0.0), CVaR(1.0)]


def near_saturation(case: Case) -> list[AmbiguitySet]:
    """The balls of radius just below, at and above the one that puts all weight on the maximum of `case`."""
    p, losses = case.reference, case.losses.double()
    top = p[case.valid & (losses == losses[case.valid].max())].sum().item()
    edges = {TotalVariation: 1 - top, ChiSquare: (1 / top - 1) / 2, KL: -math.log(top)}
    most = {TotalVariation: 1.0, ChiSquare: INF, KL: INF}
    near = (1 - 1e-3, 1 - 1e-9, 1 - 1e-15, 1.0, 1 + 1e-15, 1 + 1e-9)
    balls = [kind(min(max(edge * f, 0.0), most[kind])) for kind, edge in edges.items() for f in near]
    return [*balls, *(CVaR(min(1.0, top * f)) for f in near)]


BY_RADIUS: dict[str, Callable[[float], AmbiguitySet]] = {
    "TotalVariation": TotalVariation,
    "TotalVariation with a cap": lambda radius: TotalVariation(radius, cap=2.5),
    "ChiSquare": ChiSquare,
    "KL": KL,
    "CVaR by 1 / alpha - 1": lambda radius: CVaR(1 / (1 + radius)),
}
