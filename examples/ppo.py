"""Robust PPO, versions A and B: generate, score, update, with an adversary over the prompts.

    python examples/ppo.py --smoke
    python examples/ppo.py --version A --scaled rewards --kl-inside
    python examples/ppo.py --version B --ambiguity chi2 --radius 0.5 --groups domain

arXiv 2503.00539. The reward is programmatic (`reward` in rollouts.py): courtesy where a domain likes it, brevity
elsewhere. The lines marked `# robustgrad` are what the robust run adds to an ordinary loop.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice

try:
    import torch
    from lora_policy import Policy, Responses
    from policy_run import Adversary, Iterates, RunFiles, both_runs, make_parser, parse
    from reward_model import positive
    from reward_report import Run, make_console
    from rollouts import Prompt, Rollout, collect, load_prompts, mean_rewards, report_rewards
    from torch import Tensor, nn

    from robustgrad import Reweighter
    from robustgrad.objectives import clipped_surrogate, kl_estimate, sequence_mean, sequence_sum, token_log_probs
    from robustgrad.objectives import value_loss as critic_loss
    from robustgrad.robust_ppo import RobustPPO, prompt_ratio, prompt_scores
except ImportError as error:
    raise SystemExit(f'{error}\nInstall what this example needs: pip install "robustgrad[hf,plot]"') from None


def log_probs_and_values(policy: Policy, critic: nn.Module, batch: Responses) -> tuple[Tensor, Tensor]:
    """(n, T - 1) each: of every token but the first, before it was chosen."""
    out = policy.model(input_ids=batch.tokens, attention_mask=batch.attention, output_hidden_states=True)
    # The critic reads the policy's features but does not shape them.
    values = critic(out.hidden_states[-1][:, :-1].detach()).squeeze(-1)
    return token_log_probs(out.logits, batch.tokens), values


class Experience:
    """A rollout with what the update needs to know of it, all fixed."""

    def __init__(
        self, policy: Policy, critic: nn.Module, rollout: Rollout, ppo: RobustPPO, reweighter: Reweighter | None,
        args: argparse.Namespace,
    ) -> None:  # fmt: skip
        mask, rewards = rollout.mask, rollout.rewards
        with torch.no_grad():
            self.log_probs, self.values = log_probs_and_values(policy, critic, rollout.batch)
        with policy.reference():
            kl = kl_estimate(self.log_probs, policy.token_log_probs(rollout.batch), kind="k1")
        self.kl = sequence_sum(kl, mask)
        self.ratio = torch.ones_like(rewards)
        if reweighter is not None:
            inside = {"kl": self.kl, "beta": args.beta} if args.kl_in_score else {}
            scores = prompt_scores(rewards, **inside)
            self.ratio = prompt_ratio(scores, reweighter, groups=rollout.groups)  # robustgrad
        self.advantages, self.returns = ppo.rollout(rewards, args.beta * kl, self.values, mask, self.ratio)
        self.batch, self.mask = rollout.batch, mask

    def losses(self, policy: Policy, critic: nn.Module, ppo: RobustPPO, rows: Tensor) -> Tensor:
        """Policy and critic loss of the given responses, (b,)."""
        batch, mask = Responses(*(part[rows] for part in self.batch)), self.mask[rows]
        log_probs, values = log_probs_and_values(policy, critic, batch)
        surrogate = clipped_surrogate(log_probs, self.log_probs[rows], self.advantages[rows])
        critic_losses = sequence_mean(critic_loss(values, self.values[rows], self.returns[rows]), mask)
        return ppo.losses(surrogate, mask, self.ratio[rows]) + 0.5 * critic_losses  # robustgrad: version B scales here


def train(
    policy: Policy,
    critic: nn.Module,
    prompts: list[Prompt],
    adversary: Adversary,
    args: argparse.Namespace,
    files: RunFiles,
    iterates: Iterates,
) -> Iterator[dict[str, Tensor]]:
    """One rollout and its update for each step."""
    ppo = RobustPPO(args.version, scaled=args.scaled, critic_targets=args.critic_targets, kl_inside=args.kl_inside)
    reweighter = None if adversary.ambiguity is None else Reweighter(adversary.ambiguity)  # robustgrad
    groups = [{"params": policy.parameters}, {"params": critic.parameters(), "lr": 10 * args.lr}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    done = files.start(optimizer=optimizer, reweighter=reweighter, iterates=iterates)
    yield from files.replay()
    for step, asked in islice(enumerate(draw_prompts(prompts, args), start=1), done, args.steps):
        rollout = collect(policy, asked, args.responses, args.new_tokens, args.groups == "domain")
        experience = Experience(policy, critic, rollout, ppo, reweighter, args)
        for _ in range(args.epochs):
            order, total = torch.randperm(len(rollout.rewards)), 0.0
            for rows in order.split(args.micro_batch):
                loss = experience.losses(policy, critic, ppo, rows).sum() / len(order)
                loss.backward()
                total = total + loss.detach()
            torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if reweighter is not None:
            reweighter.step()  # robustgrad
        iterates.after(step)
        log = {"loss": total, "reward": rollout.rewards.mean(), "KL": experience.kl.mean()}
        log["max ratio"] = experience.ratio.max()
        files.after(step, log)
        yield log


def draw_prompts(prompts: list[Prompt], args: argparse.Namespace) -> Iterator[list[Prompt]]:
    rng = random.Random(args.seed)
    while True:
        yield rng.sample(prompts, min(args.prompts, len(prompts)))


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    add, whole = parser.add_argument, positive(int)
    add("--prompts", type=whole, default=8, help="prompts of a rollout (default: %(default)s)")
    add("--responses", type=whole, default=4, help="responses to each (default: %(default)s)")
    add("--new-tokens", type=whole, default=24, help="tokens of a response at most (default: %(default)s)")
    add("--groups", choices=("prompt", "domain"), default="prompt", help="what the adversary shifts")


def options() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "runs/ppo", ("tv", "chi2", "kl", "cvar"), steps=16, lr=1e-4, micro_batch=8)
    add = parser.add_argument
    add_rollout_options(parser)
    add("--version", choices=("A", "B"), default="B", help="scale the advantages or the loss (default: %(default)s)")
    add("--scaled", choices=("whitened", "advantages", "rewards"), default="whitened", help="what version A scales")
    add("--critic-targets", action="store_true", help="version A: the critic learns the scaled returns")
    add("--kl-inside", action="store_true", help="version A with rewards: the KL penalty is scaled too")
    add("--kl-in-score", action="store_true", help="the adversary sees reward - beta KL")
    add("--beta", type=positive(float), default=0.02, help="price of the KL (default: %(default)s)")
    add("--epochs", type=positive(int), default=2, help="updates for each rollout (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = options()
    try:
        args = parse(parser, argv, steps=4, prompts=4, new_tokens=6)
        robust = Adversary.of(args)
        RobustPPO(args.version, scaled=args.scaled, critic_targets=args.critic_targets, kl_inside=args.kl_inside)
        policy = Policy(args.model, args.device, args.seed)
        prompts, evals = load_prompts(policy, args)
    except (ValueError, OSError) as problem:
        parser.exit(2, f"{parser.prog}: error: {problem}\n")
    critic = nn.Linear(policy.embedding.weight.shape[1], 1).to(args.device)
    nn.init.zeros_(critic.weight), nn.init.zeros_(critic.bias)
    console = make_console()
    console.print(
        f"{args.steps} rollouts of {args.prompts} prompts x {args.responses}; version {args.version}, {robust}"
    )
    results = {"reference": mean_rewards(policy, evals, args.new_tokens)}

    def train_with(adversary: Adversary, files: RunFiles, iterates: Iterates) -> Iterator[dict[str, Tensor]]:
        return train(policy, critic, prompts, adversary, args, files, iterates)

    def validate() -> float:
        return -min(mean_rewards(policy, evals[::4], args.new_tokens).values())

    def evaluate(run: Run) -> None:
        results[run.name] = mean_rewards(policy, evals, args.new_tokens)

    extra = list(critic.parameters())
    runs, stopped = both_runs(policy, robust, args, console, train_with, validate, evaluate, extra)
    shares = {name: count / len(prompts) for name, count in Counter(p.domain for p in prompts).items()}
    report_rewards(console, args.out, runs, results, shares)
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
