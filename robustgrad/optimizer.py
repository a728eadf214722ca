"""The optimizer wrapper: any `torch.optim.Optimizer`, with a robust gradient."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .ambiguity import AmbiguitySet
from .capture import Capture
from .reweighter import Batch, Reweighter
from .schedule import Schedule
from .token_units import Unit

_HOOK_KINDS = tuple(
    f"_optimizer_{what}_{when}_hooks" for what in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")
)
# Schedule-free optimizers have two modes, and loops look for these methods by name.
_FORWARDED = ("train", "eval")


class RobustOptimizer(torch.optim.Optimizer):
    """An optimizer whose gradients follow the worst case over an ambiguity set.

    Wraps an optimizer *instance* and shares its parameters, groups and state: schedulers, GradScaler,
    Accelerate and checkpoints see one ordinary optimizer. Without `reweight` every step is the wrapped
    optimizer's own, to the bit. `state_dict()` is the wrapped optimizer's too, so checkpoints go in and out
    of it; the robust state is `optimizer.reweighter.state_dict()`.

    Args:
        optimizer: the instance to wrap; it stays reachable as `.optimizer`.
        ambiguity: the set, e.g. `TotalVariation(0.1)`, or a schedule of sets.
        options: those of `Reweighter`: `pool`, `memory`, `process_group`, `survey`, `on_nonfinite`.
    Raises: TypeError: `optimizer` is not an optimizer instance, or wrapped already.

    Example:
        >>> import torch
        >>> from robustgrad import RobustOptimizer, TotalVariation
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = RobustOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), TotalVariation(0.1))
        >>> losses = model(torch.randn(8, 3)).squeeze(-1).square()
        >>> optimizer.reweight(losses).mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    # A wrapped fused optimizer gets unscaled gradients and a skipped step from GradScaler itself.
    _step_supports_amp_scaling = False

    optimizer: torch.optim.Optimizer
    reweighter: Reweighter

    def __init__(self, optimizer: torch.optim.Optimizer, ambiguity: AmbiguitySet | Schedule, **options: Any) -> None:
        # No super().__init__: it would make a second set of groups and state, which goes stale.
        _check_optimizer(optimizer)
        reweighter = Reweighter(ambiguity, **options)
        reweighter.expects_steps = True
        self.__setstate__({"optimizer": optimizer, "reweighter": reweighter})

    def reweight(
        self,
        losses: Tensor,
        *,
        scores: Tensor | None = None,
        groups: Tensor | None = None,
        base: Tensor | None = None,
        mask: Tensor | None = None,
        units: Unit | None = None,
    ) -> Tensor:
        """Attach the worst case to per-sample losses; returns the same tensor. See `Reweighter.__call__`."""
        return self.reweighter(losses, scores=scores, groups=groups, base=base, mask=mask, units=units)

    def capture(self, **arguments: Any) -> Capture:
        """`with optimizer.capture(): loss = loss_fn(batch)` for a loss that is a scalar; see `Capture`."""
        return self.reweighter.capture(**arguments)

    def window(
        self, loss_fn: Callable[[Batch], Tensor], batches: Iterable[Batch], *, model: torch.nn.Module
    ) -> Iterator[Tensor]:
        """The losses of all micro-batches of a step, reweighted exactly over them. See `Reweighter.window`."""
        return self.reweighter.window(loss_fn, batches, model=model)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped optimizer's step, with its arguments and return value; marks the end of a robust step."""
        arguments: tuple[Any, ...] = (self, *args)
        for hook in self._optimizer_step_pre_hooks.values():
            changed = hook(self, arguments, kwargs)
            if changed is not None:
                arguments, kwargs = _new_arguments(hook, changed)
        # Called on the instance: hooks of the wrapped optimizer, global ones and profiling run there, once.
        out = self.optimizer.step(*arguments[1:], **kwargs)
        self.reweighter.step()
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, arguments, kwargs)
        return out

    # Keeps torch from wrapping `step` on the class, which would run every global hook twice.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, unchanged and interchangeable with it."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the wrapped optimizer's kind."""
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.optimizer.load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # Looked up anew each time: load_state_dict and ZeRO replace these objects in the wrapped optimizer.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getstate__(self) -> dict[str, Any]:
        # Only what is the wrapper's own. A scheduler patches `step` on the instance: a copy that took the
        # patch along would step the original. Hooks are left out as torch leaves them out.
        return {"optimizer": self.optimizer, "reweighter": self.reweighter}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # setattr, not __dict__: torch's loading hands over `state` and `param_groups`, which are the inner's.
        for name, value in state.items():
            setattr(self, name, value)
        for kind in _HOOK_KINDS:
            self.__dict__.setdefault(kind, OrderedDict())

    def __getattr__(self, name: str) -> Any:
        # No blanket delegation: handing out `grad_scale` or `_step_supports_amp_scaling` of a fused optimizer
        # makes GradScaler trust a wrapper that does not unscale.
        inner = self.__dict__.get("optimizer")
        there = hasattr(inner, name)
        if there and name in _FORWARDED:
            return getattr(inner, name)
        hint = f": the wrapped {type(inner).__name__} has it, use .optimizer.{name}" if there else ""
        raise AttributeError(f"RobustOptimizer has no attribute {name!r}{hint}.", name=name, obj=self)

    def __repr__(self) -> str:
        return f"RobustOptimizer({self.optimizer!r}, {self.reweighter!r})"


def _check_optimizer(optimizer: object) -> None:
    if isinstance(optimizer, RobustOptimizer):
        raise TypeError(
            "optimizer must not be a RobustOptimizer: it is wrapped already. Wrap optimizer.optimizer for another set."
        )
    if isinstance(optimizer, torch.optim.Optimizer):
        return
    got = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
    raise TypeError(
        f"optimizer must be a torch.optim.Optimizer instance, got {got}. "
        "Build it first: RobustOptimizer(torch.optim.AdamW(model.parameters()), ambiguity)."
    )


def _new_arguments(hook: object, changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(changed, tuple) and len(changed) == 2:
        return changed
    raise RuntimeError(f"a step pre-hook must return None or (args, kwargs), got {changed!r} from {hook!r}.")
