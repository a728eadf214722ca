"""The tables of the ways to choose a radius, in several truths. A star: the 95% interval leaves out 0."""

from __future__ import annotations

from statistics import median

from .choices import CHOICES
from .comparisons import MAJORITY, MINORITY, Comparison, table
from .methods import TV_RADII
from .results import Cell, Results
from .studies import CHOOSING

_SIGN = {"TotalVariation": "TV", "ChiSquare": "chi-square"}
_NAMES = ("base", "noise 20%", "minority 1%", "minority 30%", "no conflict", "no conflict, noise 20%")
CELLS: dict[str, Cell] = {name: (truth, "linear") for name, truth in zip(_NAMES, CHOOSING, strict=True)}


def best(own: Comparison) -> str:
    """The radius of total variation with the lowest worst-case loss: known in hindsight alone."""
    return min(["plain", *TV_RADII], key=lambda method: own.value(method, "tv10"))


def radii(results: Results, cell: Cell, choice: str) -> list[float]:
    """That of each seed."""
    return [row["radius"] for row in results.rows(cell, choice)]


def chosen(results: Results) -> list[str]:
    """Which radius each way chose."""
    rows = [[choice, *(radius_of(results, cell, choice) for cell in CELLS.values())] for choice in CHOICES]
    return table(["radius", *CELLS], [*rows, ["*best TV in hindsight*", *map(best, _owns(results))]])


def radius_of(results: Results, cell: Cell, choice: str) -> str:
    """With its set: the median over the seeds and, where they differ, from which to which."""
    kind = _SIGN[results.rows(cell, choice)[0]["set"]]
    low, middle, high = (_short(of(radii(results, cell, choice))) for of in (min, median, max))
    return f"{kind} {middle}" + (f" ({low} to {high})" if low != high else "")


def _short(number: float) -> str:
    return f"{number:.2g}".replace("0.", ".", 1) if number >= 1e-4 else f"{number:.0g}"


def losses(results: Results) -> list[str]:
    """The worst-case loss, what it gained over plain training, and the most that it is above the best in hindsight."""
    rows = [[method, *(_loss(own, method) for own in _owns(results)), f"{regret(results, method):+.3f}"]
            for method in ("plain", *CHOICES)]  # fmt: skip
    hindsight = ["*best TV in hindsight*", *(_loss(own, best(own)) for own in _owns(results)), ""]
    return table(["worst-case loss", *CELLS, "most above the best"], [*rows, hindsight])


def regret(results: Results, method: str) -> float:
    return max(own.value(method, "tv10") - own.value(best(own), "tv10") for own in _owns(results))


def accuracies(results: Results) -> list[str]:
    rows = [[method, *(_both(own, method) for own in _owns(results))] for method in ("plain", *CHOICES)]
    hindsight = ["*best TV in hindsight*", *(_both(own, best(own)) for own in _owns(results))]
    return table(["minority / majority", *CELLS], [*rows, hindsight])


def _owns(results: Results) -> list[Comparison]:
    return [Comparison(results, cell) for cell in CELLS.values()]


def _loss(own: Comparison, method: str) -> str:
    gain = "" if method == "plain" else f" ({own.more_loss(method).short})"
    return f"{own.value(method, 'tv10'):.3f}{gain}"


def _both(own: Comparison, method: str) -> str:
    return " / ".join(f"{own.accuracy(method, which):.3f}" for which in (MINORITY, MAJORITY))
