"""The tables of the tier with known labels. A star: the 95% interval of the difference leaves out 0."""

from __future__ import annotations

import math

from .comparisons import MAJORITY, MINORITY, Comparison, table
from .methods import GROUP_RADII, KEY_METHODS, POOLS, RADII
from .results import Cell, Results
from .studies import BASE, CONFLICTS, NOISES, SHARES
from .truth import Truth

LINEAR: Cell = (BASE, "linear")
NOISY: Cell = (Truth(noise=0.2), "linear")
CELLS: dict[str, dict[str, Cell]] = {
    "minority": {f"{share:.0%}": (Truth(share=share), "linear") for share in SHARES},
    "conflict": {f"{conflict:.0%}": (Truth(conflict=conflict), "linear") for conflict in CONFLICTS},
    "noise": {f"{noise:.0%}": (Truth(noise=noise), "linear") for noise in NOISES},
}


def methods(results: Results, cell: Cell) -> list[str]:
    """All methods in one cell, below the floors."""
    head = ["method", "majority", "minority", "majority - plain", "minority - plain (95%)", "loss", "worst-case loss",
            "its difference (95%)", "worst-case loss, chi-square .1", "ECE", "length-controlled"]  # fmt: skip
    own = Comparison(results, cell)
    no_opinion = [f"{math.log(2):.3f}"] * 2
    return table(
        head,
        [
            *(_floor(results, cell, *floor) for floor in _FLOORS),
            ["*no opinion*", "0.500", "0.500", "", "", *no_opinion, "", no_opinion[0], "0.000", "0.500"],
            *(_method(own, method) for method in own.methods),
        ],
    )


def _method(own: Comparison, method: str) -> list[object]:
    gains: list[object] = ["", "", ""]
    if method != "plain":
        gains = [own.gain(method, MAJORITY).short, own.gain(method, MINORITY), own.more_loss(method)]
    reached = [f"{own.accuracy(method, which):.3f}" for which in (MAJORITY, MINORITY)]
    loss, worst, chi, ece, controlled = (
        f"{own.value(method, name):.3f}" for name in ("loss", "tv10", "chi10", "ece", "length_controlled")
    )
    return [method, *reached, *gains[:2], loss, worst, gains[2], chi, ece, controlled]


_FLOORS = (("longer wins", "none", "longer wins"), ("bag of words", "bag of words", "plain"))


def _floor(results: Results, cell: Cell, name: str, capacity: str, method: str) -> list[str]:
    own = Comparison(results, (cell[0], capacity))
    reached = [f"{own.accuracy(method, which):.3f}" for which in (MAJORITY, MINORITY)]
    return [f"*{name}*", *reached, *[""] * 7, f"{own.value(method, 'length_controlled'):.3f}"]


def factor(results: Results, name: str) -> list[str]:
    """How what a method gains moves with one factor, minority / majority."""
    cells = {head: Comparison(results, cell) for head, cell in CELLS[name].items()}
    plain = [
        " / ".join(f"{own.accuracy('plain', which):.3f}" for which in (MINORITY, MAJORITY)) for own in cells.values()
    ]
    rows = [
        [
            method,
            *(" / ".join(own.gain(method, which).short for which in (MINORITY, MAJORITY)) for own in cells.values()),
        ]
        for method in list(KEY_METHODS)[1:]
    ]
    return table([name, *cells], [["*plain itself*", *plain], *rows])


def radii(results: Results) -> list[str]:
    cells = {"": Comparison(results, LINEAR), ", noise 20%": Comparison(results, NOISY)}
    head = [f"{what}{tail}" for tail in cells for what in ("minority", "majority", "worst-case loss")]
    rows = [
        [method, *(number for own in cells.values() for number in _three(own, method))]
        for method in RADII | GROUP_RADII
    ]
    return table(["set", *head], rows)


def _three(own: Comparison, method: str) -> list[str]:
    reached = [own.accuracy(method, MINORITY), own.accuracy(method, MAJORITY), own.value(method, "tv10")]
    return [f"{number:.3f}" for number in reached]


def pools(results: Results) -> list[str]:
    own = Comparison(results, LINEAR)
    rows = [
        [method, f"{own.accuracy(method, MINORITY):.3f}", own.gain(method, MINORITY), own.gain(method, MAJORITY)]
        for method in ("plain", "TV .1", "chi-square .1", *list(POOLS)[1:])
    ]
    return table(
        ["set, what competes, samples a call", "minority", "minority - plain (95%)", "majority - plain (95%)"], rows
    )


def iterates(results: Results, cell: Cell) -> list[str]:
    own, names = Comparison(results, cell), ("last", "best", "average")
    kinds = {"worst domain": "worst", "worst-case loss": "tv10"}
    rows = [
        [method, *(f"{own.value(method, kind, name):.3f}" for kind in kinds.values() for name in names)]
        for method in own.methods
    ]
    return table(["method", *(f"{kind}, {name}" for kind in kinds for name in names)], rows)


def language(results: Results, cell: Cell) -> list[str]:
    own = Comparison(results, cell)
    rows = [
        [method, len(results.rows(cell, method)),
         *(f"{own.accuracy(method, which):.3f}" for which in (MAJORITY, MINORITY)),
         *(own.gain(method, which) for which in (MAJORITY, MINORITY)), f"{own.value(method, 'tv10'):.3f}"]
        for method in results.methods(cell)
    ]  # fmt: skip
    head = [
        "method",
        "seeds",
        "majority",
        "minority",
        "majority - plain (95%)",
        "minority - plain (95%)",
        "worst-case loss",
    ]
    return table(head, rows)
