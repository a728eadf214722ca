"""The tables of the tier with human labels. A star: the 95% interval of the difference leaves out 0."""

from __future__ import annotations

from statistics import fmean

from .comparisons import MAJORITY, MINORITY, Shifted, table
from .paired import Difference
from .results import Cell, Results
from .tasks import first_of_each

LINEAR: Cell = (None, "linear")
MLP: Cell = (None, "mlp")


def power(results: Results, cell: Cell) -> list[str]:
    """What plain training reaches beside the floors, and what a run of this size can see."""
    own, rows = Shifted(results, cell), []
    for name in results.about["evals"]:
        reached = [
            results.right((None, "none"), "longer wins", name),
            results.right((None, "bag of words"), "plain", name),
            results.right(cell, "plain", name),
        ]
        seen = fmean(own.on(method, name).smallest for method in own.others)
        rows.append([name, reached[0].shape[1], *(f"{right.mean().item():.3f}" for right in reached), f"{seen:.3f}"])
    return table(["set", "pairs", "*longer wins*", "*bag of words*", "plain", "smallest difference seen"], rows)


def methods(results: Results, cell: Cell) -> list[str]:
    """All methods, less plain training: on the shifted sets, and on the two domains of the training mixture."""
    own = Shifted(results, cell)
    two = (MINORITY, MAJORITY) if own.mixture else ()
    plain = [
        f"{own.mean('plain', 'accuracy'):.3f}",
        *(f"{own.accuracy('plain', which):.3f}" for which in two),
        *(f"{results.right(cell, 'plain', name).mean().item():.3f}" for name in own.sets),
    ]
    rows = [["*plain itself*", *plain, *_means(own, "plain")]]
    for method in own.others:
        gains: list[Difference] = [own.gain(method, which) for which in two] + [own.on(method, s) for s in own.sets]
        rows.append([method, str(own.overall(method)), *(gain.short for gain in gains), *_means(own, method)])
    names = [results.two[which] for which in two] + [name.removeprefix("eval_") for name in own.sets]
    return table(["method", "mean of shifted sets (95%)", *names, "ECE", "length-controlled"], rows)


def _means(own: Shifted, method: str) -> list[str]:
    return [f"{own.mean(method, name):.3f}" for name in ("ece", "length_controlled")]


def language(results: Results, cell: Cell) -> list[str]:
    """Accuracy on every set, its mean over the shifted ones against plain training, and that of the longer response."""
    own, names = Shifted(results, cell), list(results.about["evals"])
    head = ["method", "seeds", *(name.removeprefix("eval_") for name in names), "shifted sets - plain (95%)"]
    longer = [f"{_longer(results, cell, name):.3f}" for name in names]
    rows = [
        [method, len(results.rows(cell, method)),
         *(f"{results.right(cell, method, name).mean().item():.3f}" for name in names),
         "" if method == "plain" else own.overall(method)]
        for method in results.methods(cell)
    ]  # fmt: skip
    return table(head, [["*longer wins*", "", *longer, ""], *rows])


def _longer(results: Results, cell: Cell, name: str) -> float:
    """On the pairs that a language model was judged on."""
    judged = first_of_each(results.domains(cell, name), results.rows(cell, "plain")[0]["most"])
    return results.right((None, "none"), "longer wins", name)[:, judged].mean().item()
