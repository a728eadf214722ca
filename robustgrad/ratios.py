"""The ratio of each sample: which set, which pool, and what is counted on the way."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _checks, _state_checks
from ._traced import remember, traced_ratio
from .ambiguity import AmbiguitySet
from .distributed import Ranks
from .pools import POOLS, make_pool
from .samples import Given, Samples
from .schedule import Schedule
from .token_units import Unit, Units

_VERSION = 1


class Ratios:
    """What a `Reweighter` multiplies gradients by, without the gradients: see there."""

    def __new__(cls, *arguments: Any, **options: Any) -> Ratios:
        # Here, because copies and checkpoints come without a call of __init__.
        made = super().__new__(cls)
        remember(made)
        return made

    def __init__(
        self,
        ambiguity: AmbiguitySet | Schedule,
        *,
        pool: Literal["memory", "window", "batch"] = "memory",
        memory: int | None = None,
        process_group: Any = None,
        survey: Literal["eval", "train"] = "eval",
        on_nonfinite: Literal["propagate", "raise"] = "propagate",
    ) -> None:
        kinds, remedy = (AmbiguitySet, Schedule), "Use for example TotalVariation(0.1)."
        _checks.instance("ambiguity", ambiguity, kinds, "an ambiguity set", remedy)
        _checks.choice("pool", pool, POOLS)
        _checks.choice("survey", survey, ("eval", "train"))
        _checks.choice("on_nonfinite", on_nonfinite, ("propagate", "raise"))
        _checks.memory_size(memory, pool)
        self.pool = "batch" if memory == 0 else pool
        self._ranks = Ranks(process_group)
        self._pool = make_pool(self.pool, ambiguity, self._ranks, memory)
        self._memory, self._survey, self.on_nonfinite = memory, survey, on_nonfinite
        self._nonfinite: Tensor | int = 0

    @property
    def ambiguity(self) -> AmbiguitySet | Schedule:
        """The set; of a schedule the copy that runs here."""
        return self._pool.schedule.given

    @property
    def expects_steps(self) -> bool:
        """Whether `step` is known to be called after each optimizer step; the first call of it says so.

        While it is not, the memory takes in what it has seen after every quarter of its size.
        """
        return self._pool.expects_steps

    @expects_steps.setter
    def expects_steps(self, expected: bool) -> None:
        self._pool.expects_steps = expected

    def ratio(
        self,
        scores: Tensor,
        *,
        groups: Tensor | None = None,
        base: Tensor | None = None,
        mask: Tensor | None = None,
        units: Unit | None = None,
    ) -> Tensor:
        """Ratio q_i / p_i of each sample, mean 1 under the base: a call without a hook and without a gradient.

        For loops that multiply advantages (or anything else) themselves. It competes, is remembered, is
        exchanged between ranks and enters `metrics` exactly as a call with these losses would, under
        `torch.no_grad` too. Inside a survey it takes note of the scores and returns ones.

        Args:
            scores: (n,) or (n, 1) floating, what the adversary maximises, higher is worse: for policy
                optimisation minus the reward; (b, t) with `units`.
            groups, base, mask, units: as in `Reweighter.__call__`.
        Returns: the shape of `scores`, float32 (float64 for float64 scores), detached; 0 where masked, NaN where a
            score is NaN or +inf.
        Raises: as `Reweighter.__call__`.

        Example:
            >>> import torch
            >>> from robustgrad import CVaR, Reweighter
            >>> reweighter = Reweighter(CVaR(0.5), pool="batch")
            >>> rewards = torch.tensor([4.0, 3.0, 2.0, 1.0])
            >>> reweighter.ratio(-rewards)
            tensor([0., 0., 2., 2.])
        """
        _checks.one_per_sample("scores", scores, by_token=units is not None, may_be_empty=self._ranks.group is not None)
        ratio = self._ratio(scores, groups=groups, base=base, mask=mask, units=units)
        return ratio.to(torch.promote_types(scores.dtype, torch.float32))

    def _ratio(
        self,
        losses: Tensor,
        *,
        scores: Tensor | None = None,
        groups: Tensor | None = None,
        base: Tensor | None = None,
        mask: Tensor | None = None,
        units: Unit | None = None,
    ) -> Tensor:
        """Ratio of each loss, in its shape; exactly 0 where masked."""
        if torch.compiler.is_compiling():
            return traced_ratio(self, losses, self._pool.surveying, (scores, groups, base, mask), units)
        if units is not None:
            samples, of_token = Units.of_call(losses, units, scores, groups, base, mask)
            ratio = self._ratio_of(samples)[of_token]
        else:
            given = Given.of_call(losses, scores, groups, base, mask)
            quick = self._quick_ratio(given)
            if quick is not None:
                return quick.reshape(losses.shape)
            ratio = self._ratio_of(given.samples()).reshape(losses.shape)
        return ratio if mask is None else torch.where(mask.reshape(losses.shape), ratio, 0.0)

    def _quick_ratio(self, given: Given) -> Tensor | None:
        if self.on_nonfinite == "raise" or self._pool.surveying:
            return None
        before, device = self._nonfinite, given.losses.device
        counter = torch.as_tensor(before, dtype=torch.int64, device=device)
        found = self._pool.quick_ratio(given, counter)
        if found is not None:
            self._nonfinite = counter
        return found

    def _ratio_of(self, samples: Samples) -> Tensor:
        if not self._pool.surveying:
            self._pool.check(samples)
            self._count_nonfinite(samples.bad)
        return self._pool.ratio(samples)

    def _count_nonfinite(self, bad: Tensor) -> None:
        if self.on_nonfinite == "raise" and bool(self._ranks.anywhere(bad.any())):
            _checks.raise_nonfinite(bad)
        self._nonfinite = self._nonfinite + bad.sum()

    def step(self) -> None:
        """Say that an optimizer step happened, once or more; the next call takes its losses into the memory."""
        self._pool.mark()

    def metrics(self) -> dict[str, Tensor]:
        """What robustness did to the samples of the current (or just finished) optimizer step.

        0-dim tensors on the device of the losses, computed when asked for; empty before the first call.
        Of several ranks each may ask on its own: what competes stems from all of them, the samples of a
        step that has not ended (and of a batch pool or window) from the own.

        Over the losses that compete (the memory, or the last call of a batch pool): `value` their worst-case
        mean, `mean` their plain mean, `gap` the difference, `divergence` reached, `threshold`, `cap` the
        largest ratio that any sample can get, `pool_size` how many compete. They are scores where scores
        were given. Over the samples of the step: `ess` effective sample size, `max_ratio` largest ratio.
        `plain` is True where the last call was plain averaging (fewer than 64 losses remembered, or all of them
        equal, or a batch of one); `nonfinite` counts the NaN and +inf losses so far.
        """
        if not self._pool.started:
            return {}
        return self._pool.metrics() | {"nonfinite": torch.as_tensor(self._nonfinite).clone()}

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs; loads with `torch.load(weights_only=True)`."""
        return {
            "version": _VERSION,
            "configuration": self._configuration(),
            "nonfinite": self._nonfinite if isinstance(self._nonfinite, int) else self._nonfinite.clone(),
            "pool": self._pool.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError: not a state, or of another version or configuration; nothing was changed then."""
        _state_checks.same_configuration(state, _VERSION, self._configuration())
        with _state_checks.taken_as_a_whole():
            nonfinite = _state_checks.count(state, "nonfinite")
            # A rehearsal, so that a state that is refused half-way changes nothing here.
            make_pool(self.pool, self.ambiguity, self._ranks, self._memory).load_state_dict(state["pool"])
        self._pool.load_state_dict(state["pool"])
        self._nonfinite = nonfinite if isinstance(nonfinite, int) else nonfinite.clone()

    def _configuration(self) -> dict[str, Any]:
        return {"ambiguity": repr(self.ambiguity), "pool": self.pool, "memory": self._memory or None}

    def __repr__(self) -> str:
        ambiguity = self.ambiguity.in_memory() if self.pool == "memory" else repr(self.ambiguity)
        extra = "" if not self._memory else f", memory={self._memory}"
        return f"{type(self).__name__}({ambiguity}, pool={self.pool!r}{extra})"
