"""All micro-batches of one optimizer step compete: surveyed first without gradient, then weighted exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .pool import SolvedPool
from .samples import Samples

_SAME = 1e-6  # relative difference of losses that are the same but for rounding
_OTHER = 1e-3  # and of losses that cannot be


class WindowPool(SolvedPool):
    """The samples of one optimizer step, over all its calls and all ranks, compete among themselves.

    Exact for the step, at the cost of a second forward pass: `begin`, then the calls of the survey, `end`;
    after that each call gets its part of the answer, in the same order.
    """

    _surveyed: list[Samples] | None = None  # while the survey lasts
    _queue: list[Samples] | None = None  # with their ratios, those that have not come again yet

    @property
    def surveying(self) -> bool:
        return self._surveyed is not None

    def begin(self) -> None:
        _check_used_up(self._queue, self.surveying)
        if self._step:
            self.schedule.advance()
        self._surveyed, self._queue, self._step, self._marked = [], None, [], False

    def end(self) -> None:
        calls, self._surveyed = self._surveyed or [], None
        _check_has_calls(calls)
        parts = torch.split(self._solved(Samples.join(calls)), [len(call.scores) for call in calls])
        self._queue = [call._replace(ratio=part) for call, part in zip(calls, parts, strict=True)]

    def abandon(self) -> None:
        """The survey failed half-way."""
        self._surveyed = self._queue = None

    def ratio(self, samples: Samples) -> Tensor:
        if self._surveyed is None:
            return super().ratio(samples)
        self._surveyed.append(samples)
        return torch.ones_like(samples.scores)

    def check(self, samples: Samples) -> None:
        _check_surveyed_call(self._queue, len(samples.scores))
        if self._queue and samples.scores.is_cpu:  # elsewhere looking would wait for the device
            _check_surveyed_order(_comes_later(samples, self._queue))

    def _ratio(self, samples: Samples) -> Tensor:
        assert self._queue is not None  # check has seen it
        surveyed = self._queue.pop(0)
        assert surveyed.ratio is not None
        # Finite in the survey, where no mask was drawn, is not yet finite now.
        return torch.where(samples.bad, torch.nan, surveyed.ratio)

    def _overdue(self) -> bool:
        return False  # the next survey begins a step


def _comes_later(samples: Samples, queue: list[Samples]) -> bool:
    """Whether these are, but for rounding, the losses of another surveyed call and not of the next one."""
    if len(samples.scores) == 0:
        return False
    same_size = [call.scores for call in queue if len(call.scores) == len(samples.scores)]
    scale = samples.scores.abs().amax().clamp_min(1.0)
    apart = (torch.stack(same_size) - samples.scores).abs().amax(-1) / scale
    return bool((apart[0] > _OTHER) & (apart[1:] < _SAME).any())


@contextmanager
def survey(pool: WindowPool, model: nn.Module, mode: str) -> Iterator[None]:
    """Calls inside only record, without gradient; mode "eval" or "train", see `Reweighter`."""
    pool.begin()
    try:
        with torch.no_grad(), (_evaluation if mode == "eval" else _replay)(model):
            yield
    except BaseException:
        pool.abandon()
        raise
    pool.end()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _replay(model: nn.Module) -> Iterator[None]:
    """What is drawn and counted inside is drawn and counted once more afterwards, from the same start."""
    devices = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    counted = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    before = [buffer.clone() for module in counted for buffer in module.buffers(recurse=False)]
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for buffer, old in zip((b for m in counted for b in m.buffers(recurse=False)), before, strict=True):
                buffer.copy_(old)


def _check_used_up(queue: list[Samples] | None, surveying: bool) -> None:
    if surveying:
        raise RuntimeError("a survey must end before the next begins, got one inside another. Survey once a step.")
    if queue:
        raise RuntimeError(
            f"every surveyed call must come again, got {len(queue)} that did not. Run the second pass over all "
            "micro-batches of the survey before the next one."
        )


def _check_has_calls(calls: list[Samples]) -> None:
    if not calls:
        raise RuntimeError(
            "a survey must see the samples of the step, got no call. Call the reweighter inside, under no_grad too."
        )


def _check_surveyed_call(queue: list[Samples] | None, n: int) -> None:
    if not queue:
        raise RuntimeError(
            f"a call must have been surveyed, got {n} losses that were not. Survey all micro-batches of the step "
            "first: for loss in optimizer.window(loss_fn, micro_batches, model=model)."
        )
    due = len(queue[0].scores)
    if due != n:
        raise RuntimeError(
            f"calls must come in the order of the survey, got {n} losses where {due} are due. Run both passes over "
            "the same list of micro-batches."
        )


def _check_surveyed_order(comes_later: bool) -> None:
    if comes_later:
        raise RuntimeError(
            "calls must come in the order of the survey, got the losses of a call that is due later. Run both "
            "passes over the same list of micro-batches."
        )
