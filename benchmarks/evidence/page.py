"""The page: what was run, the tables, and what follows from them. No number in it is written by hand."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from . import human_tables, known_tables
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
LORA: Cell = (BASE, "minilm LoRA")
SMOLLM: Cell = (None, "smollm2 LoRA")
_WIDTH = 118


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
        *section("How large the minority is", known_tables.factor(results, "minority")),
        *section("How far the domains disagree", known_tables.factor(results, "conflict")),
        *section("Label noise", known_tables.factor(results, "noise")),
        *section("The radius", known_tables.radii(results)),
        "",
        f"![Accuracy against the radius]({pictures}/radius.png)",
        *section("What competes: memory or micro-batch", known_tables.pools(results)),
        *section("Last, best on validation, or averaged iterate (linear)", known_tables.iterates(results, LINEAR)),
        *section("Last, best on validation, or averaged iterate (MLP)", known_tables.iterates(results, MLP)),
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
    if rows := [row for method in results.methods(LORA) for row in results.rows(LORA, method)]:
        lines += [
            f"MiniLM with LoRA on the texts, known labels, {rows[0]['steps']} steps of {rows[0]['batch']} pairs, "
            f"judged on the first {rows[0]['most']} pairs of each domain. Steps and pairs are others than above: "
            "compare the rows of this table only.",
            "",
            *known_tables.language(results, LORA),
        ]
    else:
        lines.append("MiniLM with LoRA was not run.")
    if not results.methods(SMOLLM):
        lines += [
            "",
            "**Tier C, a model that learns the human labels, was not run**: there was no time for it. This runs it, "
            "and goes on where it was interrupted:",
            "",
            "```",
            "python benchmarks/ood_protocol_language.py --data FOLDER --tier human --model smollm2",
            "```",
        ]
    return lines


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
