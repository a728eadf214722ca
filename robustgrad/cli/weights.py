"""`robustgrad weights`: worst-case weights of the losses of a file or a pipe."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from enum import Enum
from typing import Annotated

import torch
import typer

from ..ambiguity import AmbiguitySet
from .options import Cap, Column, File, Kind, Radius, Set, Skip, make_set, report_nonfinite
from .records import PIPE, FileError, Records, read


class Format(str, Enum):
    csv = "csv"
    jsonl = "jsonl"


def weights(
    file: File = PIPE,
    kind: Set = Kind.tv,
    radius: Radius = None,
    cap: Cap = None,
    column: Column = "loss",
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.csv,
    skip_nonfinite: Skip = False,
) -> None:
    """Worst-case weight and ratio of each loss, in the order of the input.

    The weights sum to 1; the ratio is what a sample's gradient is multiplied by. A loss left out by
    --skip-nonfinite has weight and ratio 0.
    """
    ambiguity = make_set(kind, radius, cap)
    records = read(file, column)
    report_nonfinite(records, skip_nonfinite)
    rows = _rows(records, ambiguity)
    if format is Format.jsonl:
        for row in rows:
            print(json.dumps(row))
        return
    names = ["index", "loss", "weight", "ratio", *(["group"] if records.groups else [])]
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _rows(records: Records, ambiguity: AmbiguitySet) -> Iterator[dict[str, object]]:
    losses = torch.tensor(records.losses, dtype=torch.float64)
    if not losses.isfinite().any():
        raise FileError(records.source, None, "no loss is finite.", "Find the cause of the NaN losses.")
    worst = ambiguity.solve(losses, mask=losses.isfinite())
    columns = zip(records.losses, worst.weights.tolist(), worst.ratio.tolist(), strict=True)
    for i, (loss, weight, ratio) in enumerate(columns):
        # JSON has no NaN.
        shown = loss if math.isfinite(loss) else None
        row: dict[str, object] = {"index": i, "loss": shown, "weight": weight, "ratio": ratio}
        yield row | ({"group": records.groups[i]} if records.groups else {})
