"""Options that several commands share, and what they have in common."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console

from .._balls import BALLS
from ..ambiguity import AmbiguitySet
from .records import FileError, Records, read


class Kind(str, Enum):
    tv = "tv"
    chi2 = "chi2"
    kl = "kl"
    cvar = "cvar"


_DEFAULT = {"tv": 0.1, "chi2": 0.1, "kl": 0.1, "cvar": 0.2}

File = Annotated[str, typer.Argument(help='Losses: numbers, CSV or JSON lines, .gz too; "-" reads a pipe.')]
Set = Annotated[Kind, typer.Option("--set", help="The ambiguity set.")]
Radius = Annotated[float | None, typer.Option(help="Its radius, alpha for cvar. [default: 0.1; cvar 0.2]")]
Cap = Annotated[float | None, typer.Option(help="Largest factor by which a prompt's frequency may grow (tv).")]
Column = Annotated[str, typer.Option(help="CSV column or JSON field of the losses.")]
Skip = Annotated[bool, typer.Option("--skip-nonfinite", help="Leave out losses that are NaN or infinite, and say so.")]


def make_set(kind: Kind, radius: float | None, cap: float | None) -> AmbiguitySet:
    name = kind.value
    if cap is not None and name != "tv":
        raise ValueError(f"--cap must come with --set tv, got --set {name}. Leave it out.")
    size = _DEFAULT[name] if radius is None else radius
    return BALLS[name](size, cap=cap) if cap is not None else BALLS[name](size)  # type: ignore[call-arg]


def read_finite(paths: list[str], column: str, skip: bool) -> list[Records]:
    """Records of files that hold the same samples; a loss that is not finite is an error, or left out of all."""
    files = [read(path, column) for path in paths]
    bad = {i for records in files for i in records.nonfinite}
    for records in files:
        report_nonfinite(records, skip)
    if any(len(records.losses) <= len(bad) for records in files):
        raise FileError(files[0].source, None, "no loss is finite.", "Find the cause of the NaN losses.")
    return [records.without(bad) if bad else records for records in files]


def report_nonfinite(records: Records, skip: bool) -> None:
    """Say which losses are NaN or infinite: as an error, unless they may be left out."""
    bad = records.nonfinite
    if not bad:
        return
    if not skip:
        i, more = bad[0], f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        problem = f"the loss must be finite, got {records.losses[i]}{more}."
        remedy = "Find its cause, or pass --skip-nonfinite to leave such lines out knowingly."
        raise FileError(records.source, records.lines[i], problem, remedy)
    lines = ", ".join(str(records.lines[i]) for i in bad[:10]) + (", ..." if len(bad) > 10 else "")
    left_out = f"left out {len(bad)} of {len(records.losses)} losses that are not finite (lines {lines})"
    print(f"{records.source}: {left_out}", file=sys.stderr)


def make_console() -> Console:
    # Without markup: groups and names of files may hold brackets. A log file gets lines of a fixed width.
    return Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)
