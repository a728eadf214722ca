"""Every argument error, one voice: the argument, the rule, the value, the remedy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDE_ENOUGH = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def number(
    name: str,
    value: float,
    low: float,
    high: float,
    remedy: str,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return `value` as a float, or say which range it left and what to do."""
    opening = "(" if open_low or low == -math.inf else "["
    closing = ")" if open_high or high == math.inf else "]"
    span = f"{opening}{low:g}, {high:g}{closing}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in {span}, got {type(value).__name__} {value!r}. {remedy}")
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    inside = above and below and not math.isinf(value)
    if not inside:
        raise ValueError(f"{name} must be in {span}, got {value!r}. {remedy}")
    return float(value)


def exactly_one(owner: str, **given: float | None) -> None:
    """Raise unless one and only one of the named arguments was given."""
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        choice = " or ".join(f"{name}=" for name in given)
        got = " and ".join(named) if named else "neither"
        raise ValueError(f"{owner} takes exactly one of {choice}, got {got}. Give one of them.")


def floating(name: str, tensor: Tensor, remedy: str = "Convert it with .float().") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}. Use torch.as_tensor({name}).")
    if tensor.dtype not in WIDE_ENOUGH:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}. {remedy}")


def per_sample(name: str, tensor: Tensor) -> None:
    """One floating entry per sample, shape (n,): a column (n, 1) would broadcast to (n, n) further on."""
    floating(name, tensor)
    if tensor.dim() != 1:
        remedy = f"Use {name}.squeeze(-1)." if tensor.shape[-1:] == (1,) else "Give one entry per sample."
        raise ValueError(f"{name} must have shape (n,), got {tuple(tensor.shape)}. {remedy}")


def finite_losses(name: str, losses: Tensor) -> None:
    """One finite loss per sample, and at least one, where a number is to come out."""
    per_sample(name, losses)
    bad = (~losses.detach().isfinite()).nonzero().flatten().tolist()
    if bad or len(losses) == 0:
        found = f"NaN or infinity at {bad[:10]} of {len(losses)}" if bad else "none at all"
        raise ValueError(f"{name} must be finite, got {found}. Find their cause, or leave them out knowingly.")


def same_samples(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """`tensor` is per sample and belongs to the samples of `other`."""
    per_sample(name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name} {tuple(other.shape)}, got {tuple(tensor.shape)}. "
            "Give one entry per sample."
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}. "
            f"Move it with {name}.to({other_name}.device)."
        )


def whole(name: str, value: int, low: int, remedy: str) -> int:
    """Return `value`, an integer of at least `low`."""
    if type(value) is not int or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}. {remedy}")
    return value


def fits(name: str, tensor: Tensor, losses: Tensor) -> None:
    """`tensor` belongs to the same samples: the shape of `losses`, or (n,) shared by all rows."""
    if not isinstance(tensor, Tensor):
        texts = isinstance(tensor, (list, tuple)) and any(isinstance(entry, str) for entry in tensor)
        remedy = "Number them: an integer id for each name" if texts else f"Use torch.as_tensor({name})"
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}. {remedy}.")
    if tensor.shape != losses.shape and tensor.shape != losses.shape[-1:]:
        shared = "" if losses.dim() == 1 else f" or ({losses.shape[-1]},)"
        raise ValueError(
            f"{name} must have the shape of losses {tuple(losses.shape)}{shared}, got {tuple(tensor.shape)}. "
            "Give one entry per sample."
        )
    if tensor.device != losses.device:
        raise ValueError(
            f"{name} must be on the device of losses ({losses.device}), got {tensor.device}. "
            f"Move it with {name}.to(losses.device)."
        )


def boolean_mask(mask: Tensor, losses: Tensor) -> None:
    fits("mask", mask, losses)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True where the entry is real), got {mask.dtype}. Use mask.bool().")


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def readable(tensor: Tensor) -> bool:
    """Whether code may look at the values and choose its way: on the CPU that waits for nothing, but it would
    break a trace in two, and under vmap there are many values in the place of one."""
    if not tensor.is_cpu or torch.compiler.is_compiling():
        return False
    return not _is_wrapped(tensor)


def base_weights(base: Tensor, losses: Tensor) -> None:
    """Shape and type always; the values where reading them costs no device sync."""
    fits("base", base, losses)
    floating("base", base)
    # On an accelerator the values stay unread: rows with a bad base come out as NaN instead.
    if not readable(base):
        return
    if not bool(((base >= 0) & (base < math.inf)).all()):
        raise ValueError(
            f"base must be finite and not negative, got a minimum of {base.min().item():g} "
            f"and a maximum of {base.max().item():g}. Give each sample's weight in the untouched loop."
        )
    if not bool((base.sum(-1) > 0).all()):
        raise ValueError("base must sum to a positive number, got 0. Mask out a whole row with mask= instead.")


