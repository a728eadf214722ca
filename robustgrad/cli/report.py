"""`robustgrad report`: one model, or two compared, as an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report import report as make_report
from ..report import save_page, shift_table
from .check import evaluation
from .options import Cap, Column, File, Kind, Radius, Skip, make_console, make_set, read_finite


def report(
    before: File,
    after: Annotated[str | None, typer.Argument(help="A second model on the same samples, to compare.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    kind: Annotated[Kind | None, typer.Option("--set", help="The set to take apart. [default: tv, cap 5]")] = None,
    radius: Radius = None,
    cap: Cap = None,
    by_group: Annotated[bool, typer.Option("--by-group", help="Let the confidence band resample groups.")] = False,
    column: Column = "loss",
    skip_nonfinite: Skip = False,
) -> None:
    """What a shift of prompts costs this model, and who pays; with a second file, what that model gains.

    The page needs no network. --cap bounds the set (tv) and the shift curve.
    """
    paths = [before] if after is None else [before, after]
    tailored = kind is not None or radius is not None or cap is not None
    bounded = cap if kind in (None, Kind.tv) else None
    ambiguity = make_set(kind or Kind.tv, radius, bounded) if tailored else None
    models = [evaluation(records) for records in read_finite(paths, column, skip_nonfinite)]
    found = make_report(*models, ambiguity=ambiguity, cap=cap, unit="groups" if by_group else "samples")
    console = make_console()
    console.print(shift_table(found))
    for text in found.cautions:
        console.print(text)
    save_page(found, out)
    console.print(f"Saved {out}", soft_wrap=True)
