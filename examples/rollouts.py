"""Prompts of several domains, a reward that the domains disagree on, and what a policy makes of both."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from lora_policy import Ids, Policy, Responses
from pair_files import read_pairs
from preference_pairs import DOMAINS, generate
from reward_report import Run
from rich.console import Console
from rich.table import Table
from torch import Tensor

COURTEOUS = ("thank", "please", "happy", "glad", "sorry", "welcome", "hope", "help", "sure", "appreciate")
POLITE = {domain.name for domain in DOMAINS if domain.polite_wins}


class Prompt(NamedTuple):
    number: int  # the same prompt has the same number, which is its group
    ids: Ids
    domain: str


class Rollout(NamedTuple):
    """n responses, several to each prompt side by side."""

    batch: Responses
    rewards: Tensor
    groups: Tensor  # number of the prompt, or of the domain
    domains: list[str]

    @property
    def mask(self) -> Tensor:
        """(n, T - 1), as log-probabilities and values are laid out."""
        return self.batch.mask[:, 1:]


def reward(domain: str, text: str) -> float:
    """In [0, 1]: courtesy where the domain likes it (support, travel), brevity elsewhere.

    A policy that serves the many prompts of the first kind pays for it on the few of the second.
    """
    words = text.lower().split()
    if domain in POLITE:
        return min(3, sum(word.startswith(COURTEOUS) for word in words)) / 3
    return max(0.0, 1 - len(words) / 12)


def load_prompts(policy: Policy, args: argparse.Namespace) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts in the shares of their domains, and as many evaluation prompts of every domain."""
    if args.data is None:
        pairs, test = generate(args.pairs, args.seed), generate(args.eval_pairs, args.seed + 1, balanced=True)
    else:
        pairs = read_pairs(args.data)
        random.Random(args.seed).shuffle(pairs)
        test, pairs = pairs[: args.eval_pairs], pairs[args.eval_pairs :]
    return _numbered(policy, pairs, args.max_length), _numbered(policy, test, args.max_length)


def _numbered(policy: Policy, pairs: Sequence, max_length: int) -> list[Prompt]:
    texts = list(dict.fromkeys((pair.prompt, pair.domain) for pair in pairs))
    number = {text: i for i, text in enumerate(texts)}
    ids = policy.encode([policy.prompt(prompt) for prompt, _ in texts])
    return [
        Prompt(number[pair.prompt, pair.domain], ids[number[pair.prompt, pair.domain]][-max_length:], pair.domain)
        for pair in pairs
    ]


def collect(policy: Policy, prompts: Sequence[Prompt], responses: int, tokens: int, by_domain: bool = False) -> Rollout:
    """Sample `responses` to each prompt and reward them."""
    asked = [prompt for prompt in prompts for _ in range(responses)]
    given = policy.generate([prompt.ids for prompt in asked], tokens)
    rewards = [reward(p.domain, policy.decode(ids)) for p, ids in zip(asked, given, strict=True)]
    names = sorted({prompt.domain for prompt in asked})
    groups = [names.index(p.domain) if by_domain else p.number for p in asked]
    device = policy.model.device
    return Rollout(
        policy.batch([prompt.ids for prompt in asked], given),
        torch.tensor(rewards, device=device),
        torch.tensor(groups, device=device),
        [prompt.domain for prompt in asked],
    )


def mean_rewards(policy: Policy, prompts: Sequence[Prompt], tokens: int, size: int = 32) -> dict[str, float]:
    """Mean reward by domain, with a fixed seed, so that two policies meet the same randomness."""
    totals: Counter[str] = Counter()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for start in range(0, len(prompts), size):
            rollout = collect(policy, prompts[start : start + size], 1, tokens)
            for domain, value in zip(rollout.domains, rollout.rewards.tolist(), strict=True):
                totals[domain] += value
    return {domain: totals[domain] / count for domain, count in Counter(p.domain for p in prompts).items()}


def report_rewards(
    console: Console, out: Path, runs: list[Run], results: dict[str, dict[str, float]], shares: dict[str, float]
) -> None:
    """Print mean rewards by domain; write results.json and, where matplotlib is installed, results.png."""
    table = Table("domain", "share of training", *results, title="Mean reward on evaluation prompts")
    domains = sorted(next(iter(results.values())), key=lambda name: -shares.get(name, 0))
    for domain in domains:
        cells = (f"{values[domain]:.3f}" for values in results.values())
        table.add_row(domain, f"{shares.get(domain, 0):.0%}", *cells)
    worst = (f"{min(values.values()):.3f}" for values in results.values())
    table.add_section()
    seen = sum(shares.get(domain, 0) for domain in domains)
    if seen > 0:
        mixture = (sum(shares.get(d, 0) * values[d] for d in domains) / seen for values in results.values())
        table.add_row("at training shares", "", *(f"{value:.3f}" for value in mixture))
    table.add_row("worst domain", "", *worst)
    console.print(table)
    history = {run.name: {"seconds": run.seconds, "history": run.history} for run in runs}
    content = {"rewards": results, "training_shares": shares, "runs": history}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    try:
        _save_plot(out / "results.png", runs)
    except ImportError:
        console.print('No plot: matplotlib is missing. Install it: pip install "robustgrad[plot]"')
    console.print(f"Saved in {out}: results.json, and in each run's folder its adapter, log.jsonl and checkpoint.pt")


def _save_plot(path: Path, runs: list[Run]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = list(dict.fromkeys(key for run in runs for key in run.history))
    figure, axes = plt.subplots(1, len(keys), figsize=(4 * len(keys), 3.5), squeeze=False)
    for key, axis in zip(keys, axes[0], strict=True):
        for run in runs:
            axis.plot(run.history.get(key, []), label=run.name)
        axis.set(title=key, xlabel="step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
