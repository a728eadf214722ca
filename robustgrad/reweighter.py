"""How the worst case reaches the gradient: a hook on the per-sample losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from . import _checks
from .ambiguity import AmbiguitySet
from .ambiguity._problem import wide_dtype
from .memory import MemoryPool
from .pool import BatchPool, Pool, Samples

_VERSION = 1
_HOOKED = "_robustgrad_hooked"


class Reweighter:
    """Makes the gradient of per-sample losses follow the worst case of an ambiguity set.

        min_params  max_{q in ambiguity}  sum_i q_i loss_i(params)

    Calling it attaches a hook to the losses that multiplies the gradient arriving at sample i by its
    `ratio` q_i / p_i. Forward values do not change. Whatever the loop does afterwards (mean, sum, token
    mean, accumulation, loss scaling) gives sample i a coefficient c_i; with the base p proportional to
    c_i the loop descends the worst case exactly. All gradient through that tensor is reweighted: for a use
    that should not be, keep `losses` as it is and go on with `reweighter(losses.clone())`.

    Args:
        ambiguity: the set, e.g. `TotalVariation(0.1)`.
        pool: which losses compete. "memory": with the last few hundred, so that calls of any size, down to
            one sample, are robust. "batch": the samples of each call, the papers' literal algorithm.
        memory: how many losses to remember, at least 64; None chooses by the set and the samples per step.
            0 is the batch pool.
        on_nonfinite: what a NaN or +inf loss does. "propagate": its ratio is NaN, so is its gradient, and
            GradScaler or the clipping tool skips the step. "raise": the call raises (one device sync).
            Such losses never enter the memory.
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

    def __init__(
        self,
        ambiguity: AmbiguitySet,
        *,
        pool: Literal["memory", "batch"] = "memory",
        memory: int | None = None,
        on_nonfinite: Literal["propagate", "raise"] = "propagate",
    ) -> None:
        if not isinstance(ambiguity, AmbiguitySet):
            raise TypeError(
                f"ambiguity must be an ambiguity set, got {ambiguity!r}. Use for example TotalVariation(0.1)."
            )
        _checks.choice("pool", pool, ("memory", "batch"))
        _checks.choice("on_nonfinite", on_nonfinite, ("propagate", "raise"))
        _checks.memory_size(memory, pool)
        self.ambiguity = ambiguity
        self.on_nonfinite = on_nonfinite
        in_memory = pool == "memory" and memory != 0
        self._pool: Pool = MemoryPool(ambiguity, memory) if in_memory else BatchPool(ambiguity)
        self._memory = memory
        self._nonfinite: Tensor | int = 0

    @property
    def pool(self) -> str:
        """ "memory" or "batch"."""
        return "memory" if isinstance(self._pool, MemoryPool) else "batch"

    @property
    def expects_steps(self) -> bool:
        """Whether `step` is known to be called after each optimizer step; the first call of it says so.

        While it is not, the memory takes in what it has seen after every quarter of its size.
        """
        return self._pool.expects_steps

    @expects_steps.setter
    def expects_steps(self, expected: bool) -> None:
        self._pool.expects_steps = expected

    def __call__(
        self,
        losses: Tensor,
        *,
        scores: Tensor | None = None,
        groups: Tensor | None = None,
        base: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attach the worst case to per-sample losses; returns the same tensor.

        Under `torch.no_grad` (evaluation) nothing happens.

        Args:
            losses: (n,) or (n, 1) floating, one loss per sample, with a gradient.
            scores: (n,) floating, what the adversary maximises when it is not the loss, higher is worse:
                for policy optimisation minus the reward. Detached.
            groups: (n,) integer ids of domains or prompts: the worst case is over the means of groups. An id
                means the same group in every call. Hand the samples of a group that does not come back
                (a prompt) over in one call.
            base: (n,) >= 0, the weight that the untouched loop gives each sample, relative to other
                samples; under the memory pool also to those of other calls. None: all equal.
            mask: (n,) bool, True where the sample is real; masked ones get ratio 0.
        Raises: ValueError or TypeError before any state changes: losses without gradient, of another shape,
            with a hook already, empty, or of integer type; other arguments that do not fit them.
            FloatingPointError: a NaN or +inf loss, where `on_nonfinite="raise"`.
        """
        if not torch.is_grad_enabled():
            return losses
        _checks.reweightable(losses, hooked=hasattr(losses, _HOOKED))
        _checks.single_process()
        samples, bad = _samples(losses, scores, groups, base, mask)
        self._pool.check(samples)
        if self.on_nonfinite == "raise" and bool(bad.any()):
            where = bad.nonzero().flatten().tolist()
            raise FloatingPointError(
                f"losses must be finite, got NaN or +inf at {where} of {len(bad)} samples. "
                'Find their cause, mask them, or use on_nonfinite="propagate".'
            )
        self._nonfinite = self._nonfinite + bad.sum()
        self._attach(losses, self._pool.ratio(samples), mask)
        return losses

    def _attach(self, losses: Tensor, ratio: Tensor, mask: Tensor | None) -> None:
        ratio = ratio.to(torch.float64 if losses.dtype == torch.float64 else torch.float32)
        keep = None if mask is None else mask.reshape(losses.shape)
        # Asked of the type: asking the node itself would unpack what it saved.
        saved = hasattr(type(losses.grad_fn), "_saved_result")
        hook = _scale(ratio.reshape(losses.shape), keep, saved)
        losses.register_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        setattr(losses, _HOOKED, True)

    def step(self) -> None:
        """Say that an optimizer step happened; more than once is the same as once.

        `RobustOptimizer` calls it. The next call takes the step's losses into the memory.
        """
        self._pool.mark()

    def metrics(self) -> dict[str, Tensor]:
        """What robustness did to the samples of the current (or just finished) optimizer step.

        0-dim tensors on the device of the losses, computed when asked for; empty before the first call.

        Over the losses that compete (the memory, or the last call of a batch pool): `value` their worst-case
        mean, `mean` their plain mean, `gap` the difference, `divergence` reached, `threshold`, `cap` the
        largest ratio that any sample can get, `pool_size` how many compete. They are scores where scores
        were given. Over the samples of the step: `ess` effective sample size, `max_ratio` largest ratio.
        `plain` is True where the last call was plain averaging (fewer than 64 losses remembered, or a batch
        of one); `nonfinite` counts the NaN and +inf losses so far.
        """
        if not self._pool.started:
            return {}
        return self._pool.metrics() | {"nonfinite": torch.as_tensor(self._nonfinite)}

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs; loads with `torch.load(weights_only=True)`."""
        return {
            "version": _VERSION,
            "configuration": self._configuration(),
            "nonfinite": self._nonfinite,
            "pool": self._pool.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError: the state stems from another version or configuration, naming which."""
        _checks.same_configuration(state, _VERSION, self._configuration())
        self._pool.load_state_dict(state["pool"])
        self._nonfinite = state["nonfinite"]

    def _configuration(self) -> dict[str, Any]:
        return {"ambiguity": repr(self.ambiguity), "pool": self.pool, "memory": self._memory or None}

    def __repr__(self) -> str:
        ambiguity = self.ambiguity.in_memory() if self.pool == "memory" else repr(self.ambiguity)
        extra = "" if not self._memory else f", memory={self._memory}"
        return f"Reweighter({ambiguity}, pool={self.pool!r}{extra})"


def _scale(ratio: Tensor, keep: Tensor | None, saved: bool) -> Callable[[Tensor], Tensor]:
    """The hook. It holds the ratio but not the losses: a tensor that held itself would never be freed.

    An operation that saved its own output (exp, sqrt) uses the losses in its backward: differentiating
    that again would come through the hook a second time and square the ratio.
    """

    def multiply(grad: Tensor) -> Tensor:
        if saved and torch.is_grad_enabled():
            raise RuntimeError(
                "losses must not be the saved output of the operation that made them where create_graph=True: "
                "the second derivative would carry the squared ratio. Pass losses * 1 and use what comes back."
            )
        # Multiplied in the wider of the two types; autograd wants the gradient's own back.
        scaled = (grad * ratio).to(grad.dtype)
        return scaled if keep is None else torch.where(keep, scaled, 0.0)

    return multiply


def _samples(
    losses: Tensor, scores: Tensor | None, groups: Tensor | None, base: Tensor | None, mask: Tensor | None
) -> tuple[Samples, Tensor]:
    """The call's samples, checked and widened, and which of them are NaN or +inf, (n,) bool."""
    rows = losses.detach().reshape(-1)
    wide = wide_dtype(losses.device)
    scores, groups = _row("scores", scores, losses), _row("groups", groups, losses)
    base, mask = _row("base", base, losses), _row("mask", mask, losses)
    weight = None
    if scores is not None:
        _checks.floating("scores", scores)
    if groups is not None:
        _checks.integer_ids(groups, rows)
    if base is not None:
        _checks.base_weights(base, rows)
        weight = base.to(wide)
    if mask is not None:
        _checks.boolean_mask(mask, rows)
        weight = torch.where(mask, 1.0 if weight is None else weight, torch.zeros((), dtype=wide, device=mask.device))
    worst = rows.to(wide) if scores is None else scores.to(wide)
    bad = ~(worst < torch.inf) if scores is None else ~((worst < torch.inf) & (rows < torch.inf))
    if weight is not None:
        bad = bad & (weight != 0)
    return Samples(torch.where(bad, torch.nan, worst), weight, groups), bad


def _row(name: str, tensor: Tensor | None, losses: Tensor) -> Tensor | None:
    """The argument as (n,), detached; it may come as (n,) or in the shape of the losses."""
    if tensor is None:
        return None
    if isinstance(tensor, Tensor) and tensor.shape == losses.shape:
        tensor = tensor.detach().reshape(-1)
    _checks.fits(name, tensor, losses.detach().reshape(-1))
    return tensor.detach()
