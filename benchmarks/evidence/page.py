"""The page: what was run, the tables, and what follows from them. No number in it is written by hand."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from . import choice_tables, human_tables, known_tables
from .comparisons import MAJORITY, Comparison
from .conclusions import conclusions
from .heads import HIDDEN
from .human_tables import LINEAR as HUMAN
from .human_tables import MLP as HUMAN_MLP
from .known_tables import LINEAR, NOISY
from .measures import BINS
from .methods import METHODS
from .results import Cell, Results
from .studies import BASE, GROUPS
from .tasks import BATCH

MLP: Cell = (BASE, "mlp")
NOISY_MLP: Cell = (NOISY[0], "mlp")
TEXTS: tuple[Cell, ...] = ((BASE, "minilm LoRA"), (BASE, "minilm full"))
SMOLLM: Cell = (None, "smollm2 LoRA")
_WIDTH = 118  # characters
_KNOWN, _HUMAN = 0.75, 0.6  # accuracy from which a run counts as having learned its labels


def page(results: Results, pictures: str, *, judged: bool = True) -> str:
    """The whole page; without what was concluded (`judged`) for results other than those it was concluded from."""
    parts = [_head(pictures, judged)]
    if judged:
        parts.append(conclusions(results))
    parts += [_what_was_run(results), _known(results, pictures), _human(results), _language(results), _again()]
    return "\n\n".join("\n".join(map(_wrapped, part)) for part in parts) + "\n"


def _wrapped(line: str) -> str:
    """Prose in lines of a readable length; tables, pictures and code as they are."""
    if len(line) <= _WIDTH or line.startswith(("|", "!", "#")):
        return line
    indent = " " * len(re.match(r"(- |\d\. )?", line)[0])
    return textwrap.fill(line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _head(pictures: str, judged: bool) -> list[str]:
    return [
        "# Does robustness help, when, and at what cost?" if judged else "# Results",
        "",
        f"Made by `python benchmarks/evidence_page.py` from the rows in `{pictures.removeprefix('../')}`; every number "
        "comes from there. Differences are paired: same seeds, batches and pairs. Intervals are 95%, by bootstrap over "
        "seeds and pairs together. A star marks an interval that leaves out 0; with this many comparisons some do by "
        "chance.",
    ]


def _what_was_run(results: Results) -> list[str]:
    about, (majority, minority) = results.about, (*results.two, "-")[:2]
    text = (Path(__file__).parent / "what_was_run.md").read_text(encoding="utf-8").strip()
    return re.sub(r"\n +", " ", text).format(
        **about | {
            "total": sum(about["train"].values()),
            "train": ", ".join(f"{name} {count}" for name, count in about["train"].items()),
            "evals": ", ".join(f"{name} {len(coded['of'].split())}" for name, coded in about["evals"].items()),
        },
        majority=majority,
        minority=minority,
        share=f"{BASE.share:.0%}",
        known_set=results.known_set or "-",
        hidden=HIDDEN,
        batch=BATCH,
        methods=len(METHODS),
        groups=GROUPS,
        bins=BINS,
        minutes=f"{results.seconds() / 60:.0f}",
    ).splitlines()  # fmt: skip


def _known(results: Results, pictures: str) -> list[str]:
    def section(title: str, lines: list[str]) -> list[str]:
        return ["", f"### {title}", "", *lines]

    if results.known_set is None:
        return ["## Known labels (tier A)", "", "Not run: the pairs are not of two domains."]
    return [
        "## Known labels (tier A)",
        *section("Linear head", known_tables.methods(results, LINEAR)),
        *section("Linear head, 20% of the training labels wrong", known_tables.methods(results, NOISY)),
        "",
        f"![Gain of each method over plain training]({pictures}/gains.png)",
        *section("MLP, which sees the prompt", known_tables.methods(results, MLP)),
        *section("MLP, 20% of the training labels wrong", known_tables.methods(results, NOISY_MLP)),
        *section("How large the minority is", known_tables.factor(results, "minority")),
        *section("How far the domains disagree", known_tables.factor(results, "conflict")),
        *section("Label noise", known_tables.factor(results, "noise")),
        *section("The radius", known_tables.radii(results)),
        "",
        f"![Accuracy against the radius]({pictures}/radius.png)",
        *section("Ways to choose the radius (linear head)", _choices(results)),
        *section("What competes: memory or micro-batch", known_tables.pools(results)),
        *section("Last, best on validation, or averaged iterate (linear)", known_tables.iterates(results, LINEAR)),
        *section("Last, best on validation, or averaged iterate (MLP)", known_tables.iterates(results, MLP)),
    ]


def _choices(results: Results) -> list[str]:
    return [
        "Each way of `robustgrad.radius` chooses for every seed anew, from the training and validation pairs, or from "
        "unlabeled prompts of both domains in equal parts. The radius is the median over the seeds (smallest to "
        "largest), that of a schedule the last one. In hindsight: lowest worst-case loss of the radii in the table "
        "above.",
        "",
        *choice_tables.chosen(results),
        "",
        *choice_tables.losses(results),
        "",
        *choice_tables.accuracies(results),
    ]


def _human(results: Results) -> list[str]:
    return [
        "## Human labels (tier B)",
        "",
        "Beside each set stands the smallest difference that a run of this size would have seen, at the 5% level with "
        "80% power (mean of the methods). Differences below it say nothing.",
        "",
        "### Linear head",
        "",
        *human_tables.power(results, HUMAN),
        "",
        *human_tables.methods(results, HUMAN),
        "",
        "### MLP",
        "",
        *human_tables.power(results, HUMAN_MLP),
        "",
        *human_tables.methods(results, HUMAN_MLP),
    ]


def _language(results: Results) -> list[str]:
    lines = ["## Language models (tiers A and C)", ""]
    for cell in TEXTS:
        if results.methods(cell):
            lines += [_about_language(results, cell), "", *known_tables.language(results, cell), ""]
        else:
            lines += [f"{cell[1]} was not run.", ""]
    if results.methods(SMOLLM):
        lines += [_about_language(results, SMOLLM), "", *human_tables.language(results, SMOLLM), ""]
    else:
        lines += ["**Tier C, a model that learns the human labels, was not run.**", ""]
    return [
        *lines,
        "Longer runs of it, on your data or a larger machine, go on where they were interrupted:",
        "",
        "```",
        "python benchmarks/ood_protocol_language.py --data FOLDER --tier human --model smollm2 --steps 500",
        "```",
    ]


def _about_language(results: Results, cell: Cell) -> str:
    row = results.rows(cell, "plain")[0]
    tier, precision = "human" if cell[0] is None else "known", row.get("precision", "float32")
    text = (
        f"**{cell[1]}** on the texts, {tier} labels, {row['steps']} steps of {row['batch']} pairs, {precision}, judged "
        f"on the first {row['most']} pairs of each domain. Steps and pairs are others than above: compare the rows of "
        "this table only."
    )
    if cell[0] is None:
        reached = results.right(cell, "plain", results.known_set).mean().item()
        return f"{text} Plain training reaches {reached:.3f} on the training mixture. {_learned(reached, _HUMAN)}"
    majority = Comparison(results, cell).accuracy("plain", MAJORITY)
    return f"{text} Plain training reaches {majority:.3f} on the majority. {_learned(majority, _KNOWN)}"


def _learned(reached: float, enough: float) -> str:
    return "It learned the labels." if reached > enough else "It did not learn the labels: this says little."


def _again() -> list[str]:
    return [
        "## Run it again",
        "",
        "```",
        "python benchmarks/ood_protocol.py --data FOLDER --out OUT      # your own pairs, or the same",
        "python benchmarks/evidence_page.py --results OUT --page OUT/page.md",
        "```",
        "",
        "FOLDER holds `train.jsonl`, perhaps `validation.jsonl`, and any other files of pairs (`prompt`, `chosen`, "
        "`rejected`, perhaps `domain`), each an evaluation set. Embedding comes first and is cached; runs that are "
        "there already are left out.",
    ]
