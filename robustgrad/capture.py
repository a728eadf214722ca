"""Finds the per-sample losses behind a scalar loss."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from . import _checks
from ._attribution import check_complete, check_loss, of_samples, split, tied
from ._graph import Node, ancestors, feeding
from ._reductions import WATCHED, Reduction, record

_SPECIAL = WATCHED | {Tensor.backward}


class Capture(TorchFunctionMode):
    """Reweights the samples behind a scalar loss: `with reweighter.capture(): loss = loss_fn(batch)`.

    While it is on, full reductions (mean, sum, their nan forms, and the losses of torch.nn.functional, which
    reduce inside) are recorded. Those that feed the scalar are found in the autograd graph, with the sign and
    size c_k that each enters with, and sample i of n has the loss

        loss_i = n sum_k c_k share_k,i,      mean loss_i = loss

    where share_k,i is what row i adds to reduction k. These losses go to the reweighter, with base weight
    1/n, and the gradient of row i is multiplied by its ratio. The value of the scalar does not change.

    Which scalar: the one that `backward()` is called on inside the context; or the one handed to
    `capture(loss)`; or, when the context ends, the only one left that no other was made of.

    Args:
        scores, groups, mask: (n,), as in `Reweighter.__call__`.
        rows: how many samples the batch holds. Reductions over anything else are then no losses of samples,
            even where they could be; None takes the number that all recorded reductions have in common.
        samples: how many samples the scalar averages over, where that is more than this batch: loops that
            divide by a count of the whole optimizer step (`num_items_in_batch`). None is the batch.
        auxiliary: what to do with the part of the loss that comes from elsewhere. "raise" if it is more than
            max(1e-3, 2 eps) of the mean |loss_i|; "keep" leaves it its own gradient. `keep(term)` does so
            for one term that is known.
    Raises on leaving: RuntimeError: no per-sample losses lie behind the scalar, or not all of it, with what
        was found instead. In evaluation (`no_grad`) nothing happens.

    Losses that differ by a few units of float32 rounding count as ties.

    Example:
        >>> import torch
        >>> from robustgrad import CVaR, Reweighter
        >>> model, reweighter = torch.nn.Linear(3, 1), Reweighter(CVaR(0.5), pool="batch")
        >>> with reweighter.capture():
        ...     loss = torch.nn.functional.mse_loss(model(torch.randn(8, 3)), torch.randn(8, 1))
        >>> loss.backward()
    """

    def __init__(
        self,
        ratio_of: Callable[..., Tensor],
        *,
        scores: Tensor | None = None,
        groups: Tensor | None = None,
        mask: Tensor | None = None,
        rows: int | None = None,
        samples: int | None = None,
        auxiliary: Literal["raise", "keep"] = "raise",
        surveying: bool = False,
    ) -> None:
        _checks.choice("auxiliary", auxiliary, ("raise", "keep"))
        super().__init__()
        self._ratio_of = ratio_of
        self._arguments = {"scores": scores, "groups": groups, "mask": mask}
        self._rows, self._samples, self._keeps = rows, samples, auxiliary == "keep"
        self._reductions: list[Reduction] = []
        self._kept: list[tuple[GradientEdge, Tensor]] = []
        self._scalars: list[weakref.ref[Tensor]] = []
        self._attached = False
        self._survey = ExitStack() if surveying else None

    def __enter__(self) -> Capture:
        if self._survey is not None:
            # The walk needs a graph, but nobody goes back along it: what it would save is left out.
            self._survey.enter_context(torch.enable_grad())
            self._survey.enter_context(torch.autograd.graph.saved_tensors_hooks(_scalars_only, _saved))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Paid for every call of a forward pass: nothing here that only some of them need.
        # A compiled function runs without us: what it reduces inside, nobody sees, and that is an error later.
        if is_compiling():
            return func(*args, **(kwargs or {}))
        if func in _SPECIAL:
            out = self._special(func, args, kwargs or {})
        else:
            out = func(*args, **kwargs) if kwargs else func(*args)
        if type(out) is Tensor and out.dim() == 0 and out.grad_fn is not None:
            self._scalars.append(weakref.ref(out))
        return out

    def _special(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func is Tensor.backward:
            self(args[0])
            return func(*args, **kwargs)
        out, reduction = record(func, args, kwargs)
        self._reductions += [] if reduction is None else [reduction]
        return out

    def keep(self, term: Tensor) -> Tensor:
        """Let a scalar term of the loss (a penalty, a router loss) keep its own gradient; returns it."""
        if term.dim() != 0:
            raise ValueError(f"term must be a scalar, got shape {tuple(term.shape)}. Reduce it first.")
        if term.grad_fn is not None:
            self._kept.append((torch.autograd.graph.get_gradient_edge(term), term.detach().clone()))
        return term

    def __call__(self, loss: Tensor) -> Tensor:
        """Reweight the samples behind this scalar loss; returns the same tensor.

        Raises: RuntimeError: what lies behind the loss is not (only) a reduction of per-sample losses.
        """
        if torch.is_grad_enabled():
            with torch._C.DisableTorchFunction():  # nothing that happens here is the loop's
                check_loss(loss)
                self._attach(loss)
        return loss

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        try:
            if kind is None and torch.is_grad_enabled() and not self._attached:
                self(self._last_scalar())
        finally:
            if self._survey is not None:
                self._survey.close()
            self._reductions, self._kept, self._scalars = [], [], []

    def _last_scalar(self) -> Tensor:
        """The one scalar left over that no other scalar was made of."""
        alive = [tensor for tensor in (ref() for ref in self._scalars) if tensor is not None and tensor.requires_grad]
        nodes: dict[Node, Tensor] = {one.grad_fn: one for one in alive}
        oldest = min((node._sequence_nr() for node in nodes), default=0)
        behind = set().union(*(ancestors(node, oldest) for node in nodes)) if len(nodes) > 1 else set()
        last = [one for node, one in nodes.items() if node not in behind]
        if len(last) == 1:
            return last[0]
        found = ", ".join(f"{one.item():g}" for one in last)
        raise RuntimeError(
            "capture() must find one scalar loss with a gradient when its context ends, found "
            f"{len(last)}{f' ({found})' if found else ''}. Say which one it is: "
            "`with optimizer.capture() as capture: loss = capture(loss_fn(batch))`, and detach the others."
        )

    def _attach(self, loss: Tensor) -> None:
        known = {reduction.node: reduction for reduction in self._reductions}
        kept = {edge.node: (edge, value) for edge, value in self._kept}
        found, ends = feeding(loss.grad_fn, {*known, *kept})
        if self._attached and not found:
            return  # reweighted already, and backward() is called inside the context as well
        terms, rows = of_samples([known[node] for node in found if node in known], ends, self._rows)
        shares, rest = split(loss, terms, [kept[node] for node in found if node in kept], rows)
        if not self._keeps:
            check_complete(loss, shares, rest, terms, ends)
        losses = tied(shares * (self._samples or rows), loss.dtype)
        ratio = self._ratio(losses, terms)
        for term in terms:
            term.gate.ratio = ratio
        self._reductions, self._attached = [], True

    def _ratio(self, losses: Tensor, terms: list[Reduction]) -> Tensor:
        arguments = dict(self._arguments)
        for skipped in (term.skipped(len(losses)) for term in terms):
            if skipped is not None:
                mask = arguments["mask"]
                arguments["mask"] = ~skipped if mask is None else mask & ~skipped
        base = torch.full_like(losses, 1 / (self._samples or len(losses)))
        return self._ratio_of(losses, base=base, **arguments)


def _scalars_only(saved: Tensor) -> Tensor | None:
    return saved if saved.dim() == 0 else None


def _saved(saved: Tensor | None) -> Tensor:
    if saved is None:
        raise RuntimeError("a survey has no backward pass, got one. Call backward() on the losses of the second pass.")
    return saved
