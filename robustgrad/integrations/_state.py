"""The robust state in a trainer's checkpoint folder."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from ..reweighter import Reweighter

NAME = "robustgrad.pt"


def save(reweighter: Reweighter, folder: str | os.PathLike[str]) -> None:
    """Written aside, then renamed: a run that dies while saving leaves no half a file."""
    path = Path(folder) / NAME
    aside = path.with_suffix(".part")
    torch.save(reweighter.state_dict(), aside)
    os.replace(aside, path)


def load(reweighter: Reweighter, folder: str | os.PathLike[str]) -> None:
    path = Path(folder) / NAME
    if not path.exists():
        warnings.warn(
            f"{path} does not exist: the checkpoint stems from a run without robustgrad, and the memory of recent "
            "losses starts empty.",
            stacklevel=2,
        )
        return
    reweighter.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
