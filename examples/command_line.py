"""Options that the larger examples share: ambiguity sets by name, numbers above 0, devices, files of options."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable

import torch

import robustgrad

# The ambiguity sets by their name on the command line, each with a default radius.
SETS = {
    "tv": (robustgrad.TotalVariation, 0.1),
    "chi2": (robustgrad.ChiSquare, 0.5),
    "kl": (robustgrad.KL, 0.5),
    "cvar": (robustgrad.CVaR, 0.3),
}


def settings(args: argparse.Namespace, ambiguity: object) -> dict[str, object]:
    """What was asked for, as it goes into the JSON file; `ambiguity` is the set or the adversary."""
    given = {key: value for key, value in vars(args).items() if key not in ("out", "smoke")}
    given |= {"data": args.data and str(args.data), "eval": [str(path) for path in args.eval]}
    return {**given, "device": str(args.device), "ambiguity": str(ambiguity)}


def read_settings(line: str) -> list[str]:
    """The options in a line of a settings file, without its comment."""
    return shlex.split(line, comments=True)


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
