"""Robust natural policy gradient: generate, score, and step along (F + ridge)^-1 g of the worst case.

    python examples/npg.py --smoke
    python examples/npg.py --ambiguity cvar --radius 0.5 --trust 0.02

Algorithm 2 of arXiv 2503.00539: the adversary shifts the prompts to where the policy's value is low, and both the
gradient and the Fisher matrix are the worst case's. Rewards and prompts are those of ppo.py. A Wasserstein
ball has no such step, and the error for it says why. The lines marked `# robustgrad` are what the robust run adds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

try:
    import torch
    from command_line import positive
    from lora_policy import Policy, Responses
    from policy_run import Adversary, Iterates, RunFiles, compare_rewards, make_parser, parse, wrong_use_ends
    from rollouts import Task, add_rollout_options
    from torch import Tensor

    from robustgrad import Reweighter
    from robustgrad.npg import NaturalGradient, natural_gradient, natural_gradient_by_sample
    from robustgrad.objectives import group_advantages
    from robustgrad.robust_ppo import prompt_ratio, prompt_scores
except ImportError as error:
    raise SystemExit(f'{error}\nInstall what this example needs: pip install "robustgrad[hf,plot]"') from None

NO_WASSERSTEIN = (
    "--ambiguity must be tv, chi2, kl or cvar here, got wasserstein. The step is (F + ridge)^-1 g with gradient and "
    "Fisher matrix of the same reweighted responses; a Wasserstein ball shifts inputs and has no weights to give "
    "them. Use ppo.py --ambiguity wasserstein."
)


def train(task: Task, adversary: Adversary, files: RunFiles, iterates: Iterates) -> Iterator[dict[str, Tensor]]:
    """One rollout and one natural step each."""
    policy, args = task.policy, task.args
    reweighter = None
    if adversary.ambiguity is not None:
        reweighter = Reweighter(adversary.ambiguity, pool=args.pool)  # robustgrad
    optimizer = torch.optim.SGD(policy.parameters, lr=1.0)
    done = files.start(reweighter=reweighter, iterates=iterates)
    yield from files.replay()
    for step, rollout in enumerate(task.rollouts(args.responses, done), start=done + 1):
        kl = log_ratios(policy, rollout.batch)
        count, ratio = len(kl), torch.ones_like(kl)
        if reweighter is not None:
            scores = prompt_scores(rollout.rewards, kl, beta=args.beta)
            ratio = prompt_ratio(scores, reweighter, groups=rollout.groups)  # robustgrad
        same_prompt = torch.arange(count, device=kl.device) // args.responses
        advantages = group_advantages(rollout.rewards - args.beta * kl, same_prompt, scale="none")
        natural = direction(policy, rollout.batch, advantages, ratio / count, args)
        step_size = natural.step_size(args.trust, largest=args.lr)
        natural.assign(policy.parameters, step_size)
        optimizer.step()
        optimizer.zero_grad()
        if reweighter is not None:
            reweighter.step()  # robustgrad
        iterates.after(step)
        log = {"loss": -(ratio * rollout.rewards).mean(), "reward": rollout.rewards.mean(), "KL": kl.mean()}
        log |= {"residual": natural.residual, "step size": step_size, "max ratio": ratio.max()}
        files.after(step, log)
        yield log


def direction(
    policy: Policy, batch: Responses, advantages: Tensor, weights: Tensor, args: argparse.Namespace
) -> NaturalGradient:
    """Exactly, from one backward pass for each response; or by conjugate gradient, as a larger batch needs it."""
    if args.iterations is None:
        one_by_one = (policy.log_probs(policy.row(batch, i))[0] for i in range(len(advantages)))
        return natural_gradient_by_sample(one_by_one, advantages, policy.parameters, weights=weights, ridge=args.ridge)
    return natural_gradient(
        policy.log_probs(batch), advantages, policy.parameters,
        weights=weights, ridge=args.ridge, iterations=args.iterations,
    )  # fmt: skip


@torch.no_grad()
def log_ratios(policy: Policy, batch: Responses) -> Tensor:
    """log pi / pi_ref of the responses, (n,): on average over them the KL from the reference."""
    log_probs = policy.log_probs(batch)
    with policy.reference():
        return log_probs - policy.log_probs(batch)


def options() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "runs/npg", steps=10, lr=10.0)
    add = parser.add_argument
    add_rollout_options(parser)
    add("--beta", type=positive(float), default=0.02, help="price of the KL (default: %(default)s)")
    add("--ridge", type=positive(float), default=0.1, help="added to the Fisher matrix (default: %(default)s)")
    add("--iterations", type=positive(int), help="of conjugate gradient (default: solved exactly)")
    add("--trust", type=positive(float), default=0.02, help="KL of a step in nats (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = options()
    with wrong_use_ends(parser):
        args = parse(parser, argv, steps=4, prompts=4, new_tokens=6)
        if args.ambiguity == "wasserstein":
            raise ValueError(NO_WASSERSTEIN)
        robust, task = Adversary.of(args), Task.load(args)

    def train_with(adversary: Adversary, files: RunFiles, iterates: Iterates) -> Iterator[dict[str, Tensor]]:
        return train(task, adversary, files, iterates)

    return compare_rewards(task, robust, train_with, "natural policy gradient")


if __name__ == "__main__":
    sys.exit(main())
