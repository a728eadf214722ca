"""DRO-REBEL: regress the log-ratios of two responses on their difference in reward, plain and robust.

    python examples/rebel.py --smoke
    python examples/rebel.py --data train.jsonl.gz --ambiguity chi2 --radius 0.1
    python examples/rebel.py --online --ambiguity wasserstein

arXiv 2509.19104. Offline: the pairs are given, a preference counts as a difference of 1, and the old policy is the
reference. Online: the current policy answers each prompt twice, both answers are scored, and it is updated; the old
policy is then the one that answered. The lines marked `# robustgrad` are what the robust run adds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

try:
    import torch
    from command_line import positive, settings
    from dpo import leads
    from lora_policy import PairTokens, Policy, encode_pairs, pair_log_probs, with_reference
    from policy_run import (
        Adversary,
        Iterates,
        RunFiles,
        both_runs,
        compare_rewards,
        make_parser,
        parse,
        wrong_use_ends,
    )
    from reward_model import draw_steps, drawn, load_pairs
    from reward_report import Run, make_console, report
    from rollouts import Task, add_rollout_options
    from torch import Tensor

    import robustgrad
    from robustgrad.gradient_penalty import embedding_outputs, wasserstein_loss
    from robustgrad.objectives import rebel
except ImportError as error:
    raise SystemExit(f'{error}\nInstall what this example needs: pip install "robustgrad[hf,plot]"') from None

Batch = list[tuple[PairTokens, float]]  # pairs with the old policy's log-probabilities, and reward differences


def offline(policy: Policy, pairs: list, args: argparse.Namespace) -> Iterator[Batch]:
    used = [pair for step in draw_steps(pairs, args.steps, args.prompts, args.seed) for pair in step]
    encoded = with_reference(policy, encode_pairs(policy, used, args.max_length))
    for start in range(0, len(encoded), args.prompts):
        yield [(pair, 1.0) for pair in encoded[start : start + args.prompts]]


def online(task: Task, done: int = 0) -> Iterator[Batch]:
    """Two answers of the current policy to each prompt, with its own log-probabilities of them."""
    for prompts, batch, rewards, _ in task.rollouts(2, done):
        with torch.no_grad():
            old = task.policy.log_probs(batch).view(-1, 2).tolist()
        gaps = (rewards[::2] - rewards[1::2]).tolist()
        rows = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]
        answers = zip(prompts[::2], rows[::2], rows[1::2], old, gaps, strict=True)
        yield [
            (PairTokens(prompt.ids, one, other, tuple(log_probs)), gap)
            for prompt, one, other, log_probs, gap in answers
        ]


def train(
    policy: Policy,
    batches_from: Callable[[int], Iterable[Batch]],
    adversary: Adversary,
    args: argparse.Namespace,
    files: RunFiles,
    iterates: Iterates,
) -> Iterator[dict[str, Tensor]]:
    """`args.epochs` optimizer steps on each batch, with its log."""
    optimizer = torch.optim.AdamW(policy.parameters, lr=args.lr)
    if adversary.ambiguity is not None:
        optimizer = robustgrad.RobustOptimizer(optimizer, adversary.ambiguity, pool=args.pool)  # robustgrad
    reweighter = getattr(optimizer, "reweighter", None)
    done = files.start(optimizer=optimizer, reweighter=reweighter, iterates=iterates)
    yield from files.replay()
    for step, batch in islice(enumerate(batches_from(done), start=done + 1), args.steps - done):
        for _ in range(args.epochs):
            epoch_losses = []
            for start in range(0, len(batch), args.micro_batch):
                part = batch[start : start + args.micro_batch]
                losses, inputs = rebel_losses(policy, part, args.eta)
                if adversary.ambiguity is not None:
                    optimizer.reweight(losses)  # robustgrad
                loss = wasserstein_loss(losses, inputs, radius=adversary.wasserstein)  # robustgrad (0: the mean)
                (loss * len(part) / len(batch)).backward()
                epoch_losses.append(losses.detach())
            torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        iterates.after(step)
        log = {"loss": torch.cat(epoch_losses).mean()}
        if reweighter is not None:
            metrics = reweighter.metrics()
            log |= {"ess": metrics["ess"], "max ratio": metrics["max_ratio"]}
        files.after(step, log)
        yield log


def rebel_losses(policy: Policy, batch: Batch, eta: float) -> tuple[Tensor, list[Tensor]]:
    pairs, gaps = zip(*batch, strict=True)
    old = torch.tensor([pair.reference for pair in pairs], device=policy.model.device)
    with embedding_outputs(policy.embedding) as inputs:  # robustgrad
        first, second = pair_log_probs(policy, pairs)
    gap = torch.tensor(gaps, device=policy.model.device)
    return rebel(first, second, old[:, 0], old[:, 1], gap, eta=eta), inputs


def options() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "runs/rebel", steps=30, lr=1e-4)
    add_rollout_options(parser)
    add = parser.add_argument
    add("--online", action="store_true", help="generate the responses with the current policy")
    add("--eta", type=positive(float), default=5.0, help="step size of the mirror descent (default: %(default)s)")
    add("--epochs", type=positive(int), default=1, help="updates on each batch (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = options()
    with wrong_use_ends(parser):
        args = parse(parser, argv, steps=4, prompts=8, new_tokens=6)
        robust = Adversary.of(args)
        if args.online:
            return run_online(Task.load(args), robust)
        return run_offline(Policy(args.model, args.device, args.seed), robust, args)


def run_offline(policy: Policy, robust: Adversary, args: argparse.Namespace) -> int:
    pairs, evals = load_pairs(args)
    evals = drawn(evals, args.eval_pairs, args.seed)
    console = make_console()
    console.print(f"{len(pairs)} training pairs, {args.steps} batches of {args.prompts}; {robust}")
    batches = list(offline(policy, pairs, args))
    encoded = {k: with_reference(policy, encode_pairs(policy, v, args.max_length)) for k, v in evals.items()}

    def train_with(adversary: Adversary, files: RunFiles, iterates: Iterates) -> Iterator[dict[str, Tensor]]:
        return train(policy, lambda done: batches[done:], adversary, args, files, iterates)

    def validate() -> float:
        lead = torch.cat([leads(policy, part[::4], 1 / args.eta) for part in encoded.values()])
        return (lead - 1).square().mean().item()

    def evaluate(run: Run) -> None:
        run.leads = {name: leads(policy, part, 1 / args.eta) for name, part in encoded.items()}

    runs, stopped = both_runs(policy, robust, args, console, train_with, validate, evaluate)
    report(console, args.out, runs, pairs, evals, settings(args, robust))
    return 130 if stopped else 0


def run_online(task: Task, robust: Adversary) -> int:
    def train_with(adversary: Adversary, files: RunFiles, iterates: Iterates) -> Iterator[dict[str, Tensor]]:
        return train(task.policy, lambda done: online(task, done), adversary, task.args, files, iterates)

    return compare_rewards(task, robust, train_with, "REBEL, online")


if __name__ == "__main__":
    sys.exit(main())
