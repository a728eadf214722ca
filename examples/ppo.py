"""Robust PPO, versions A and B: generate, score, update, with an adversary over the prompts.

    python examples/ppo.py --smoke
    python examples/ppo.py --version A --scaled rewards --kl-inside
    python examples/ppo.py --version B --ambiguity chi2 --radius 0.5 --groups domain
    python examples/ppo.py --ambiguity wasserstein --radius 0.02

    python examples/reward_model.py --data pairs.jsonl.gz
    python examples/ppo.py --data pairs.jsonl.gz --reward-model runs/reward_model/robust

arXiv 2503.00539. The reward is a rule (`rule` in rewards.py: courtesy where a domain likes it, brevity elsewhere), or
with --reward-model the score of the adapters that reward_model.py saved, or of any classifier of sequences. With
--ambiguity wasserstein the adversary shifts the embeddings of prompts and responses instead: the policy loss gets the
gradient penalty that arXiv 2509.19104 puts on REBEL's; advantages and old log-probabilities stay what they are. The
lines marked `# robustgrad` are what the robust run adds to an ordinary loop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

try:
    import torch
    from command_line import positive
    from difficulty_gdro import DifficultyGDRO, OnDifficulty
    from difficulty_rollouts import DifficultyRollouts
    from lora_policy import Policy, Responses
    from policy_run import Adversary, Iterates, RunFiles, compare_rewards, make_parser, parse, wrong_use_ends
    from rollouts import Rollout, Task, add_rollout_options
    from torch import Tensor, nn

    from robustgrad import Reweighter
    from robustgrad.gradient_penalty import embedding_outputs, wasserstein_loss
    from robustgrad.objectives import clipped_surrogate, kl_estimate, sequence_mean, sequence_sum, token_log_probs
    from robustgrad.objectives import value_loss as critic_loss
    from robustgrad.robust_ppo import RobustPPO, prompt_scores
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
        self,
        policy: Policy,
        critic: nn.Module,
        rollout: Rollout,
        ppo: RobustPPO,
        reweighter: Reweighter | OnDifficulty | None,
        args: argparse.Namespace,
    ) -> None:
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
            self.ratio = reweighter.ratio(scores, groups=rollout.groups)  # robustgrad
        self.advantages, self.returns = ppo.rollout(rewards, args.beta * kl, self.values, mask, self.ratio)
        self.batch, self.mask = rollout.batch, mask

    def losses(self, policy: Policy, critic: nn.Module, ppo: RobustPPO, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Policy and critic loss of the given responses, (b,), and the embeddings that the former depends on."""
        batch, mask = Responses(*(part[rows] for part in self.batch)), self.mask[rows]
        with embedding_outputs(policy.embedding) as inputs:  # robustgrad
            log_probs, values = log_probs_and_values(policy, critic, batch)
        surrogate = clipped_surrogate(log_probs, self.log_probs[rows], self.advantages[rows])
        critic_losses = sequence_mean(critic_loss(values, self.values[rows], self.returns[rows]), mask)
        policy_losses = ppo.losses(surrogate, mask, self.ratio[rows])  # robustgrad: version B scales here
        return policy_losses + 0.5 * critic_losses, inputs


