"""A folder of preference pairs: what is trained on, what chooses, and every other file to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pair_files import DataError, hold_out, read_pairs, set_name
from preference_pairs import Pair


@dataclass(frozen=True)
class Sets:
    """`evals` by name: no choice is ever made on them."""

    train: list[Pair]
    validation: list[Pair]
    evals: dict[str, list[Pair]]

    def all(self) -> dict[str, list[Pair]]:
        return {"train": self.train, "validation": self.validation, **self.evals}


def read_folder(folder: Path) -> Sets:
    """`train` is needed; without `validation` a tenth of its prompts is held out. Any other file of pairs,
    .jsonl or .jsonl.gz with prompt, chosen, rejected and perhaps domain, is an evaluation set."""
    paths = {set_name(path): path for path in sorted(folder.glob("*.jsonl*"))}
    if "train" not in paths:
        raise DataError(folder, None, "no train.jsonl or train.jsonl.gz.", "Put the training pairs there.")
    sets = {name: read_pairs(path) for name, path in paths.items()}
    train = sets.pop("train")
    validation = sets.pop("validation", None)
    if validation is None:
        train, validation = hold_out(train, paths["train"], seed=0)
    if not sets:
        raise DataError(folder, None, "no evaluation set.", "Add eval_NAME.jsonl with prompt, chosen, rejected.")
    return Sets(train, validation, sets)
