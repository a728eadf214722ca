"""The tables of the tier with known labels. A star: the 95% interval of the difference leaves out 0."""

from __future__ import annotations

from collections.abc import Iterator

from .comparisons import MAJORITY, MINORITY, Comparison, table
from .methods import KEY_METHODS, POOLS, RADII
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
    head = ["method", "majority", "minority", "majority - plain", "minority - plain (95%)", "worst-case loss",
            "its difference (95%)", "ECE", "length-controlled"]  # fmt: skip
    own = Comparison(results, cell)
    return table(head, [*_floors(results, cell), *(_method(own, method) for method in own.methods)])


def _method(own: Comparison, method: str) -> list[object]:
    gains: list[object] = ["", "", ""]
    if method != "plain":
        gains = [own.gain(method, MAJORITY).short, own.gain(method, MINORITY), own.more_loss(method)]
    return [method, *(f"{own.accuracy(method, which):.3f}" for which in (MAJORITY, MINORITY)), *gains[:2],
            f"{own.value(method, 'tv10'):.3f}", gains[2],
            *(f"{own.value(method, name):.3f}" for name in ("ece", "length_controlled"))]  # fmt: skip


def _floors(results: Results, cell: Cell) -> Iterator[list[str]]:
    for name, capacity, method in (("longer wins", "none", "longer wins"), ("bag of words", "bag of words", "plain")):
        own = Comparison(results, (cell[0], capacity))
        reached = [f"{own.accuracy(method, which):.3f}" for which in (MAJORITY, MINORITY)]
        yield [f"*{name}*", *reached, "", "", "", "", "", f"{own.value(method, 'length_controlled'):.3f}"]


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
    rows = [[method, *(number for own in cells.values() for number in _three(own, method))] for method in RADII]
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
