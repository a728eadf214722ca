"""What follows from the committed results: `conclusions.md`, whose numbers are filled in here.

A field is {what|cell|method}. What the sentences say is checked as well: results that no longer say so make an
error, not a page.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from .choice_tables import best, radius_of, regret
from .claims import CELLS, claims
from .comparisons import MAJORITY, MINORITY, Shifted
from .results import Results

TEXT = Path(__file__).parent / "conclusions.md"


def conclusions(results: Results) -> list[str]:
    """The paragraphs and points, a line each."""
    check(results)
    text = TEXT.read_text(encoding="utf-8").strip()
    text = re.sub(r"\n +|(?<!\n)\n(?=[A-Za-z])", " ", text)  # a point or a paragraph that goes on
    return re.sub(r"\{([^}]*)\}", lambda field: number(results, *field[1].split("|")), text).splitlines()


def number(results: Results, what: str, cell: str, method: str) -> str:
    own = Shifted(results, CELLS[cell])
    match what:
        case "both":
            return f"{own.accuracy(method, MINORITY):.3f} / {own.accuracy(method, MAJORITY):.3f}"
        case "minority":
            return str(own.gain(method, MINORITY))
        case "majority":
            return str(own.gain(method, MAJORITY))
        case "more loss":
            return str(own.more_loss(method))
        case "shifted":
            return str(own.overall(method))
        case "radius":
            return radius_of(results, CELLS[cell], method)
        case "best":
            return best(own)
        case "above the best":
            return f"{regret(results, method):+.3f}"
        case "right":
            return f"{results.right(own.cell, method, own.mixture).mean().item():.3f}"
        case "best loss":
            return f"{own.value(best(own), 'tv10'):.3f}"
        case "seeds":
            return str(len(results.rows(CELLS[cell], method)))
        case "seen":
            return f"{own.overall(method).smallest:.3f}"
        case "largest group share":
            return f"{max(results.about['minority_by_group']):.0%}"
        case "no opinion":
            return f"{math.log(2):.3f}"
        case "mean loss" | "ece" | "accuracy":
            return f"{own.value(method, what.removeprefix('mean ')):.3f}"
        case "loss" | "loss best" | "loss average":
            return f"{own.value(method, 'tv10', what.removeprefix('loss').strip() or 'last'):.3f}"
    if what.startswith("on "):
        return str(own.on(method, what.removeprefix("on ")))
    raise ValueError(f"unknown field {what!r} in {TEXT.name}")


def check(results: Results) -> None:
    """Raises: ValueError: a conclusion that the results do not bear out."""
    for says, holds in claims(results).items():
        if not holds:
            raise ValueError(f"the results do not say (any more): {says}. Rewrite {TEXT.name}.")