def integer_ids(groups: Tensor, losses: Tensor) -> None:
    fits("groups", groups, losses)
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise TypeError(f"groups must be integer ids, one per sample, got {groups.dtype}. Use groups.long().")


def instance(name: str, value: object, kind: type | tuple[type, ...], what: str, remedy: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {value!r}. {remedy}")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        names = " or ".join(repr(one) for one in allowed)
        raise ValueError(f"{name} must be {names}, got {value!r}. The default is {allowed[0]!r}.")


def memory_size(memory: int | None, pool: str) -> None:
    if memory is None or (type(memory) is int and memory == 0 and pool != "window"):
        return
    if type(memory) is not int or memory < 64:
        raise ValueError(
            f"memory must be 0 or an integer of at least 64, got {memory!r}. Leave it out for the set's own size."
        )
    if pool != "memory":
        raise ValueError(f'memory must be left out with pool="{pool}", got {memory}. Use pool="memory".')


def one_per_sample(name: str, tensor: Tensor, *, by_token: bool, may_be_empty: bool) -> None:
    """One floating entry per sample, (n,) or (n, 1), or per token."""
    floating(name, tensor)
    shape = tuple(tensor.shape)
    if tensor.dim() == 0:
        raise ValueError(
            f"{name} must have shape (n,), one entry per sample, got a scalar (). Call before the reduction "
            f'(reduction="none"), or pass {name}.reshape(1) if this is one single sample.'
        )
    if not by_token and (tensor.dim() > 2 or (tensor.dim() == 2 and shape[1] != 1)):
        trap = tensor.dim() == 2 and shape[0] == shape[1]
        why = (
            "(n,) against (n, 1) broadcasts to (n, n): squeeze one of them first"
            if trap
            else (
                f"Reduce to one entry per sample, pass {name}.flatten() if each entry is one, or say with units= "
                "what shares a ratio"
            )
        )
        raise ValueError(f"{name} must have shape (n,) or (n, 1), got {shape}. {why}.")
    if tensor.numel() == 0 and not may_be_empty:
        raise ValueError(f"{name} must have at least one entry, got shape {shape}. Skip the call for an empty batch.")


def reweightable(losses: Tensor, *, hooked: bool, by_token: bool, with_gradient: bool, may_be_empty: bool) -> None:
    """One loss per sample (or token), on the way to a gradient, and not reweighted before."""
    one_per_sample("losses", losses, by_token=by_token, may_be_empty=may_be_empty)
    if losses.numel() == 0:
        return
    if with_gradient and not losses.requires_grad:
        raise ValueError(
            "losses must have a gradient, got requires_grad=False: detached, computed under no_grad, or of a "
            "frozen model. Pass the tensor that backward() will reach."
        )
    if hooked:
        raise ValueError(
            f"losses must be reweighted once, got a tensor of shape {tuple(losses.shape)} that is already: "
            "a second hook would square the ratio. Pass losses.clone() if another set should act as well."
        )


def raise_nonfinite(bad: Tensor) -> None:
    where = bad.nonzero().flatten().tolist()
    found = f"NaN or +inf at {where} of {len(bad)} samples" if where else "NaN or +inf on another rank"
    raise FloatingPointError(
        f'losses must be finite, got {found}. Find their cause, mask them, or use on_nonfinite="propagate".'
    )


def token_units(losses: Tensor, units: object, scores: Tensor | None, groups: Tensor | None) -> None:
    """What `units=` says fits losses by token."""
    if losses.dim() != 2:
        raise ValueError(
            f"losses must have shape (b, t) with units=, got {tuple(losses.shape)}. Leave units out for one loss "
            "per sample."
        )
    if isinstance(units, Tensor):
        if units.shape != losses.shape:
            raise ValueError(
                f"units must have the shape of losses {tuple(losses.shape)}, got {tuple(units.shape)}. "
                "Give each token the id of its span."
            )
        integer_ids(units, losses)
    elif units not in ("token", "sequence"):
        raise ValueError(f"units must be 'token', 'sequence' or a tensor of span ids, got {units!r}. Use 'sequence'.")
    if units_are_sequences := isinstance(units, str) and units == "sequence":
        rows = losses.detach()[:, 0] if losses.shape[1] else losses.detach().sum(-1)
        if groups is not None:
            integer_ids(groups, rows)
        if scores is not None and scores.shape != losses.shape:
            fits("scores", scores, rows)
    if groups is not None and not units_are_sequences:
        raise ValueError("groups must come with units='sequence', got other units. Give the spans as units= instead.")
