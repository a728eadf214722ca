"""What two reward models make of the same evaluation pairs: tables, a plot, a page and a JSON file."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from preference_pairs import Pair
from rich.console import Console
from rich.table import Table
from torch import Tensor

from robustgrad.objectives import bradley_terry
from robustgrad.report import Evaluation, Report, save_page, shift_table
from robustgrad.report import report as robust_report


def make_console() -> Console:
    # Without markup: names of files and domains may hold brackets. A log file gets lines of a fixed width.
    width = None if sys.stdout.isatty() else 120
    return Console(width=width, markup=False, highlight=False)


@dataclass
class Run:
    """One trained model: its log of every step, and its lead chosen - rejected on every evaluation pair."""

    name: str
    seconds: float = 0.0
    history: dict[str, list[float]] = field(default_factory=dict)
    leads: dict[str, Tensor] = field(default_factory=dict)


def domain_rows(evals: dict[str, list[Pair]], shares: dict[str, float], runs: list[Run]) -> list[dict]:
    """One row for each domain of each evaluation set, and for a set as a whole where it has several."""
    rows = []
    for name, pairs in evals.items():
        domains = Counter(pair.domain for pair in pairs)
        parts = {d: torch.tensor([float(pair.domain == d) for pair in pairs]) for d in sorted(domains)}
        if len(parts) > 1:
            parts["all pairs"] = torch.ones(len(pairs))
        if len(parts) > 1 and set(shares) <= set(domains):
            parts["at training shares"] = torch.tensor([shares.get(p.domain, 0) / domains[p.domain] for p in pairs])
        rows += [_row(name, part, weight, pairs, runs) for part, weight in parts.items()]
    return rows


def _row(name: str, part: str, weight: Tensor, pairs: list[Pair], runs: list[Run]) -> dict:
    def mean(values: Tensor) -> float:
        return ((values * weight).sum() / weight.sum()).item()

    longer = torch.tensor([float(len(pair.chosen) > len(pair.rejected)) for pair in pairs])
    row = {"set": name, "domain": part, "pairs": int((weight > 0).sum()), "longer_wins": mean(longer)}
    for run in runs:
        lead = run.leads[name]
        losses = bradley_terry(lead, torch.zeros_like(lead))
        row[run.name] = {"accuracy": mean(_right(lead)), "margin": mean(lead), "loss": mean(losses)}
    if len(runs) == 2:
        gain = _right(runs[1].leads[name]) - _right(runs[0].leads[name])
        # Both judged the same pairs: the error of the mean difference, smaller than that of two samples.
        spread = ((gain - mean(gain)) * weight / weight.sum()).square().sum().sqrt().item()
        row["gain"] = {"accuracy": mean(gain), "standard_error": spread}
    return row


def _right(lead: Tensor) -> Tensor:
    """1 where the chosen response leads; a tie is worth as much as a guess."""
    return (lead > 0).float() + (lead == 0).float() / 2


def shift_report(evals: dict[str, list[Pair]], shares: dict[str, float], runs: list[Run]) -> Report:
    """What a shift of the prompts costs each run.

    The population are the evaluation pairs from domains seen in training, weighted to their training
    shares; if there are none, all evaluation pairs.
    """
    pairs = [pair for part in evals.values() for pair in part]
    counts = Counter(pair.domain for pair in pairs)
    base = torch.tensor([shares.get(pair.domain, 0.0) / counts[pair.domain] for pair in pairs])
    if not base.any():
        base = torch.ones_like(base)
    texts = [f"{pair.prompt}\n+ {pair.chosen}\n- {pair.rejected}" for pair in pairs]
    groups = [pair.domain for pair in pairs]

    def evaluation(run: Run) -> Evaluation:
        lead = torch.cat([run.leads[name] for name in evals])
        losses = bradley_terry(lead, torch.zeros_like(lead))
        return Evaluation(losses, run.name, groups=groups, texts=texts, base=base)

    return robust_report(*map(evaluation, runs))


def report(
    console: Console,
    out: Path,
    runs: list[Run],
    training: list[Pair],
    evals: dict[str, list[Pair]],
    settings: dict[str, object],
) -> None:
    """Print the tables; write results.json and, where matplotlib is installed, results.png and report.html."""
    shares = {domain: count / len(training) for domain, count in Counter(p.domain for p in training).most_common()}
    found = shift_report(evals, shares, runs)
    results = {
        "settings": settings,
        "training_shares": shares,
        "domains": domain_rows(evals, shares, runs),
        "shift_curve": {"rho": found.models[0].curve.shares, **{m.name: m.curve.values for m in found.models}},
        "runs": {run.name: {"seconds": run.seconds, "history": run.history} for run in runs},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_domains(console, results["domains"], runs)
    console.print(shift_table(found))
    for caution in found.cautions:
        console.print(caution)
    print_training(console, runs)
    saved = [*(f"{run.name}/" for run in runs), "results.json"]
    try:
        save_plot(out / "results.png", results["domains"], runs)
        save_page(found, out / "report.html")
        saved += ["results.png", "report.html"]
    except ImportError:
        console.print('No plot: matplotlib is missing. Install it: pip install "robustgrad[plot]"')
    console.print(f"Saved in {out}: {', '.join(saved)}", soft_wrap=True)


def print_domains(console: Console, rows: list[dict], runs: list[Run]) -> None:
    table = Table(title="Accuracy and mean margin (reward of chosen - reward of rejected)")
    table.add_column("evaluation set")
    table.add_column("domain")
    compared = len(runs) == 2
    measures = [f"{measure}\n{run.name}" for measure in ("accuracy", "margin") for run in runs]
    for header in ("pairs", "longer\nwins", *measures, *(["accuracy\ngained"] if compared else [])):
        table.add_column(header, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        new = i == 0 or rows[i - 1]["set"] != row["set"]
        if new:
            table.add_section()
        cells = [f"{row[run.name]['accuracy']:.3f}" for run in runs] + [
            f"{row[run.name]['margin']:.2f}" for run in runs
        ]
        if compared:
            cells.append(f"{row['gain']['accuracy']:+.3f} ± {row['gain']['standard_error']:.3f}")
        table.add_row(row["set"] if new else "", row["domain"], str(row["pairs"]), f"{row['longer_wins']:.3f}", *cells)
    console.print(table)


def print_training(console: Console, runs: list[Run], rows: int = 8) -> None:
    table = Table("steps", title="During training, mean over the steps")
    columns = [(run, key) for run in runs for key in run.history]
    for run, key in columns:
        table.add_column(f"{key}\n{run.name}", justify="right")
    steps = max(len(run.history["loss"]) for run in runs)
    ends = sorted({round(steps * (i + 1) / rows) for i in range(rows)} - {0})
    for start, end in zip([0, *ends], ends, strict=False):
        logs = [run.history[key][start:end] for run, key in columns]
        table.add_row(f"{start + 1}-{end}", *(f"{fmean(log):.3f}" if log else "" for log in logs))
    console.print(table)


def save_plot(path: Path, rows: list[dict], runs: list[Run]) -> None:
    """Accuracy by domain, and ess and max ratio over training, in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (accuracy, weights) = plt.subplots(1, 2, figsize=(11, 2.4 + 0.25 * max(len(rows), 8)))
    for i, run in enumerate(runs):
        height = 0.8 / len(runs)
        places = [row + i * height for row in range(len(rows))]
        accuracy.barh(places, [row[run.name]["accuracy"] for row in rows], height, label=run.name)
    accuracy.set_yticks(range(len(rows)), [f"{row['set']}: {row['domain']}" for row in rows])
    accuracy.invert_yaxis()
    accuracy.axvline(0.5, color="grey", linewidth=0.8)
    accuracy.set(xlim=(0, 1), xlabel="accuracy")
    for key in ("ess", "max ratio"):
        if key in runs[-1].history:
            weights.plot(runs[-1].history[key], label=key)
    weights.set(xlabel="optimizer step", yscale="log", title=f"weights of the {runs[-1].name} run")
    for axes in (accuracy, weights):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
