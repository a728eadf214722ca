"""The page: what was run, the tables, and what follows from them. No number in it is written by hand."""

from __future__ import annotations

import re
import textwrap

from . import human_tables, known_tables
from .conclusions import conclusions
from .heads import HIDDEN
from .human_tables import LINEAR as HUMAN
from .human_tables import MLP as HUMAN_MLP
from .known_tables import LINEAR, NOISY
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
    parts = [_head(judged)]
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


def _head(judged: bool) -> list[str]:
    return [
        "# Does robustness help, when, and at what cost?" if judged else "# Results",
        "",
        "Made by `python benchmarks/evidence_page.py` from the rows in `benchmarks/results/ood_protocol`; every number "
        "comes from there. Differences are paired: same seeds, batches and pairs. Intervals are 95%, by bootstrap over "
        "seeds and pairs together. A star marks an interval that leaves out 0; with this many comparisons some do by "
        "chance.",
    ]


def _what_was_run(results: Results) -> list[str]:
    about, (major, minor), total = results.about, results.two, sum(results.about["train"].values())
    train = ", ".join(f"{name} {count}" for name, count in about["train"].items())
    evals = ", ".join(f"{name} {len(coded['of'].split())}" for name, coded in about["evals"].items())
    return [
        "## What was run",
        "",
        f"- **Data**: {total} training pairs ({train}); evaluation sets and their pairs: {evals}. Models are trained "
        "once on `train`; nothing is chosen on an evaluation set.",
        f"- **Known labels** (tier A): the real prompts and responses of {major} (majority) and {minor} (minority), "
        f"{about['known_size']} training pairs, labels from two known scores of the response's embedding; the minority "
        "is labelled by another score, from the same one (no conflict) through an unrelated one (half) to its opposite "
        "(full). Unless said otherwise: minority "
        f"{BASE.share:.0%}, full conflict, no label noise. Judged by right labels on {results.known_set}.",
        "- **Human labels** (tier B): the labels of the files, all evaluation sets.",
        "- **Language models** (tiers A and C): LoRA in place of frozen features.",
        f"- **Models**: frozen MiniLM features with a linear head on the response, or an MLP ({HIDDEN} hidden units) "
        f"on prompt, response and their product; {about['steps']} AdamW steps of {BATCH} pairs, {about['seeds']} "
        "seeds, the same batches for every method. Learning rates by the validation loss of plain training.",
        f"- **Methods**: {len(METHODS)}, all from the package: the sets through `Reweighter` with its default memory, "
        f"their rivals from `robustgrad.baselines`, prompt groups ({GROUPS}) from `robustgrad.prompt_groups`. "
        "Known domains, group DRO and inverse frequency are told the domain of each training pair, the others are not.",
        "- **Measures**: accuracy; worst-case loss, the mean loss of the population if the worst 10% of its prompts' "
        "mass moves, exactly; ECE in ten bins; length-controlled accuracy, the mean of the accuracies where the longer "
        'response is right and where it is wrong ("longer wins" gets .5).',
        f"- **Machine**: {about['cpu']}, {about['cores']} cores, torch {about['torch']}; {results.seconds() / 60:.0f} "
        "minutes of run time in all on a machine with other work, embedding apart.",
    ]


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
            "**Tier C, a model that learns the human labels, was not run**: there was no time for it on two shared "
            "cores. `python benchmarks/ood_protocol_language.py --data FOLDER --tier human --model smollm2` runs it "
            "and goes on where it was interrupted.",
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
