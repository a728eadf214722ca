"""`robustgrad check`: what each set and radius would make of these losses, or what a trainer logged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor

from ..ambiguity import KL, AmbiguitySet, ChiSquare, CVaR, TotalVariation
from ..report import Evaluation, report, shift_picture, shift_table
from .options import Cap, Column, Skip, make_console, read_finite
from .records import PIPE, Records
from .trainer_log import find_log, print_log

SETS: list[AmbiguitySet] = [
    *(TotalVariation(radius) for radius in (0.05, 0.1, 0.2, 0.4)),
    *(TotalVariation(radius, cap=5.0) for radius in (0.1, 0.2)),
    *(ChiSquare(radius) for radius in (0.05, 0.1, 0.5, 1.0)),
    *(KL(radius) for radius in (0.05, 0.1, 0.5, 1.0)),
    *(CVaR(alpha) for alpha in (0.5, 0.2, 0.1, 0.05)),
]
Output = Annotated[
    str,
    typer.Argument(help='Per-sample losses, "-" for a pipe; or trainer_state.json, or the folder it is in.'),
]


def check(
    output: Output = PIPE,
    cap: Cap = None,
    column: Column = "loss",
    plot: Annotated[Path | None, typer.Option(help="Save the shift curve here (.png, .svg, .pdf).")] = None,
    skip_nonfinite: Skip = False,
) -> None:
    """What would each set and radius do to these losses?

    Of a trainer's output its log is shown: it holds averages, and those cannot tell what a set would do. For
    that write one loss per sample. --cap bounds the shift curve.
    """
    console = make_console()
    if (log := find_log(output)) is not None:
        print_log(console, log)
        return
    records = read_finite([output], column, skip_nonfinite)[0]
    losses = torch.tensor(records.losses, dtype=torch.float64)
    console.print(_sets(losses))
    found = report(evaluation(records), cap=cap)
    console.print(shift_table(found))
    for text in found.cautions:
        console.print(text)
    if plot is not None:
        shift_picture(found).savefig(plot)
        console.print(f"Saved {plot}", soft_wrap=True)


def evaluation(records: Records) -> Evaluation:
    return Evaluation(
        torch.tensor(records.losses, dtype=torch.float64),
        name=Path(records.source).name.removesuffix(".gz").removesuffix(".jsonl"),
        groups=records.groups or None,
        texts=records.texts or None,
        embeddings=torch.tensor(records.embeddings) if records.embeddings else None,
    )


def _sets(losses: Tensor) -> Table:
    mean = losses.mean().item()
    table = Table("set", title=f"{len(losses)} losses, mean {mean:.4g}, largest {losses.max().item():.4g}")
    for name in ("worst case", "above mean", "effective samples", "largest ratio", "largest weight"):
        table.add_column(name, justify="right")
    for ambiguity in SETS:
        worst = ambiguity.solve(losses)
        value = worst.value.item()
        ess = f"{worst.ess.item():.0f} ({worst.ess.item() / len(losses):.0%})"
        cells = (f"{value:.4g}", f"{value - mean:+.3g}", ess, f"{worst.max_ratio.item():.3g}")
        table.add_row(repr(ambiguity), *cells, f"{worst.weights.max().item():.2%}")
    return table
