"""What a run leaves: the iterate that is kept, its log, and the checkpoint that it goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn


class Iterates:
    """The parameters a run ends with: those of the last step, of the best validation, or an average of steps.

    The average is over the second half of the steps. `validate` gives a number, lower is better; it is asked
    eight times during a run.
    """

    def __init__(self, kind: str, parameters: list[Tensor], steps: int, validate: Callable[[], float]) -> None:
        self.kind, self.parameters, self.steps, self.validate = kind, parameters, steps, validate
        self.kept = [p.detach().clone() for p in parameters]
        self.count, self.best = 0, float("inf")

    def after(self, step: int) -> None:
        if self.kind == "average" and step > self.steps // 2:
            get_swa_multi_avg_fn()(self.kept, [p.detach() for p in self.parameters], torch.tensor(self.count))
            self.count += 1
        asked = step % max(1, self.steps // 8) == 0 or step == self.steps
        if self.kind == "best" and asked and (score := self.validate()) < self.best:
            self.best, self.count = score, step
            self.kept = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def finish(self) -> None:
        if self.kind != "last" and self.count:
            for parameter, kept in zip(self.parameters, self.kept, strict=True):
                parameter.copy_(kept)

    def state_dict(self) -> dict:
        return {"kept": self.kept, "count": self.count, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.kept, self.count, self.best = state["kept"], state["count"], state["best"]


class RunFiles:
    """One run's log, a JSON line for each step, and its checkpoint: everything that `--resume` needs.

    Args:
        parts: what has a `state_dict`, by name.
    """

    def __init__(self, folder: Path, parameters: list[Tensor], every: int, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_path, self.checkpoint = folder / "log.jsonl", folder / "checkpoint.pt"
        self.parameters, self.every, self.resume = parameters, every, resume
        self.parts: dict[str, object] = {}

    def start(self, **parts: object) -> int:
        """Restore the parts and the parameters; returns the step to go on from, 0 for a new run."""
        self.parts = {name: part for name, part in parts.items() if part is not None}
        if not (self.resume and self.checkpoint.exists()):
            self.log_path.write_text("")
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        torch.set_rng_state(state["rng"])
        lines = self.log_path.read_text().splitlines()[: state["step"]]
        self.log_path.write_text("".join(line + "\n" for line in lines))
        return state["step"]

    def replay(self) -> Iterator[dict[str, Tensor]]:
        """The logs of the steps that were made before."""
        for line in self.log_path.read_text().splitlines():
            yield {key: torch.tensor(value) for key, value in json.loads(line).items() if key != "step"}

    def after(self, step: int, log: dict[str, Tensor]) -> None:
        row = {"step": step} | {key: float(value) for key, value in log.items()}
        with self.log_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if step % self.every == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"step": step, "parameters": [p.detach() for p in self.parameters]}
            torch.save(state | {"rng": torch.get_rng_state()}, self.checkpoint)
