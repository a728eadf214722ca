"""Robust DPO: a language model trained twice on the same preference pairs, plain and robust.

    python examples/dpo.py --smoke
    python examples/dpo.py --ambiguity chi2 --radius 0.5 --iterate average
    python examples/dpo.py --data train.jsonl.gz --eval test.jsonl --ambiguity wasserstein
    python examples/dpo.py --baseline gr-dpo --micro-batch 8 --accumulate 1

Algorithm 3 of arXiv 2503.00539 (tv, chi2, kl, cvar) or, with --ambiguity wasserstein, WDPO of arXiv 2502.01930. With
--baseline the second run is one of dpo_baselines.py, over each forward pass. The lines marked `# robustgrad` are what
the robust run adds to an ordinary loop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

try:
    import torch
    from command_line import positive, settings
    from dpo_baselines import NAMES, make_baseline
    from lora_policy import (
        PairTokens,
        Policy,
        all_log_probs,
        encode_pairs,
        pair_log_probs,
        with_reference,
    )
    from lora_scorer import micro_batches
    from policy_run import Adversary, Iterates, RunFiles, both_runs, make_parser, parse, wrong_use_ends
    from reward_model import draw_steps, drawn, load_pairs
    from reward_report import Run, make_console, report
    from torch import Tensor

    import robustgrad
    from robustgrad.gradient_penalty import embedding_outputs, wasserstein_loss
    from robustgrad.objectives import bradley_terry, dpo
except ImportError as error:
    raise SystemExit(f'{error}\nInstall what this example needs: pip install "robustgrad[hf,plot]"') from None


def train(
    policy: Policy,
    steps: list[list[PairTokens]],
    domains: list[str],
    adversary: Adversary,
    args: argparse.Namespace,
    files: RunFiles,
    iterates: Iterates,
) -> Iterator[dict[str, Tensor]]:
    """One optimizer step for each batch, with its log."""
    optimizer = torch.optim.AdamW(policy.parameters, lr=args.lr)
    if adversary.ambiguity is not None:
        optimizer = robustgrad.RobustOptimizer(optimizer, adversary.ambiguity, pool=args.pool)  # robustgrad
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=len(steps))
    reweighter = getattr(optimizer, "reweighter", None)
    baseline = getattr(adversary.baseline, "state", None)
    done = files.start(
        optimizer=optimizer, schedule=schedule, reweighter=reweighter, iterates=iterates, baseline=baseline
    )
    yield from files.replay()
    for step, batch in enumerate(steps[done:], start=done + 1):
        step_losses = []
        for pairs in micro_batches(batch, args.micro_batch):
            reference = torch.tensor([pair.reference for pair in pairs], device=policy.model.device)
            with embedding_outputs(policy.embedding) as inputs:  # robustgrad
                chosen, rejected = pair_log_probs(policy, pairs)
            per_pair = dpo if adversary.baseline is None else adversary.baseline.losses
            losses = per_pair(chosen, rejected, reference[:, 0], reference[:, 1], beta=args.beta)
            if adversary.ambiguity is not None:
                optimizer.reweight(losses)  # robustgrad
            if adversary.baseline is None:
                loss = wasserstein_loss(losses, inputs, radius=adversary.wasserstein)  # robustgrad (0: the mean)
            else:
                groups = torch.tensor([domains.index(pair.domain) for pair in pairs], device=losses.device)
                loss = adversary.baseline.total(losses, groups, inputs)
            (loss * len(pairs) / len(batch)).backward()
            step_losses.append(losses.detach())
        torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        iterates.after(step)
        log = {"loss": torch.cat(step_losses).mean()}
        if adversary.ambiguity is not None:
            metrics = optimizer.reweighter.metrics()
            log |= {"ess": metrics["ess"], "max ratio": metrics["max_ratio"]}
        files.after(step, log)
        yield log


def leads(policy: Policy, pairs: list[PairTokens], beta: float) -> Tensor:
    """Implicit reward of the chosen minus that of the rejected response, (n,)."""
    ratios = all_log_probs(policy, pairs) - torch.tensor([pair.reference for pair in pairs])
    return beta * (ratios[:, 0] - ratios[:, 1])


def options() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "runs/dpo", steps=40, lr=2e-4)
    parser.add_argument("--baseline", choices=NAMES, help="compare plain with this instead of a robust run")
    parser.add_argument("--accumulate", type=positive(int), default=2, help="micro-batches (default: %(default)s)")
    parser.add_argument(
        "--beta", type=positive(float), default=0.1, help="pull to the reference (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = options()
    with wrong_use_ends(parser):
        args = parse(parser, argv, steps=12)
        robust = Adversary.of(args)
        pairs, evals = load_pairs(args)
        if args.baseline is not None:
            robust = Adversary(baseline=make_baseline(args.baseline, [pair.domain for pair in pairs]))
        evals = drawn(evals, args.eval_pairs, args.seed)
        policy = Policy(args.model, args.device, args.seed)
    console = make_console()
    batch_size = args.micro_batch * args.accumulate
    console.print(f"{len(pairs)} training pairs, {args.steps} steps of {batch_size}; {robust}")

    # Both runs start from the reference, so its log-probabilities are taken once.
    used = draw_steps(pairs, args.steps, batch_size, args.seed)
    with console.status("reference log-probabilities"):
        flat = with_reference(policy, encode_pairs(policy, [pair for step in used for pair in step], args.max_length))
        steps = [flat[i : i + batch_size] for i in range(0, len(flat), batch_size)]
        encoded = {k: with_reference(policy, encode_pairs(policy, v, args.max_length)) for k, v in evals.items()}
    validation = [pair for part in encoded.values() for pair in part][::4]

    def train_with(adversary: Adversary, files: RunFiles, iterates: Iterates) -> Iterator[dict[str, Tensor]]:
        return train(policy, steps, sorted({pair.domain for pair in pairs}), adversary, args, files, iterates)

    def validate() -> float:
        lead = leads(policy, validation, args.beta)
        return bradley_terry(lead, torch.zeros_like(lead)).mean().item()

    def evaluate(run: Run) -> None:
        run.leads = {name: leads(policy, part, args.beta) for name, part in encoded.items()}

    runs, stopped = both_runs(policy, robust, args, console, train_with, validate, evaluate)
    report(console, args.out, runs, pairs, evals, settings(args, robust))
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
