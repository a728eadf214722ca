"""The report as a table on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .summary import Report

if TYPE_CHECKING:
    from rich.table import Table


def shift_table(report: Report) -> Table:
    """The shift curves with their intervals, every other share across, and of two models what the second saves.

    Raises: ImportError: rich is missing: pip install "robustgrad[cli]".
    """
    try:
        from rich.table import Table
    except ImportError as error:
        raise ImportError('rich is missing. Install it with pip install "robustgrad[cli]".') from error
    curve = report.models[0].curve
    limit = "" if curve.cap is None else f", none becoming more than {curve.cap:g} times as frequent"
    table = Table("if this share of the prompts changes", title=f"Expected loss, worst case{limit}")
    for share in curve.shares[::2]:
        table.add_column(f"{share:.0%}", justify="right")
    curves = [(model.name, model.curve) for model in report.models]
    if report.gain is not None:
        curves.append(("saved", report.gain))
    for name, one in curves:
        table.add_row(name, *(f"{value:.4g}" for value in one.values[::2]))
        intervals = [f"{low:.3g} … {high:.3g}" for _, _, low, high in one.rows]
        table.add_row(f"{one.level:.0%} interval", *intervals[::2])
    return table
