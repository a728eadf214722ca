"""Makes a `transformers.Trainer` distributionally robust, without a subclass and without a change to its loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..ambiguity import AmbiguitySet
from ..capture import Capture
from ..reweighter import Reweighter
from . import _checks, _columns, _state
from ._columns import Of
from ._router_loss import keeping_router_loss

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_pt_utils import find_batch_size
except ImportError as error:
    raise ImportError('transformers is missing. Install it with pip install "robustgrad[hf]".') from error

_ATTRIBUTE = "_robustgrad"
_LOGGED = ("value", "mean", "gap", "ess", "max_ratio", "plain")


def robustify(trainer: Trainer, ambiguity: AmbiguitySet, **options: Any) -> Trainer:
    """Make this trainer's gradients follow the worst case over an ambiguity set; returns the trainer.

    The trainer's class, loop, optimizer, logged loss and evaluation stay as they are. The per-sample losses
    are captured behind the loss that it computes (see `robustgrad.capture.Capture`), and the gradient of each
    sample is multiplied by its ratio. `trainer.reweighter` is the Reweighter.

    Args:
        trainer: a `transformers.Trainer` whose loss is an average over the samples or their tokens. For those
            of TRL use `robustgrad.integrations.trl.robustify`.
        ambiguity: the set, e.g. `TotalVariation(0.1)`.
        pool: "memory" (default), "window": exact over the samples of an optimizer step, for one more forward
            pass; "batch": over the samples of a micro-batch only.
        scores, groups: name of a dataset column, or a function of the batch that gives one value per sample:
            what the adversary maximises, if not the loss; ids of domains (text or integers).
        auxiliary: "raise", or "keep" for a model that adds a penalty of its own to the loss. The
            load-balancing loss of a mixture of experts is kept in any case.
        options: the others of `Reweighter`: memory, process_group, survey, on_nonfinite.
    Raises: TypeError or ValueError: the trainer is of another kind, is robust or training already, or set up so
        that no per-sample losses exist, with the remedy.

    `trainer.log_history` gets robust/value, /mean, /gap, /ess, /max_ratio and /plain; each checkpoint folder
    gets a file of its own, and resuming from it goes on to the bit.
    """
    _checks.plain_trainer(trainer)
    if type(trainer).compute_loss is Trainer.compute_loss:
        _checks.loss_outside(trainer)
    return attach(trainer, CapturingTrainer(trainer, ambiguity, **options))


def unrobustify(trainer: Trainer) -> Trainer:
    """Take robustness off the trainer again; returns it as it was."""
    _checks.robust(trainer, _ATTRIBUTE)
    getattr(trainer, _ATTRIBUTE).detach()
    delattr(trainer, _ATTRIBUTE)
    del trainer.reweighter
    return trainer


def attach(trainer: Trainer, robust: RobustTrainer) -> Trainer:
    setattr(trainer, _ATTRIBUTE, robust)
    robust.attach()
    return trainer


class RobustTrainer(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """What every robust trainer has: a reweighter, its state in checkpoints, its metrics in the logs.

    Methods of the instance are replaced by ones that call the original; the class stays what it is.
    """

    patched: tuple[str, ...] = ("log", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler")

    def __init__(self, trainer: Trainer, ambiguity: AmbiguitySet, **options: Any) -> None:
        _checks.ready(trainer, _ATTRIBUTE)
        self.trainer = trainer
        self.new_reweighter: Callable[[], Reweighter] = lambda: Reweighter(ambiguity, **options)
        self.reweighter = self.new_reweighter()
        self.original: dict[str, Any] = {}
        self.calls = 0

    def attach(self) -> None:
        self.original = {name: getattr(self.trainer, name) for name in self.patched}
        for name in self.patched:
            setattr(self.trainer, name, getattr(self, name))
        self.trainer.add_callback(self)
        self._use(self.reweighter)

    def detach(self) -> None:
        for name in self.patched:
            delattr(self.trainer, name)
        self.trainer.remove_callback(self)

    def _use(self, reweighter: Reweighter) -> None:
        reweighter.expects_steps = True
        self.reweighter = self.trainer.reweighter = reweighter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A run from scratch, perhaps with a model made anew by model_init, remembers nothing of another one.
        if state.global_step == 0:
            self._use(self.new_reweighter())
        self.calls = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _checks.fired(self.calls, self.trainer)
        self.calls = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reweighter.step()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Callbacks see the logs too late to add to them.
        if "loss" in logs:
            metrics = self.reweighter.metrics()
            logs.update({f"robust/{name}": float(metrics[name]) for name in _LOGGED if name in metrics})
        self.original["log"](logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.original["_save_optimizer_and_scheduler"](output_dir)
        if self.trainer.args.should_save:
            _state.save(self.reweighter, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.original["_load_optimizer_and_scheduler"](checkpoint)
        if checkpoint is not None:
            self._use(self.new_reweighter())
            _state.load(self.reweighter, checkpoint)


class CapturingTrainer(RobustTrainer):
    """Captures the losses of `compute_loss`."""

    patched = (*RobustTrainer.patched, "training_step", "compute_loss", "get_batch_samples", "_prepare_inputs")

    def __init__(
        self,
        trainer: Trainer,
        ambiguity: AmbiguitySet,
        *,
        scores: Of = None,
        groups: Of = None,
        auxiliary: str = "raise",
        **options: Any,
    ) -> None:
        super().__init__(trainer, ambiguity, **options)
        _checks.more_than_one_sample(trainer.args, self.reweighter.pool)
        self.scores, self.groups, self.auxiliary = scores, groups, auxiliary
        self.window: list[Any] = []
        self.samples: int | None = None
        self.carried: dict[str, Tensor] = {}
        self.training = self.due = False

    def attach(self) -> None:
        super().attach()
        _columns.carry(self.trainer, [self.scores, self.groups])

    def detach(self) -> None:
        super().detach()
        _columns.uncarry(self.trainer)

    def rows(self, inputs: dict[str, Any]) -> int:
        """How many samples a batch holds."""
        return int(find_batch_size(inputs))

    def order(self, inputs: dict[str, Any]) -> Tensor | None:
        """Which sample of the batch each row of the losses belongs to; None where they stay in order."""
        return None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.window, count = self.original["get_batch_samples"](*args, **kwargs)
        self.samples = None if count is None else sum(self.rows(batch) for batch in self.window)
        self.due = self.reweighter.pool == "window"
        return self.window, count

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        # Not where the window is fetched: the trainer may restore its random numbers after that.
        if self.due:
            self._survey(model, num_items_in_batch)
        with self._training():
            return self.original["training_step"](model, inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = self.original["_prepare_inputs"](inputs)
        self.carried = _columns.take(inputs)
        return inputs

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if not self.training:
            return self.original["compute_loss"](model, inputs, return_outputs=return_outputs, **kwargs)
        capture = self.capture(inputs)
        with capture, keeping_router_loss(self.trainer.accelerator.unwrap_model(model), capture):
            out = self.original["compute_loss"](model, inputs, return_outputs=return_outputs, **kwargs)
            capture(out[0] if return_outputs else out)
        self.calls += 1
        return out

    def capture(self, inputs: dict[str, Any]) -> Capture:
        """To be on while the loss of this batch is made."""
        return self.reweighter.capture(
            rows=self.rows(inputs),
            samples=self.samples,
            scores=self._per_row(self.scores, inputs),
            groups=self._per_row(self.groups, inputs),
            auxiliary=self.auxiliary,
        )

    def _per_row(self, of: Of, inputs: dict[str, Any]) -> Tensor | None:
        value, order = _columns.value(of, inputs, self.carried), self.order(inputs)
        return value if value is None or order is None else value[order]

    @contextmanager
    def _training(self) -> Iterator[None]:
        self.training = True
        try:
            yield
        finally:
            self.training = False

    def _survey(self, model: Any, num_items_in_batch: Any) -> None:
        """The losses of all micro-batches of the step, which the trainer fetched already."""
        trainer = self.trainer
        model.train()  # what the survey comes back to; an evaluation may have left another mode
        kept = {name: copy.deepcopy(getattr(trainer, name, None)) for name in ("_metrics", "_total_train_tokens")}
        with self.reweighter.survey(model), self._training(), trainer.accelerator.no_sync(model):
            for batch in self.window:
                inputs = trainer._prepare_inputs(copy.copy(batch))
                with trainer.compute_loss_context_manager():
                    trainer.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        for name, value in kept.items():
            if value is not None:
                setattr(trainer, name, value)
        self.due = False
