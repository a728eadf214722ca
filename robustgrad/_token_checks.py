"""Argument errors of what has one entry for each token, in the voice of `_checks`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks


def same_entries(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """`tensor` is floating point, of the shape and on the device of `other`, whatever that is."""
    _checks.floating(name, tensor)
    _same_place(name, tensor, other_name, other)


def token_mask(mask: Tensor, other_name: str, other: Tensor) -> None:
    """True where the token is real."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True where the token is real), got {got}. Use mask.bool().")
    _same_place("mask", mask, other_name, other)


def token_ids(tokens: Tensor, logits: Tensor) -> None:
    """(n, T) integers for logits (n, T, V)."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be a tensor of integer ids, got {got}. Use the input_ids of the model.")
    if logits.dim() != 3 or tokens.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must have shape (n, T, V) for tokens (n, T), got {tuple(logits.shape)} and "
            f"{tuple(tokens.shape)}. Pass both as they go into and come out of the model, unshifted."
        )


def _same_place(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name} {tuple(other.shape)}, got {tuple(tensor.shape)}. "
            "Nothing is broadcast: expand it yourself where that is meant."
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}. "
            f"Move it with {name}.to({other_name}.device)."
        )
