"""How the worst case reaches the gradient: a hook on the per-sample losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import _checks
from .capture import Capture
from .hook import attach, attached
from .ratios import Ratios
from .token_units import Unit
from .window import WindowPool, survey

Batch = TypeVar("Batch")


class Reweighter(Ratios):
    """Makes the gradient of per-sample losses follow the worst case of an ambiguity set.

        min_params  max_{q in ambiguity}  sum_i q_i loss_i(params)

    Calling it attaches a hook to the losses that multiplies the gradient arriving at sample i by its
    `ratio` q_i / p_i. Forward values do not change. Whatever the loop does afterwards (mean, sum, token
    mean, accumulation, loss scaling) gives sample i a coefficient c_i; with the base p proportional to
    c_i the loop descends the worst case exactly. All gradient through that tensor is reweighted: for a use
    that should not be, keep `losses` as it is and go on with `reweighter(losses.clone())`. For a loop that
    multiplies by the ratio itself, `ratio` gives it without a hook.

    Args:
        ambiguity: the set, e.g. `TotalVariation(0.1)`, or a schedule of sets (`robustgrad.schedule`).
        pool: which losses compete. "memory": with the last few hundred, so that calls of any size, down to
            one sample, are robust. "window": those of one optimizer step, exactly, at the cost of a second
            forward pass (see `window`). "batch": the samples of each call, the papers' literal algorithm.
        memory: how many losses to remember, at least 64; None chooses by the set and the samples per step.
            0 is the batch pool.
        process_group: the ranks whose losses compete together, and whose gradients the loop averages: a
            ProcessGroup or DeviceMesh of data-parallel ranks. None: all ranks, where there are several.
            Every rank calls and steps equally often, with an empty call if it has no samples.
        survey: how a window looks at its samples. "eval": in eval mode. "train": in train mode, and the
            random numbers are drawn once more for the second pass, so that it sees the same masks.
        on_nonfinite: what a NaN or +inf loss does. "propagate": its ratio is NaN, so is its gradient, and
            GradScaler or the clipping tool skips the step. "raise": the call raises, on every rank (one
            device sync, and one exchange of the ranks). Such losses never enter the memory.
    Raises: TypeError or ValueError, naming the argument, its rule, the value and the remedy.
    Source: the multiplier q_i / p_i is the envelope (Danskin) gradient; per-call weights as in
        arXiv 2503.00539, Algorithm 1.

    Example:
        >>> import torch
        >>> from robustgrad import CVaR, Reweighter
        >>> reweighter = Reweighter(CVaR(0.5), pool="batch")
        >>> losses = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
        >>> reweighter(losses).mean().backward()
        >>> losses.grad * 4
        tensor([0., 0., 2., 2.])
    """

    def __call__(
        self,
        losses: Tensor,
        *,
        scores: Tensor | None = None,
        groups: Tensor | None = None,
        base: Tensor | None = None,
        mask: Tensor | None = None,
        units: Unit | None = None,
    ) -> Tensor:
        """Attach the worst case to per-sample losses; returns the same tensor.

        Under `torch.no_grad` (evaluation) nothing happens.

        Args:
            losses: (n,) or (n, 1) floating, one loss per sample, with a gradient; (b, t) with `units`.
                (0,) for a rank that has no samples.
            scores: (n,) floating, what the adversary maximises when it is not the loss, higher is worse:
                for policy optimisation minus the reward. Detached.
            groups: (n,) integer ids of domains or prompts: the worst case is over the means of groups. An id
                means the same group in every call. Hand the samples of a group that does not come back
                (a prompt) over in one call.
            base: (n,) >= 0, the weight that the untouched loop gives each sample, relative to other
                samples: of this call and rank, and of all that it competes with. None: all equal. A loop
                that averages calls of unequal size n_k, or ranks of unequal size, gives each 1 / n_k.
            mask: (n,) bool, True where the sample is real; masked ones get ratio 0.
            units: for losses by token, (b, t), what shares one ratio: "token", "sequence", or spans as (b, t)
                integer ids, equal within a span. A unit's loss is the mean of its tokens under `base`, which
                is (b, t) like `mask`, and its weight their sum: None is the loop's mean over all tokens.
                With "sequence" `groups` is (b,), and `scores` may be.
        Raises: ValueError or TypeError before any state changes: losses without gradient, of another shape,
            with a hook already, empty, or of integer type; other arguments that do not fit them.
            FloatingPointError: a NaN or +inf loss, where `on_nonfinite="raise"`.
            RuntimeError: ranks that do not call together; a call that the survey of the window did not see.
        """
        surveying = self._pool.surveying
        if not torch.is_grad_enabled() and not surveying:
            return losses
        _checks.reweightable(
            losses,
            hooked=attached(losses),
            by_token=units is not None,
            with_gradient=not surveying,
            may_be_empty=self._ranks.group is not None,
        )
        ratio = self._ratio(losses, scores=scores, groups=groups, base=base, mask=mask, units=units)
        if losses.requires_grad and not surveying:
            attach(losses, ratio, mask)
        return losses

    def capture(self, **arguments: Any) -> Capture:
        """`with reweighter.capture(): loss = loss_fn(batch)` for a loss that is a scalar; see `Capture`."""
        return Capture(self._ratio, surveying=self._pool.surveying, **arguments)

    def survey(self, model: nn.Module) -> AbstractContextManager[None]:
        """Look at all samples of the coming optimizer step: calls inside only record, without gradient.

        For loops that run both passes themselves; `window` does both. Afterwards the same calls come again,
        in the same order, and get the exact ratios of the whole step.

        Args:
            model: put in eval mode meanwhile, or (`survey="train"`) its random numbers and running
                statistics put back to where they were.
        Raises: ValueError: the pool is not "window". RuntimeError: calls of the survey before are still due.
        """
        if not isinstance(self._pool, WindowPool):
            raise ValueError(f'pool must be "window" for a survey, got {self.pool!r}. Pass pool="window".')
        return survey(self._pool, model, self._survey)

    def window(
        self, loss_fn: Callable[[Batch], Tensor], batches: Iterable[Batch], *, model: nn.Module
    ) -> Iterator[Tensor]:
        """The loss of each micro-batch of one optimizer step, reweighted exactly over all of them.

        Args:
            loss_fn: the loss to call `backward` on, from one micro-batch; it calls the reweighter. It is
                called twice for each micro-batch, first without gradient.
            batches: all micro-batches of the step.
            model: see `survey`.

        Example:
            >>> import torch
            >>> from robustgrad import ChiSquare, Reweighter
            >>> model, reweighter = torch.nn.Linear(3, 1), Reweighter(ChiSquare(0.5), pool="window")
            >>> def loss_fn(x):
            ...     return reweighter(model(x).squeeze(-1).square()).sum() / 32
            >>> for loss in reweighter.window(loss_fn, torch.randn(32, 3).split(1), model=model):
            ...     loss.backward()
        """
        batches = list(batches)
        with self.survey(model):
            for batch in batches:
                loss_fn(batch)
        for batch in batches:
            yield loss_fn(batch)
