"""Full reductions: operations that turn the losses of a batch into one number, and each sample's share of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._graph import Node, samples_in
from .ambiguity._problem import wide_dtype

_KINDS = {
    getattr(owner, name): name
    for owner in (torch, Tensor)
    for name in ("sum", "mean", "nansum", "nanmean")
}  # fmt: skip
# Their mean divides by the weight of the targets that count; that of the others by the number of entries.
_OF_TARGETS = {F.cross_entropy, F.nll_loss}
_LOSSES = _OF_TARGETS | {
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.cosine_embedding_loss, F.gaussian_nll_loss,
    F.hinge_embedding_loss, F.huber_loss, F.kl_div, F.l1_loss, F.margin_ranking_loss, F.mse_loss,
    F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss, F.poisson_nll_loss,
    F.smooth_l1_loss, F.soft_margin_loss, F.triplet_margin_loss, F.triplet_margin_with_distance_loss,
}  # fmt: skip
WATCHED = frozenset(_KINDS) | frozenset(_LOSSES)


class _Gate:
    """Multiplies the gradient of sample i by ratio[i], once the ratio is known. Holds no losses: they would
    hold it, and be freed by the cycle collector only."""

    ratio: Tensor | None = None

    def __call__(self, grad: Tensor) -> Tensor:
        if self.ratio is None:
            return grad
        rows, ratio = grad.reshape(len(self.ratio), -1), self.ratio[:, None]
        # A masked sample has ratio 0 and may hold anything.
        return torch.where(ratio == 0, 0.0, rows * ratio).to(grad.dtype).reshape(grad.shape)


class Reduction:
    """One recorded reduction: sum, mean, nansum or nanmean of a tensor of this `shape` to the scalar `value`.

    It reads an alias, whose gradient passes the gate: other uses of the tensor stay as they are.
    """

    def __init__(self, tensor: Tensor, kind: str, reduce: Callable[[Tensor], Tensor]) -> None:
        alias = tensor.reshape(1) if tensor.dim() == 0 else tensor.view_as(tensor)
        self.kind, self.shape, self.gate = kind, tuple(alias.shape), _Gate()
        # All of it now: in-place arithmetic on the tensor may follow, which changes its values and its graph.
        alias.register_hook(self.gate)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.value = reduce(alias)
        self.node: Node = self.value.grad_fn
        self._source: Node = tensor.grad_fn
        self._sums, self._skipped = _row_sums(alias.detach().reshape(len(alias), -1), kind)

    def samples(self, expected: int | None) -> int | str:
        """How many samples lie behind the reduced tensor, or why its rows are not samples."""
        return samples_in(self._source, self.shape[0], expected)

    def shares(self, samples: int) -> Tensor:
        """(samples,) what each sample adds to the value, wide; they sum to it."""
        return self._sums.reshape(samples, -1).sum(-1)

    def skipped(self, samples: int) -> Tensor | None:
        """(samples,) bool, samples that a nan-reduction leaves out altogether; None where none can be."""
        return None if self._skipped is None else self._skipped.reshape(samples, -1).all(-1)


def _row_sums(rows: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """What each row adds to the reduction, and whether it is left out."""
    wide, missing = rows.to(wide_dtype(rows.device)), None
    count: Tensor | int = rows.numel()
    if kind.startswith("nan"):
        missing = rows.isnan()
        wide, count = torch.where(missing, 0.0, wide), (~missing).sum()
    return wide.sum(-1) / (count if kind.endswith("mean") else 1), None if missing is None else missing.all(-1)


def record(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Reduction | None]:
    """Call a watched function; if it reduced a whole tensor that has a gradient, return the record as well.

    What the caller gets is a clone of the recorded scalar: `loss *= 2` must not reach it.
    """
    if func in _LOSSES:
        return _record_loss(func, args, kwargs)
    tensor = args[0] if args else kwargs.get("input")
    if not isinstance(tensor, Tensor) or not tensor.requires_grad or tensor.dim() == 0 or tensor.numel() == 0:
        return func(*args, **kwargs), None
    rest = args[1:]
    kwargs = {name: value for name, value in kwargs.items() if name != "input"}
    if not _reduces_all(tensor, rest, kwargs):
        return func(tensor, *rest, **kwargs), None
    reduction = Reduction(tensor, _KINDS[func], lambda alias: func(alias, *rest, **kwargs))
    return reduction.value.clone(), reduction


def _reduces_all(tensor: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if kwargs.get("keepdim") or "out" in kwargs or (len(rest) > 1 and rest[1] is True):
        return False
    dim = rest[0] if rest else kwargs.get("dim", kwargs.get("axis"))
    if dim is None or dim == ():
        return True
    dims = {d % tensor.dim() for d in ([dim] if isinstance(dim, int) else dim)}
    return len(dims) == tensor.dim()


def _record_loss(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Reduction | None]:
    """A loss that reduces inside: ask for the entries and reduce them as it would have done."""
    call = inspect.signature(func).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    how = given["reduction"]
    legacy = given.get("size_average") is not None or given.get("reduce") is not None
    if legacy or how not in ("mean", "sum", "batchmean"):
        return func(*args, **kwargs), None
    given["reduction"] = "none"
    entries = func(*call.args, **call.kwargs)
    if not entries.requires_grad or entries.numel() == 0:
        return func(*args, **kwargs), None
    by_target = func in _OF_TARGETS and not given["target"].is_floating_point()
    if how == "mean" and not by_target:
        reduction = Reduction(entries, "mean", Tensor.mean)
        return reduction.value.clone(), reduction
    reduction = Reduction(entries, "sum", Tensor.sum)
    if how == "sum":
        return reduction.value.clone(), reduction
    if how == "batchmean":
        return reduction.value / given["input"].shape[0], reduction
    return reduction.value / _weight_of(given["target"], given["weight"], given["ignore_index"]), reduction


def _weight_of(target: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
    counts = target != ignored
    if weight is None:
        return counts.sum()
    return torch.where(counts, weight[torch.where(counts, target, 0)], 0.0).sum()