def train(
    task: Task, critic: nn.Module, adversary: Adversary, files: RunFiles, iterates: Iterates
) -> Iterator[dict[str, Tensor]]:
    """One rollout and its update for each step."""
    policy, args = task.policy, task.args
    ppo = RobustPPO(args.version, scaled=args.scaled, critic_targets=args.critic_targets, kl_inside=args.kl_inside)
    reweighter = adversary.baseline
    if adversary.ambiguity is not None:
        reweighter = Reweighter(adversary.ambiguity, pool=args.pool)  # robustgrad
    groups = [{"params": policy.parameters}, {"params": critic.parameters(), "lr": 10 * args.lr}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    done = files.start(optimizer=optimizer, reweighter=reweighter, iterates=iterates)
    yield from files.replay()
    responses = reweighter.responses if isinstance(reweighter, DifficultyRollouts) else args.responses
    for step, rollout in enumerate(task.rollouts(responses, done), start=done + 1):
        experience = Experience(policy, critic, rollout, ppo, reweighter, args)
        for _ in range(args.epochs):
            order, total = torch.randperm(len(rollout.rewards)), 0.0
            for rows in order.split(args.micro_batch):
                losses, inputs = experience.losses(policy, critic, ppo, rows)
                loss = wasserstein_loss(losses, inputs, radius=adversary.wasserstein)  # robustgrad (0: the mean)
                loss = loss * len(rows) / len(order)
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


def options() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "runs/ppo", steps=16, lr=1e-4, micro_batch=8)
    add = parser.add_argument
    add_rollout_options(parser)
    add("--version", choices=("A", "B"), default="B", help="scale the advantages or the loss (default: %(default)s)")
    add("--scaled", choices=("whitened", "advantages", "rewards"), default="whitened", help="what version A scales")
    add("--critic-targets", action="store_true", help="version A: the critic learns the scaled returns")
    add("--kl-inside", action="store_true", help="version A with rewards: the KL penalty is scaled too")
    add("--kl-in-score", action="store_true", help="the adversary sees reward - beta KL")
    add("--beta", type=positive(float), default=0.02, help="price of the KL (default: %(default)s)")
    gdro = parser.add_mutually_exclusive_group().add_argument
    gdro("--prompt-gdro", action="store_true", help="compare plain with Prompt-GDRO instead of a robust run")
    gdro("--rollout-gdro", action="store_true", help="or with Rollout-GDRO: --responses on average")
    add("--solved", type=float, default=0.5, help="reward that solves a prompt, for them (default: %(default)s)")
    add("--epochs", type=positive(int), default=2, help="updates for each rollout (default: %(default)s)")
    return parser


def check_switches(args: argparse.Namespace) -> None:
    """Raises: ValueError: one that would change nothing."""
    RobustPPO(args.version, scaled=args.scaled, critic_targets=args.critic_targets, kl_inside=args.kl_inside)
    gdro = args.prompt_gdro or args.rollout_gdro
    over_prompts = args.version == "A" or args.kl_in_score or args.groups == "domain" or gdro
    if args.ambiguity == "wasserstein" and over_prompts:
        raise ValueError(
            "--version A, --kl-in-score, --groups domain, --prompt-gdro and --rollout-gdro must come with another "
            "--ambiguity, got wasserstein. It shifts embeddings and gives no prompt a ratio: leave them out."
        )
    if args.rollout_gdro and args.groups == "domain":
        raise ValueError("--rollout-gdro must come with --groups prompt, got domain. It bins prompts: leave it out.")


def robust_run(args: argparse.Namespace) -> Adversary:
    """What is compared with plain."""
    if args.prompt_gdro:
        return Adversary(baseline=DifficultyGDRO(args.solved))
    return (
        Adversary(baseline=DifficultyRollouts(args.solved, args.responses)) if args.rollout_gdro else Adversary.of(args)
    )


def main(argv: list[str] | None = None) -> int:
    parser = options()
    with wrong_use_ends(parser):
        args = parse(parser, argv, steps=4, prompts=4, new_tokens=6)
        robust = robust_run(args)
        check_switches(args)
        task = Task.load(args)
    critic = nn.Linear(task.policy.embedding.weight.shape[1], 1).to(args.device)
    nn.init.zeros_(critic.weight), nn.init.zeros_(critic.bias)

    def train_with(adversary: Adversary, files: RunFiles, iterates: Iterates) -> Iterator[dict[str, Tensor]]:
        return train(task, critic, adversary, files, iterates)

    return compare_rewards(task, robust, train_with, f"PPO, version {args.version}", list(critic.parameters()))


if __name__ == "__main__":
    sys.exit(main())
