"""What a saved state must be, before any of it is taken over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Kind = TypeVar("Kind")
_REMEDY = "Load an earlier checkpoint, or start the memory afresh by leaving out load_state_dict."


def same_configuration(state: dict[str, object], version: int, configuration: dict[str, object]) -> None:
    """A checkpoint of a Reweighter that was set up like this one."""
    if not isinstance(state, dict) or not {"version", "configuration", "pool"} <= state.keys():
        raise ValueError("state must come from Reweighter.state_dict(), got something else. Check what was loaded.")
    if state["version"] != version:
        raise ValueError(f"state must have version {version}, got {state['version']!r}. {_REMEDY}")
    saved = state["configuration"]
    for name, value in configuration.items():
        if saved.get(name) != value:  # type: ignore[attr-defined]
            raise ValueError(
                f"state must have {name}={value}, as this Reweighter, got {saved.get(name)}. "  # type: ignore[attr-defined]
                "Build the Reweighter as it was saved, or start its memory afresh."
            )


@contextmanager
def taken_as_a_whole() -> Iterator[None]:
    """A part that is missing or of another kind makes the whole state one that is refused."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"state must be what Reweighter.state_dict() returned, got one in which a part is missing or of another "
            f"kind ({type(error).__name__}: {error}). {_REMEDY}"
        ) from error


def part(state: dict[str, Any], name: str, kind: type[Kind]) -> Kind:
    value = state[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{name} must be {kind.__name__}, got {type(value).__name__}")
    return value


def rows(tensors: dict[str, Tensor]) -> None:
    """Tensors (n,) of one n; `groups` are ids, all else is floating."""
    for name, tensor in tensors.items():
        if tensor.dim() != 1 or len(tensor) != len(tensors["scores"]):
            raise TypeError(f"{name} must have one entry for each of the scores, got {tuple(tensor.shape)}")
        if tensor.is_floating_point() != (name != "groups"):
            raise TypeError(f"{name} is of type {tensor.dtype}")


def finite(tensors: dict[str, Tensor]) -> None:
    """What is remembered was finite when it was taken in, and weights are not negative."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all() or (name == "weight" and bool((tensor < 0).any())):
            raise ValueError(f"{name} in the memory of a state must be finite, got other values. {_REMEDY}")


def numbers(tensors: dict[str, Tensor], positive: str) -> None:
    """0-dim floating tensors, finite, the one named `positive` above 0."""
    for name, tensor in tensors.items():
        if tensor.dim() != 0 or not tensor.is_floating_point():
            raise TypeError(f"{name} must be one floating number, got {tuple(tensor.shape)} {tensor.dtype}")
    finite(tensors)
    if positive in tensors and tensors[positive] <= 0:
        raise ValueError(f"{positive} in a state must be above 0, got {float(tensors[positive])}. {_REMEDY}")


def count(state: dict[str, Any], name: str) -> Tensor | int:
    """A number of samples, as an int or a 0-dim integer tensor."""
    value: Tensor | int = state[name]
    if isinstance(value, bool) or torch.as_tensor(value).dim() or torch.as_tensor(value).is_floating_point():
        raise TypeError(f"{name} must be a number of samples, got {value!r}")
    return value
