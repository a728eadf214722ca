"""What two reward models make of the same evaluation pairs: tables, a plot and a JSON file."""

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

from robustgrad import TotalVariation
from robustgrad.objectives import bradley_terry

SHIFTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


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


def shift_curve(evals: dict[str, list[Pair]], shares: dict[str, float], run: Run) -> list[float]:
    """Expected loss if the worst possible share rho of the prompts changes, for each rho in SHIFTS.

    The population are the evaluation pairs from domains seen in training, weighted to their training
    shares; if there are none, all evaluation pairs.
    """
    domains = [pair.domain for pairs in evals.values() for pair in pairs]
    lead = torch.cat([run.leads[name] for name in evals])
    counts = Counter(domains)
    base = torch.tensor([shares.get(domain, 0.0) / counts[domain] for domain in domains])
    if not base.any():
        base = torch.ones_like(base)
    losses = bradley_terry(lead, torch.zeros_like(lead))
    return [TotalVariation(rho).solve(losses, base=base).value.item() for rho in SHIFTS]


def report(
    console: Console,
    out: Path,
    runs: list[Run],
    training: list[Pair],
    evals: dict[str, list[Pair]],
    settings: dict[str, object],
) -> None:
    """Print the tables; write results.json and, where matplotlib is installed, results.png into `out`."""
    shares = {domain: count / len(training) for domain, count in Counter(p.domain for p in training).most_common()}
    results = {
        "settings": settings,
        "training_shares": shares,
        "domains": domain_rows(evals, shares, runs),
        "shift_curve": {"rho": SHIFTS, **{run.name: shift_curve(evals, shares, run) for run in runs}},
        "runs": {run.name: {"seconds": run.seconds, "history": run.history} for run in runs},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_domains(console, results["domains"], runs)
    print_shift(console, results["shift_curve"], runs)
    print_training(console, runs)
    saved = [*(f"{run.name}/" for run in runs), "results.json"]
    try:
        save_plot(out / "results.png", results, runs)
        saved.append("results.png")
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


def print_shift(console: Console, curve: dict[str, list[float]], runs: list[Run]) -> None:
    table = Table("if this share of the prompts changes", title="Expected loss, worst case")
    for rho in curve["rho"]:
        table.add_column(f"{rho:.0%}", justify="right")
    for run in runs:
        table.add_row(run.name, *(f"{value:.3f}" for value in curve[run.name]))
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


def save_plot(path: Path, results: dict, runs: list[Run]) -> None:
    """Accuracy by domain, the shift curve, and ess and max ratio over training, in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["domains"]
    figure, (accuracy, shift, weights) = plt.subplots(1, 3, figsize=(16, 2.4 + 0.25 * max(len(rows), 8)))
    for i, run in enumerate(runs):
        height = 0.8 / len(runs)
        places = [row + i * height for row in range(len(rows))]
        accuracy.barh(places, [row[run.name]["accuracy"] for row in rows], height, label=run.name)
        shift.plot(SHIFTS, results["shift_curve"][run.name], marker="o", label=run.name)
    accuracy.set_yticks(range(len(rows)), [f"{row['set']}: {row['domain']}" for row in rows])
    accuracy.invert_yaxis()
    accuracy.axvline(0.5, color="grey", linewidth=0.8)
    accuracy.set(xlim=(0, 1), xlabel="accuracy")
    shift.set(xlabel="share of the prompts that changes", ylabel="expected loss, worst case")
    for key in ("ess", "max ratio"):
        if key in runs[-1].history:
            weights.plot(runs[-1].history[key], label=key)
    weights.set(xlabel="optimizer step", yscale="log", title=f"weights of the {runs[-1].name} run")
    for axes in (accuracy, shift, weights):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
