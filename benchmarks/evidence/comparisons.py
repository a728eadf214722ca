"""What the tables and sentences of the page ask of the results."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from torch import Tensor

from .methods import METHODS
from .paired import Difference, difference, difference_of_numbers, mean_of
from .results import Cell, Results

MAJORITY, MINORITY = 0, 1


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of markdown; all columns but the first are numbers."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([str(entry) for entry in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


class Comparison:
    """The methods of one cell, on one evaluation set of the two domains."""

    def __init__(self, results: Results, cell: Cell) -> None:
        self.results, self.cell = results, cell
        self.mixture = results.known_set

    @property
    def methods(self) -> list[str]:
        """Those of the protocol that were run here, in its order."""
        there = self.results.methods(self.cell)
        return [method for method in METHODS if method in there]

    @property
    def others(self) -> list[str]:
        return [method for method in self.methods if method != "plain"]

    def accuracy(self, method: str, which: int) -> float:
        return self.results.right(self.cell, method, self.mixture, self.results.two[which]).mean().item()

    def gain(self, method: str, which: int) -> Difference:
        """In accuracy on the majority or the minority, over plain training."""
        return difference(*self.both(method, self.mixture, self.results.two[which]))

    def both(self, method: str, of_set: str, domain: str | None = None) -> tuple[Tensor, Tensor]:
        """What was right, with it and with plain training, in the seeds of both: an unfinished run has the first."""
        own, plain = (self.results.right(self.cell, name, of_set, domain) for name in (method, "plain"))
        seeds = min(len(own), len(plain))
        return own[:seeds], plain[:seeds]

    def value(self, method: str, name: str, iterate: str = "last") -> float:
        return self.results.value(self.cell, method, name, self.mixture, iterate)

    def more_loss(self, method: str, name: str = "tv10") -> Difference:
        """In the worst case of the population, over plain training."""
        own, plain = (self.results.values(self.cell, one, name, self.mixture) for one in (method, "plain"))
        seeds = min(len(own), len(plain))
        return difference_of_numbers(own[:seeds], plain[:seeds])


class Shifted(Comparison):
    """And on the evaluation sets that are not of the training mixture."""

    @property
    def sets(self) -> list[str]:
        return [name for name in self.results.about["evals"] if name != self.mixture]

    def on(self, method: str, name: str) -> Difference:
        return difference(*self.both(method, name))

    def overall(self, method: str) -> Difference:
        """Over the mean of these sets, each counting the same."""
        return mean_of([self.both(method, name) for name in self.sets])

    def mean(self, method: str, name: str) -> float:
        return fmean(self.results.value(self.cell, method, name, one) for one in self.sets)
