"""The robust state in a trainer's checkpoint folder."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from ..reweighter import Reweighter

NAME = "robustgrad.pt"


def save(reweighter: Reweighter, folder: str | os.PathLike[str]) -> None:
    """Written aside, then renamed: a run that dies while saving, or a full disk, leaves no half a file."""
    path = Path(folder) / NAME
    aside = path.with_suffix(".part")
    try:
        torch.save(reweighter.state_dict(), aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load(reweighter: Reweighter, folder: str | os.PathLike[str]) -> None:
    path = Path(folder) / NAME
    if not path.exists():
        warnings.warn(
            f"{path} does not exist: the checkpoint stems from a run without robustgrad, and the memory of recent "
            "losses starts empty.",
            stacklevel=2,
        )
        return
    reweighter.load_state_dict(_read(path))


def _read(path: Path) -> dict[str, Any]:
    """Tensors and plain values alone: nothing in the file is run."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} must hold what robustgrad saved there, got a file that cannot be read as such "
            f"({type(error).__name__}). Resume from an earlier checkpoint, or remove the file to start the memory "
            "of recent losses afresh."
        ) from error
    return state
