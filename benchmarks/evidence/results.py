"""The committed rows, by cell of the experiment and method."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from .measures import unpacked
from .runs import Row, read_rows
from .studies import Study
from .tasks import first_of_each
from .truth import Truth

Cell = tuple[Truth | None, str]  # the task, None for the human labels, and the capacity


class Results:
    def __init__(self, folder: Path) -> None:
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self._rows: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in read_rows(folder / "runs.jsonl") + read_rows(folder / "language.jsonl"):
            self._rows[json.dumps(row["task"]), row["capacity"]][row["method"]].append(row)

    def methods(self, cell: Cell) -> list[str]:
        return list(self._of(cell))

    def rows(self, cell: Cell, method: str) -> list[Row]:
        rows = self._of(cell).get(method, [])
        if not rows:
            raise ValueError(f"no runs of {method!r} in {cell}. Let benchmarks/ood_protocol.py finish first.")
        return sorted(rows, key=lambda row: row["seed"])

    def _of(self, cell: Cell) -> dict[str, list[Row]]:
        truth, capacity = cell
        return self._rows[json.dumps(Study(truth, capacity, {}).about), capacity]

    def values(self, cell: Cell, method: str, name: str, of_set: str, iterate: str = "last") -> list[float]:
        """One number for each seed."""
        return [row["measures"][iterate][of_set][name] for row in self.rows(cell, method)]

    def value(self, cell: Cell, method: str, name: str, of_set: str, iterate: str = "last") -> float:
        return fmean(self.values(cell, method, name, of_set, iterate))

    def right(self, cell: Cell, method: str, of_set: str, domain: str | None = None) -> Tensor:
        """(seeds, pairs) float64, 1 where the pair of the set (of the domain) was right, 1/2 for a tie."""
        rows = self.rows(cell, method)
        domains = self.domains(cell, of_set)
        if "most" in rows[0]:
            domains = [domains[i] for i in first_of_each(domains, rows[0]["most"]).tolist()]
        right = torch.stack([unpacked(row["outcomes"][of_set], len(domains)) for row in rows])
        return right if domain is None else right[:, [d == domain for d in domains]]

    def domains(self, cell: Cell, of_set: str) -> list[str]:
        coded = self.about["evals" if cell[0] is None else "known"][of_set]
        return [coded["names"][int(number)] for number in coded["of"].split()]

    @cached_property
    def known_set(self) -> str | None:
        """The evaluation set of the known tier, which is of the training mixture."""
        return next(iter(self.about["known"]), None)

    @cached_property
    def two(self) -> list[str]:
        """The majority and the minority of the known tier."""
        return list(self.about["train"])[:2]

    def seconds(self) -> float:
        """Of all runs on features."""
        return sum(
            row.get("seconds", 0.0)
            for (_, capacity), by_method in self._rows.items()
            if not capacity.endswith(("LoRA", "full"))
            for rows in by_method.values()
            for row in rows
        )
