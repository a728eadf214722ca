"""Taking a run through its steps: progress, and an end on Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

from reward_report import Run
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor


class Interrupt:
    """Ctrl-C asks for an end after the current step; a second one ends the program at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.ask)

    def ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)


def follow(name: str, logs: Iterator[dict[str, Tensor]], count: int, console: Console, stop: Interrupt) -> Run:
    """Take a run through its steps, with a progress bar or, where there is no terminal, a few lines."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    start, history = time.perf_counter(), []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{name}: training", total=count)
        for log in logs:
            history.append(log)
            progress.advance(task)
            if not console.is_terminal and len(history) in (1, count // 2, count):
                console.print(f"{name}: step {len(history)} of {count}, loss {log['loss'].item():.3f}")
            if stop.asked:
                console.print("Stopped by Ctrl-C: saving and evaluating what there is. Again leaves at once.")
                break
    by_key = {key: [log[key].item() for log in history] for key in history[0]}
    return Run(name, time.perf_counter() - start, by_key)
