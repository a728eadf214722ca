"""Robust natural policy gradient: generate, score, and step along (F + ridge)^-1 g of the worst case.

    python examples/npg.py --smoke
    python examples/npg.py --ambiguity cvar --radius 0.5 --trust 0.02

Algorithm 2 of arXiv 2503.00539: the adversary shifts the prompts to where the policy's value is low, and both the
gradient and the Fisher matrix are the worst case's. Reward and prompts are those of ppo.py. The lines marked
`# robustgrad` are what the robust run adds.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice

try:
    import torch
    from lora_policy import Policy
    from policy_run import Adversary, Iterates, RunFiles, both_runs, make_parser, parse
    from ppo import add_rollout_options, draw_prompts
    from reward_model import positive
    from reward_report import Run, make_console
    from rollouts import Prompt, collect, load_prompts, mean_rewards, report_rewards
    from torch import Tensor

    from robustgrad import Reweighter
    from robustgrad.npg import natural_gradient
    from robustgrad.objectives import group_advantages
    from robustgrad.robust_ppo import prompt_ratio, prompt_scores
except ImportError as error:
    raise SystemExit(f'{error}\nInstall what this example needs: pip install "robustgrad[hf,plot]"') from None


def train(
    policy: Policy,
    prompts: list[Prompt],
    adversary: Adversary,
    args: argparse.Namespace,
    files: RunFiles,
    iterates: Iterates,
) -> Iterator[dict[str, Tensor]]:
    """One rollout and one natural step each."""
    reweighter = None if adversary.ambiguity is None else Reweighter(adversary.ambiguity)  # robustgrad
    optimizer = torch.optim.SGD(policy.parameters, lr=1.0)
    done = files.start(reweighter=reweighter, iterates=iterates)
    yield from files.replay()
    for step, asked in islice(enumerate(draw_prompts(prompts, args), start=1), done, args.steps):
        rollout = collect(policy, asked, args.responses, args.new_tokens, args.groups == "domain")
        log_probs = policy.log_probs(rollout.batch)
        with policy.reference():
            kl = log_probs.detach() - policy.log_probs(rollout.batch)
        count, ratio = len(kl), torch.ones_like(kl)
        if reweighter is not None:
            scores = prompt_scores(rollout.rewards, kl, beta=args.beta)
            ratio = prompt_ratio(scores, reweighter, groups=rollout.groups)  # robustgrad
        same_prompt = torch.arange(count, device=kl.device) // args.responses
        advantages = group_advantages(rollout.rewards - args.beta * kl, same_prompt, scale="none")
        natural = natural_gradient(
            log_probs, advantages, policy.parameters,
            weights=ratio / count, ridge=args.ridge, iterations=args.iterations,
        )  # fmt: skip
        step_size = natural.step_size(args.trust, largest=args.lr)
        natural.assign(policy.parameters, step_size)
        optimizer.step()
        optimizer.zero_grad()
        if reweighter is not None:
            reweighter.step()  # robustgrad
        iterates.after(step)
        log = {"loss": -(ratio * advantages).mean(), "reward": rollout.rewards.mean(), "KL": kl.mean()}
        log |= {"residual": natural.residual, "step size": step_size, "max ratio": ratio.max()}
        files.after(step, log)
        yield log


def options() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "runs/npg", ("tv", "chi2", "kl", "cvar"), steps=10, lr=10.0)
    add = parser.add_argument
    add_rollout_options(parser)
    add("--beta", type=positive(float), default=0.02, help="price of the KL (default: %(default)s)")
    add("--ridge", type=positive(float), default=0.1, help="added to the Fisher matrix (default: %(default)s)")
    add("--iterations", type=positive(int), default=6, help="of conjugate gradient (default: %(default)s)")
    add("--trust", type=positive(float), default=0.02, help="KL of a step in nats (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = options()
    try:
        args = parse(parser, argv, steps=4, prompts=4, new_tokens=6)
        robust = Adversary.of(args)
        policy = Policy(args.model, args.device, args.seed)
        prompts, evals = load_prompts(policy, args)
    except (ValueError, OSError) as problem:
        parser.exit(2, f"{parser.prog}: error: {problem}\n")
    console = make_console()
    console.print(f"{args.steps} natural steps, {args.prompts} prompts x {args.responses} responses each; {robust}")
    results = {"reference": mean_rewards(policy, evals, args.new_tokens)}

    def train_with(adversary: Adversary, files: RunFiles, iterates: Iterates) -> Iterator[dict[str, Tensor]]:
        return train(policy, prompts, adversary, args, files, iterates)

    def validate() -> float:
        return -min(mean_rewards(policy, evals[::4], args.new_tokens).values())

    def evaluate(run: Run) -> None:
        results[run.name] = mean_rewards(policy, evals, args.new_tokens)

    runs, stopped = both_runs(policy, robust, args, console, train_with, validate, evaluate)
    shares = {name: count / len(prompts) for name, count in Counter(p.domain for p in prompts).items()}
    report_rewards(console, args.out, runs, results, shares)
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
