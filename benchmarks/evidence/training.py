"""One method on one task, all seeds side by side, and the three iterates that come out of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustgrad.objectives import bradley_terry

from . import heads
from .features import Features
from .heads import Parameters
from .methods import Batch, Driven, Make, Method
from .tasks import Task, order_of_steps

_LOOKS = 10  # at the validation set


def trained(task: Task, make: Make, capacity: str, seeds: Sequence[int], steps: int) -> dict[str, Parameters]:
    """As `fit`, with the method that `make` gives for each seed."""
    return fit(task, [make(task.counts(seed)) for seed in seeds], capacity, seeds, steps)


def fit(
    task: Task, methods: Sequence[Method], capacity: str, seeds: Sequence[int], steps: int
) -> dict[str, Parameters]:
    """The last iterate, the best of ten by loss on the validation set, and the average over the second half.

    Batches, start and learning rate are the same for every method.
    """
    parameters = [p.requires_grad_() for p in heads.initial(capacity, task.pool.chosen.shape[1], seeds)]
    optimizer = torch.optim.AdamW(parameters, lr=heads.LEARNING_RATE[capacity])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    place = [order_of_steps(len(task.index[seed]), steps, seed) for seed in seeds]
    kept = _Kept(parameters, [task.validation[seed] for seed in seeds])
    for t in range(steps):
        rows = torch.stack([task.index[s][own[t]] for s, own in zip(seeds, place, strict=True)])
        swapped = torch.stack([task.swapped[s][own[t]] for s, own in zip(seeds, place, strict=True)])
        lead = torch.where(swapped, -1.0, 1.0) * heads.leads(parameters, task.pool.at(rows))
        torch.stack(_objectives(methods, lead, task, rows)).sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        kept.see(parameters, t + 1, steps)
        kept.tell(methods)
    return {"last": [p.detach() for p in parameters], "best": kept.best, "average": kept.average}


def _objectives(methods: list, lead: Tensor, task: Task, rows: Tensor) -> list[Tensor]:
    losses = bradley_terry(lead.flatten(), torch.zeros(lead.numel())).reshape(lead.shape)
    parts = zip(lead.unbind(0), losses.unbind(0), task.domains[rows], task.membership[rows], strict=True)
    return [method(Batch(*part)) for method, part in zip(methods, parts, strict=True)]


class _Kept:
    """The best iterate of each seed so far, and the running average."""

    def __init__(self, start: Parameters, validation: list[Features]) -> None:
        self.validation = together(validation)
        self.best = [p.detach().clone() for p in start]
        self.average = [torch.zeros_like(p) for p in start]
        self.lowest = torch.full((len(start[0]),), torch.inf)
        self.news: list[float] = []  # validation losses that no method has heard of

    @torch.no_grad()
    def see(self, parameters: Parameters, step: int, steps: int) -> None:
        if 2 * step > steps:
            for mean, own in zip(self.average, parameters, strict=True):
                mean += own / (steps - steps // 2)
        if step % max(1, steps // _LOOKS) and step != steps:
            return
        loss = losses_of(parameters, self.validation).mean(-1)
        self.news = loss.tolist()
        better = loss < self.lowest
        self.lowest = torch.where(better, loss, self.lowest)
        for best, own in zip(self.best, parameters, strict=True):
            best[better] = own[better]

    def tell(self, methods: Sequence[Method]) -> None:
        """Those that validation drives, once for each look."""
        for method, loss in zip(methods, self.news, strict=False):
            if isinstance(method, Driven):
                method.observe(loss)
        self.news = []


def losses_of(parameters: Parameters, pairs: Features) -> Tensor:
    """(s, n), for pairs (n, d) or (s, n, d)."""
    lead = heads.leads(parameters, pairs)
    return bradley_terry(lead.flatten(), torch.zeros(lead.numel())).reshape(lead.shape)


def together(parts: Sequence[Features]) -> Features:
    """(s, n, d)."""
    return Features(*(torch.stack(own) for own in zip(*map(_parts, parts), strict=True)))


def _parts(features: Features) -> tuple[Tensor, Tensor, Tensor]:
    return features.prompt, features.chosen, features.rejected
