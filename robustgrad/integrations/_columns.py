"""Dataset columns that a trainer drops, carried past its collator: group ids and scores of the samples."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Of = str | Callable[[dict[str, Any]], Tensor] | None  # a column's name, or a function of the batch
_KEY = "robustgrad_"


class Carrying:
    """A collator around the trainer's own: it sees the examples without the columns, the batch gets them."""

    def __init__(self, collator: Callable[[list[Any]], Any], names: list[str]) -> None:
        self.collator, self.names = collator, names

    def __call__(self, examples: list[Any]) -> Any:
        rest = [{name: value for name, value in example.items() if name not in self.names} for example in examples]
        batch = self.collator(rest)
        for name in self.names:
            batch[_KEY + name] = tensor(name, [example.get(name) for example in examples])
        return batch


def carry(trainer: Any, columns: list[Of]) -> None:
    """Make the named columns arrive in the batches of this trainer."""
    names = [column for column in columns if isinstance(column, str)]
    if not names:
        return
    trainer._set_signature_columns_if_needed()
    if trainer._signature_columns is not None:
        trainer._signature_columns = [*trainer._signature_columns, *names]
    trainer.data_collator = Carrying(trainer.data_collator, names)


def uncarry(trainer: Any) -> None:
    if isinstance(trainer.data_collator, Carrying):
        names, trainer.data_collator = trainer.data_collator.names, trainer.data_collator.collator
        trainer._signature_columns = [name for name in trainer._signature_columns if name not in names]


def take(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The carried columns, which leave the batch: the model knows nothing of them."""
    return {key.removeprefix(_KEY): batch.pop(key) for key in list(batch) if key.startswith(_KEY)}


def value(of: Of, batch: dict[str, Any], carried: dict[str, Tensor]) -> Tensor | None:
    if of is None:
        return None
    return carried[of] if isinstance(of, str) else of(batch)


def tensor(name: str, values: list[Any]) -> Tensor:
    if any(value is None for value in values):
        raise ValueError(
            f"the column {name!r} must be in every example of the dataset, got one without. Add it to the dataset "
            "(also to the evaluation data), or give a function of the batch."
        )
    # The same id in every process and run, as hash() is not.
    return torch.tensor([zlib.crc32(value.encode()) if isinstance(value, str) else value for value in values])
