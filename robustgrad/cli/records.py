"""Per-sample losses from a file or a pipe: plain numbers, CSV with a header, or JSON lines; .gz too.

What cannot be used is an error with its file, its line, the rule and a remedy. Nothing is dropped silently.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PIPE = "-"
_LARGEST, _ENDLESS = sys.float_info.max, (math.inf, -math.inf)
GROUPS, TEXTS, EMBEDDING = ("group", "domain"), ("prompt", "text"), "embedding"


class FileError(ValueError):
    """A file that cannot be used."""

    def __init__(self, source: str, line: int | None, problem: str, remedy: str) -> None:
        place = source if line is None else f"{source}, line {line}"
        super().__init__(f"{place}: {problem} {remedy}")


@dataclass
class Records:
    """The lines of one file; a list that is empty was not given. Losses may be NaN or infinite here."""

    source: str
    lines: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    embeddings: list[list[float]] = field(default_factory=list)

    @property
    def nonfinite(self) -> list[int]:
        """Where a loss is NaN or infinite."""
        return [i for i, loss in enumerate(self.losses) if not math.isfinite(loss)]

    def without(self, left_out: set[int]) -> Records:
        kept = [i for i in range(len(self.losses)) if i not in left_out]
        parts = (self.lines, self.losses, self.groups, self.texts, self.embeddings)
        return Records(self.source, *([part[i] for i in kept] if part else [] for part in parts))  # type: ignore[arg-type]


def read(path: str, column: str = "loss") -> Records:
    """All records of a file, or of the standard input for "-".

    Args:
        column: the CSV column or JSON field of the losses. Groups are taken from "group" or "domain", texts from
            "prompt" or "text", embeddings from "embedding" (JSON), where the first record has them.
    """
    source = "standard input" if path == PIPE else path
    # Not splitlines: a JSON text may hold other line separators as they are.
    lines = [line.removesuffix("\r") for line in _text(path, source).split("\n")]
    records = Records(source)
    for number, row in _rows(source, lines, column):
        _append(records, number, row, column)
    if not records.losses:
        raise FileError(source, None, "it holds no losses.", "Give one loss a line, a CSV file or JSON lines.")
    return records


def _text(path: str, source: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == PIPE else Path(path).read_bytes()
        return (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 ({error.reason} at byte {error.start})."
        raise FileError(source, None, problem, "Save it as UTF-8; give a compressed file a name in .gz.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FileError(source, None, f"not readable as gzip ({error}).", "Compress it again.") from error
    except OSError as error:
        raise FileError(source, None, f"{error.strerror}.", 'Give a file, or "-" for the standard input.') from error


def _rows(source: str, lines: list[str], column: str) -> Iterator[tuple[int, dict[str, object]]]:
    filled = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        return iter(())
    start, first = filled[0]
    if first.startswith(("{", "[")):
        return ((number, _json(source, number, line)) for number, line in filled)
    if _number(first) is not None:
        return ((number, {column: _loss(source, number, line)}) for number, line in filled)
    return _csv(source, lines[start - 1 :], start, column)


def _json(source: str, number: int, line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg}, column {error.colno})."
        raise FileError(source, number, problem, "Write one complete JSON object on each line.") from error
    if not isinstance(row, dict):
        problem = f"must be a JSON object, got {type(row).__name__}."
        raise FileError(source, number, problem, 'Write {"loss": 0.7, "group": ..., "prompt": ...}.')
    return row


def _csv(source: str, lines: list[str], start: int, column: str) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.reader([line + "\n" for line in lines])
    header = next(reader)
    if column not in header:
        found = ", ".join(map(repr, header))
        raise FileError(source, start, f"column {column!r} is missing.", f"Name one with --column; found: {found}.")
    try:
        for cells in filter(None, reader):
            number = start - 1 + reader.line_num
            if len(cells) != len(header):
                problem = f"must have {len(header)} cells, as the header, got {len(cells)}."
                raise FileError(source, number, problem, "Quote cells that hold commas.")
            row: dict[str, object] = dict(zip(header, cells, strict=True))
            row[column] = _loss(source, number, str(row[column]))
            yield number, row
    except csv.Error as error:
        number = start - 1 + reader.line_num
        raise FileError(source, number, f"not CSV ({error}).", "Use JSON lines for long texts.") from error


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _loss(source: str, number: int, text: str) -> float:
    if (value := _number(text)) is None:
        raise FileError(source, number, f"the loss must be a number, got {text!r}.", "Correct the line.")
    return value


def _append(records: Records, number: int, row: dict[str, object], column: str) -> None:
    records.lines.append(number)
    records.losses.append(_field_loss(records.source, number, row, column))
    for names, kept in ((GROUPS, records.groups), (TEXTS, records.texts)):
        name = next((name for name in names if name in row), None)
        if name is not None:
            kept.append(_label(records.source, number, name, row[name]))
        _check_throughout(records, number, name or " or ".join(names), name is not None, len(kept))
    if EMBEDDING in row:
        records.embeddings.append(_vector(records, number, row[EMBEDDING]))
    _check_throughout(records, number, EMBEDDING, EMBEDDING in row, len(records.embeddings))


def _field_loss(source: str, number: int, row: dict[str, object], column: str) -> float:
    if column not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise FileError(source, number, f"field {column!r} is missing.", f"Name one with --column; found: {found}.")
    loss = row[column]
    if isinstance(loss, bool) or not isinstance(loss, (int, float)) or (abs(loss) > _LARGEST and loss not in _ENDLESS):
        problem = f"field {column!r} must be a number, got {str(loss)[:40]!r}."
        raise FileError(source, number, problem, "Write one loss per sample.")
    return float(loss)


def _label(source: str, number: int, name: str, value: object) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    problem = f"field {name!r} must be text, got {type(value).__name__}."
    raise FileError(source, number, problem, "Write a text, or leave the field out everywhere.")


def _check_throughout(records: Records, number: int, name: str, here: bool, given: int) -> None:
    if given not in (0, len(records.losses)):
        state = "is given here and not before." if here else "is missing here and given before."
        raise FileError(records.source, number, f"field {name!r} {state}", "Give it on every line or on none.")


def _vector(records: Records, number: int, value: object) -> list[float]:
    sound = isinstance(value, list) and value and all(type(x) in (int, float) and math.isfinite(x) for x in value)
    if not sound or (records.embeddings and len(value) != len(records.embeddings[0])):  # type: ignore[arg-type]
        problem = f"field {EMBEDDING!r} must be a list of finite numbers, as long as the first one."
        raise FileError(records.source, number, problem, "Correct the line, or leave the field out everywhere.")
    return value  # type: ignore[return-value]
