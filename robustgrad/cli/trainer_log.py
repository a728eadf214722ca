"""What a Hugging Face trainer wrote while it trained: the log in trainer_state.json."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .records import FileError

NAME = "trainer_state.json"
_COLUMNS = ("loss", "robust/value", "robust/gap", "robust/ess", "robust/max_ratio", "robust/plain")
_ROWS = 10


def find_log(output: str) -> Path | None:
    """The trainer's state file, given itself, or the folder of a run or of one checkpoint; None for anything else.

    Raises: FileError: a folder without one.
    """
    path = Path(output)
    if not path.is_dir():
        return path if path.name == NAME else None
    states = [path / NAME, *path.glob(f"checkpoint-*/{NAME}")]
    found = [state for state in states if state.exists()]
    if not found:
        raise FileError(output, None, f"the folder holds no {NAME}.", "Give a checkpoint folder, or a file of losses.")
    return max(found, key=lambda state: (state.parent == path, _step(state)))


def _step(state: Path) -> int:
    number = state.parent.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def print_log(console: Console, path: Path) -> None:
    """Loss and robust metrics over the steps.

    Raises: FileError: not a trainer's state, or one of a run that was not made robust.
    """
    rows = _robust_rows(path)
    last, first = len(rows) - 1, min(_ROWS, len(rows))
    shown = [rows[round(i * last / max(first - 1, 1))] for i in range(first)]
    console.print(f"Log of {path}", soft_wrap=True)
    table = Table("step", title="What robustness did to the steps")
    for name in _COLUMNS:
        table.add_column(name.removeprefix("robust/").replace("_", " "), justify="right")
    for row in shown:
        table.add_row(str(row.get("step", "")), *(f"{row[name]:.4g}" if name in row else "" for name in _COLUMNS))
    console.print(table)
    plain = sum(bool(row.get("robust/plain")) for row in rows)
    if plain:
        console.print(f"{plain} of {len(rows)} logged steps were plain averaging: fewer than 64 losses remembered.")
    if all(row.get("robust/gap") == 0 for row in rows):
        console.print("The worst case never differed from the mean: the radius is 0, or all losses are equal.")


def _robust_rows(path: Path) -> list[dict[str, float]]:
    try:
        history = json.loads(path.read_bytes())["log_history"]
        rows = [row for row in history if "robust/value" in row]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise FileError(
            str(path), None, "not the state of a trainer.", "Give the file as the trainer wrote it."
        ) from error
    if not rows:
        problem = (
            "its log holds the mean loss of each step and nothing robust: what a set would do needs single losses."
        )
        remedy = "Train with robustify, or write one loss per evaluation sample to a file and check that."
        raise FileError(str(path), None, problem, remedy)
    return rows
