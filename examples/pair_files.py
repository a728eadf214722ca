"""Preference pairs from files: .jsonl or .jsonl.gz, one object a line with fields prompt, chosen, rejected
and, optionally, domain. A file that cannot be used is an error with its line, its field and a remedy.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from preference_pairs import Pair


class DataError(ValueError):
    """A file that cannot be used: where, what is wrong, and what to do about it."""

    def __init__(self, path: Path, line: int | None, problem: str, remedy: str) -> None:
        place = f"{path}" if line is None else f"{path}, line {line}"
        super().__init__(f"{place}: {problem} {remedy}")


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a file. Other fields are ignored; where no domain is given it is the file's name."""
    pairs = [_pair(path, number, line) for number, line in _lines(path) if line.strip()]
    if not pairs:
        raise DataError(path, None, "the file holds no pairs.", "Write one JSON object on each line.")
    return pairs


def set_name(path: Path) -> str:
    """The name of a file without .jsonl and .gz."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def hold_out(pairs: list[Pair], path: Path, seed: int, share: float = 0.1) -> tuple[list[Pair], list[Pair]]:
    """Split off the pairs of a share of the prompts: no prompt is on both sides."""
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < 2:
        remedy = "Give more prompts, or a separate file with --eval."
        raise DataError(path, None, "one prompt only: nothing can be held out for evaluation.", remedy)
    held = set(random.Random(seed).sample(prompts, max(1, round(share * len(prompts)))))
    return [p for p in pairs if p.prompt not in held], [p for p in pairs if p.prompt in held]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        remedy = "Compress it again with gzip, or drop .gz from its name if it is plain text."
        raise DataError(path, number + 1, f"not readable as gzip ({error}).", remedy) from error
    except OSError as error:
        remedy = "Give the path of a .jsonl or .jsonl.gz file."
        raise DataError(path, None, f"{error.strerror}.", remedy) from error


def _pair(path: Path, number: int, line: bytes) -> Pair:
    row = _parsed(path, number, line)
    row.setdefault("domain", set_name(path))
    for field in ("prompt", "chosen", "rejected", "domain"):
        if field not in row:
            found = ", ".join(repr(name) for name in row if name != "domain") or "none"
            raise DataError(path, number, f"field {field!r} is missing.", f"Add it; fields found: {found}.")
        if problem := _problem(row[field], may_be_empty=field == "prompt"):
            raise DataError(path, number, f"field {field!r} {problem}", "Correct the line, or drop it.")
    if row["chosen"] == row["rejected"]:
        remedy = "Drop the line: it states no preference."
        raise DataError(path, number, "field 'rejected' equals field 'chosen'.", remedy)
    return Pair(row["prompt"], row["chosen"], row["rejected"], row["domain"])


def _parsed(path: Path, number: int, line: bytes) -> dict[str, object]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        remedy = "Save it as UTF-8; give a compressed file a name that ends in .gz."
        raise DataError(path, number, f"not UTF-8 ({error.reason} at byte {error.start}).", remedy) from error
    except json.JSONDecodeError as error:
        remedy = "Write one complete JSON object on each line."
        raise DataError(path, number, f"not JSON ({error.msg}, column {error.colno}).", remedy) from error
    if not isinstance(row, dict):
        remedy = 'Write {"prompt": ..., "chosen": ..., "rejected": ...}.'
        raise DataError(path, number, f"must be a JSON object, got {type(row).__name__}.", remedy)
    return row


def _problem(text: object, may_be_empty: bool) -> str | None:
    if not isinstance(text, str):
        return f"must be text, got {type(text).__name__}."
    if not may_be_empty and not text.strip():
        return "is empty."
    # Half of a surrogate pair, as a cut through an emoji leaves it: no tokenizer takes it.
    if re.search("[\ud800-\udfff]", text):
        return "is not valid Unicode."
    return None
