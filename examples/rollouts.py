"""Prompts of several domains, what a policy answers to them, and the reward of its answers."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from command_line import positive
from lora_policy import Ids, Policy, Responses
from preference_pairs import Pair
from reward_model import drawn, load_pairs
from rewards import Reward, add_reward_options, load_reward
from torch import Tensor


class Prompt(NamedTuple):
    number: int  # the same prompt has the same number, which is its group
    text: str
    ids: Ids
    domain: str


class Rollout(NamedTuple):
    """n responses, several to each prompt side by side."""

    prompts: list[Prompt]  # n, of the responses
    batch: Responses
    rewards: Tensor
    groups: Tensor  # number of the prompt, or of the domain

    @property
    def mask(self) -> Tensor:
        """(n, T - 1), as log-probabilities and values are laid out."""
        return self.batch.mask[:, 1:]


class Task(NamedTuple):
    """A policy, prompts to train and to evaluate it on, and the reward of what it answers."""

    policy: Policy
    reward: Reward
    prompts: list[Prompt]
    evals: list[Prompt]
    args: argparse.Namespace

    @classmethod
    def load(cls, args: argparse.Namespace) -> Task:
        """Raises: ValueError or OSError: a model or file that cannot be read."""
        policy = Policy(args.model, args.device, args.seed)
        return cls(policy, load_reward(args), *load_prompts(policy, args), args)

    @property
    def shares(self) -> dict[str, float]:
        """Of the domains among the training prompts."""
        return {name: count / len(self.prompts) for name, count in Counter(p.domain for p in self.prompts).items()}

    def rollouts(self, responses: int | Callable[[list[Prompt]], list[int]], done: int = 0) -> Iterator[Rollout]:
        """One rollout of the current policy whenever asked; the prompts of the first `done` are skipped."""
        rng = random.Random(self.args.seed)
        for step in range(self.args.steps):
            asked = rng.sample(self.prompts, min(self.args.prompts, len(self.prompts)))
            if step >= done:
                counts = responses(asked) if callable(responses) else responses
                yield collect(self.policy, self.reward, asked, counts, self.args)

    def mean_rewards(self, every: int = 1, size: int = 32) -> dict[str, float]:
        """By domain of the evaluation prompts, with a fixed seed: two policies meet the same randomness."""
        totals: Counter[str] = Counter()
        prompts = self.evals[::every]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for start in range(0, len(prompts), size):
                rollout = collect(self.policy, self.reward, prompts[start : start + size], 1, self.args)
                for prompt, value in zip(rollout.prompts, rollout.rewards.tolist(), strict=True):
                    totals[prompt.domain] += value
        return {domain: totals[domain] / count for domain, count in Counter(p.domain for p in prompts).items()}


def load_prompts(policy: Policy, args: argparse.Namespace) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts in the shares of their domains, and the evaluation prompts of all sets together."""
    pairs, evals = load_pairs(args)
    test = [pair for part in drawn(evals, args.eval_pairs, args.seed).values() for pair in part]
    return _numbered(policy, pairs, args.max_length), _numbered(policy, test, args.max_length)


def _numbered(policy: Policy, pairs: Sequence[Pair], max_length: int) -> list[Prompt]:
    texts = list(dict.fromkeys((pair.prompt, pair.domain) for pair in pairs))
    ids = policy.encode([policy.prompt(text) for text, _ in texts])
    prompts = {key: Prompt(i, key[0], ids[i][-max_length:], key[1]) for i, key in enumerate(texts)}
    return [prompts[pair.prompt, pair.domain] for pair in pairs]


def collect(
    policy: Policy, reward: Reward, prompts: Sequence[Prompt], responses: int | list[int], args: argparse.Namespace
) -> Rollout:
    """Sample `responses` to each prompt, one number for all or one for each, and reward them."""
    counts = [responses] * len(prompts) if isinstance(responses, int) else responses
    asked = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    given = policy.generate([prompt.ids for prompt in asked], args.new_tokens)
    domains = [prompt.domain for prompt in asked]
    rewards = reward([prompt.text for prompt in asked], domains, [policy.decode(ids) for ids in given])
    names = sorted(set(domains))
    groups = [names.index(p.domain) if args.groups == "domain" else p.number for p in asked]
    device = policy.model.device
    batch = policy.batch([prompt.ids for prompt in asked], given)
    return Rollout(asked, batch, rewards.to(device), torch.tensor(groups, device=device))


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    add, whole = parser.add_argument, positive(int)
    add("--prompts", type=whole, default=8, help="prompts of a rollout (default: %(default)s)")
    add("--responses", type=whole, default=4, help="responses to each (default: %(default)s)")
    add("--new-tokens", type=whole, default=24, help="tokens of a response at most (default: %(default)s)")
    add("--groups", choices=("prompt", "domain"), default="prompt", help="what the adversary shifts")
    add_reward_options(parser)
