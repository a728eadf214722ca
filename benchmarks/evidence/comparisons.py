"""What the tables and sentences of the page ask of the results."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

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
        own, plain = (
            self.results.right(self.cell, name, self.mixture, self.results.two[which]) for name in (method, "plain")
        )
        both = min(len(own), len(plain))  # seeds come in order, and an unfinished run has the first of them
        return difference(own[:both], plain[:both])

    def value(self, method: str, name: str, iterate: str = "last") -> float:
        return self.results.value(self.cell, method, name, self.mixture, iterate)

    def more_loss(self, method: str, name: str = "tv10") -> Difference:
        """In the worst case of the population, over plain training."""
        own, plain = (self.results.values(self.cell, one, name, self.mixture) for one in (method, "plain"))
        return difference_of_numbers(own, plain)


class Shifted(Comparison):
    """And on the evaluation sets that are not of the training mixture."""

    @property
    def sets(self) -> list[str]:
        return [name for name in self.results.about["evals"] if name != self.mixture]

    def on(self, method: str, name: str) -> Difference:
        return difference(self.results.right(self.cell, method, name), self.results.right(self.cell, "plain", name))

    def overall(self, method: str) -> Difference:
        """Over the mean of these sets, each counting the same."""
        right = self.results.right
        return mean_of([(right(self.cell, method, name), right(self.cell, "plain", name)) for name in self.sets])

    def mean(self, method: str, name: str) -> float:
        return fmean(self.results.value(self.cell, method, name, one) for one in self.sets)
