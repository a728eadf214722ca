"""What the responses of several policies are worth, by domain: a table, a plot and a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

from reward_report import Run
from rich.console import Console
from rich.table import Table


def report_rewards(
    console: Console,
    out: Path,
    runs: list[Run],
    results: dict[str, dict[str, float]],
    shares: dict[str, float],
    settings: dict[str, object],
) -> None:
    """Print mean rewards by domain; write results.json and, where matplotlib is installed, results.png."""
    table = Table("domain", "share of training", *results, title="Mean reward on evaluation prompts")
    domains = sorted(next(iter(results.values())), key=lambda name: -shares.get(name, 0))
    for domain in domains:
        cells = (f"{values[domain]:.3f}" for values in results.values())
        table.add_row(domain, f"{shares.get(domain, 0):.0%}", *cells)
    worst = (f"{min(values.values()):.3f}" for values in results.values())
    table.add_section()
    seen = sum(shares.get(domain, 0) for domain in domains)
    if seen > 0:
        mixture = (sum(shares.get(d, 0) * values[d] for d in domains) / seen for values in results.values())
        table.add_row("at training shares", "", *(f"{value:.3f}" for value in mixture))
    table.add_row("worst domain", "", *worst)
    console.print(table)
    history = {run.name: {"seconds": run.seconds, "history": run.history} for run in runs}
    content = {"rewards": results, "training_shares": shares, "runs": history, "settings": settings}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    try:
        _save_plot(out / "results.png", runs)
    except ImportError:
        console.print('No plot: matplotlib is missing. Install it: pip install "robustgrad[plot]"')
    console.print(f"Saved in {out}: results.json, and in each run's folder its adapter, log.jsonl and checkpoint.pt")


def _save_plot(path: Path, runs: list[Run]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = list(dict.fromkeys(key for run in runs for key in run.history))
    figure, axes = plt.subplots(1, len(keys), figsize=(4 * len(keys), 3.5), squeeze=False)
    for key, axis in zip(keys, axes[0], strict=True):
        for run in runs:
            axis.plot(run.history.get(key, []), label=run.name)
        axis.set(title=key, xlabel="step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
