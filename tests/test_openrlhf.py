"""OpenRLHF's own loss modules and advantages under the adapter.

DeepSpeed, Ray, vLLM and FlashAttention, which OpenRLHF imports to run on GPUs, are stood in for where they
are not installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hollow import hollow
from torch import Tensor, nn

if find_spec("openrlhf") is None:
    pytest.skip("needs openrlhf; docs/other_trainers.md has the line that installs it", allow_module_level=True)
HOLLOW = ("deepspeed", "ray", "vllm", "flash_attn", "torchdata", "aiohttp", "pylatexenc")
with hollow(*HOLLOW):
    from openrlhf.models import loss as losses_of
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    from robustgrad import ChiSquare, Reweighter
    from robustgrad.integrations.openrlhf import RobustLoss, robustify

SET = ChiSquare(0.3)
N, T = 8, 5
PARAMETER = torch.linspace(0.2, 0.6, T, requires_grad=True)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rewards(seed: int) -> Tensor:
    return drawn(seed, N, T) @ PARAMETER


def tokens() -> dict[str, Any]:
    old, mask = -drawn(1, N, T).abs(), torch.arange(T) < torch.tensor([1, 5, 3, 4, 2, 5, 5, 1])[:, None]
    return {
        "log_probs": old + PARAMETER * drawn(2, N, T),
        "old_log_probs": old,
        "advantages": drawn(3, N, 1).expand(N, T).contiguous(),
        "action_mask": mask,
    }


def totals(mask: Tensor) -> dict[str, Any]:
    """As the loop gives them: over 4 micro-batches of 2 ranks, for DeepSpeed's division by 4."""
    return {"dp_size": 2, "batch_num_tokens": mask.sum().float() * 2, "global_batch_size": torch.tensor(2.0 * N)}


def policy(**options: Any) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    return losses_of.PolicyLoss(**options), list(tokens().values()), totals(tokens()["action_mask"])


def supervised(**options: Any) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    data = tokens()
    return losses_of.SFTLoss(**options), [data["log_probs"], data["action_mask"]], totals(data["action_mask"])


def critic() -> tuple[nn.Module, list[Any], dict[str, Any]]:
    data = tokens()
    arguments = [data["log_probs"], data["old_log_probs"], drawn(5, N, T), data["action_mask"]]
    return losses_of.ValueLoss(clip_eps=0.2), arguments, totals(data["action_mask"])


def dpo(**options: Any) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    return losses_of.DPOLoss(0.5, **options), [rewards(1), rewards(2), drawn(3, N), drawn(4, N)], {}


CASES = {
    "PairWiseLoss": lambda: (losses_of.PairWiseLoss(), [rewards(1), rewards(2)], {}),
    "PairWiseLoss, margin": lambda: (losses_of.PairWiseLoss(), [rewards(1), rewards(2), drawn(3, N).abs()], {}),
    "LogExpLoss": lambda: (losses_of.LogExpLoss(), [rewards(1), rewards(2)], {}),
    "DPOLoss": dpo,
    "DPOLoss, smoothed": lambda: dpo(label_smoothing=0.1),
    "DPOLoss, ipo": lambda: dpo(ipo=True),
    "PolicyLoss, token": policy,
    "PolicyLoss, sequence": lambda: policy(token_level_loss=False),
    "PolicyLoss, dual clip": lambda: policy(dual_clip=3.0),
    "PolicyLoss, gspo": lambda: policy(policy_loss_type="gspo"),
    "SFTLoss": supervised,
    "SFTLoss, sequence": lambda: supervised(token_level_loss=False),
    "ValueLoss": critic,
}


def scalar(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def weighted(losses: list[Tensor], share: float) -> tuple[Tensor, np.ndarray]:
    ratio, _ = oracle.solve(SET, np.array([float(one.detach()) for one in losses]))
    total = sum(float(r) * one for r, one in zip(ratio, losses, strict=True)) * share
    return torch.autograd.grad(total, PARAMETER, retain_graph=True)[0], ratio


@pytest.mark.parametrize("case", CASES)
def test_loss_is_that_of_openrlhf_with_the_gradient_reweighted(case: str) -> None:
    """Row by row: where totals are given the losses of the rows add up, otherwise they average."""
    loss_fn, arguments, named = CASES[case]()
    alone = [scalar(loss_fn(*(x[i : i + 1] for x in arguments), **named)) for i in range(N)]
    want, ratio = weighted(alone, 1.0 if named else 1 / N)
    out = RobustLoss(loss_fn, Reweighter(SET, pool="batch"))(*arguments, **named)
    got = torch.autograd.grad(scalar(out), PARAMETER, retain_graph=True)[0]
    assert ratio.max() > 1.2
    assert (got - want).norm() <= 1e-5 * want.norm()
    torch.testing.assert_close(out, loss_fn(*arguments, **named), rtol=0, atol=0)


def test_losses_have_the_units_of_a_whole_step() -> None:
    """Whatever the cut, a sample enters the memory with the same loss."""
    seen = []
    for cut in ([0, N], [0, 2, N]):
        loss_fn, arguments, named = supervised()
        robust = RobustLoss(loss_fn, Reweighter(SET))
        for start, end in pairwise(cut):
            robust(*(x[start:end] for x in arguments), **named)
        seen.append(robust.reweighter.state_dict()["pool"]["waiting"]["scores"])
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-6, atol=1e-7)


def nest(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


PROMPTS, ANSWERS = 4, 3


def rollout(estimator: str) -> tuple[RemoteExperienceMaker, list[Experience]]:
    """12 responses to 4 prompts, spread over two micro-batches out of order, with rewards that differ by prompt."""
    maker = RemoteExperienceMaker.__new__(RemoteExperienceMaker)
    advantage = nest(estimator=estimator, gamma=1.0, lambd=0.9, no_std_norm=False)
    reward = nest(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None)
    maker.args = nest(rollout=nest(n_samples_per_prompt=ANSWERS), algo=nest(advantage=advantage), reward=reward)
    maker.strategy, maker.kl_ctl, maker.advantage_estimator = nest(args=maker.args), nest(value=0.1), estimator
    order = torch.randperm(PROMPTS * ANSWERS, generator=torch.Generator().manual_seed(1))
    worth = drawn(6, PROMPTS * ANSWERS) + 2.0 * torch.arange(PROMPTS).repeat_interleave(ANSWERS)

    def part(at: Tensor, seed: int) -> Experience:
        mask = torch.arange(T) < torch.randint(1, T + 1, (len(at), 1), generator=torch.Generator().manual_seed(seed))
        return Experience(index=at.tolist(), rewards=worth[at], action_mask=mask.long(), kl=drawn(seed, len(at), T),
                          values=drawn(seed + 1, len(at), T), info={})  # fmt: skip

    return maker, [part(order[:7], 7), part(order[7:], 9)]


@pytest.mark.parametrize(
    "estimator", ["gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce"]
)
def test_advantages_are_those_of_openrlhf_times_the_ratio_of_the_prompt(estimator: str) -> None:
    maker, plain = rollout(estimator)
    maker.compute_advantages_and_returns(plain)
    maker, robust = rollout(estimator)
    robustify(maker, SET).compute_advantages_and_returns(robust)
    index = torch.tensor([i for one in plain for i in one.index])
    worth = torch.cat([one.rewards for one in plain])[index.argsort()].reshape(PROMPTS, ANSWERS)
    ratio = torch.as_tensor(oracle.solve(SET, -worth.double().mean(-1).numpy())[0])
    assert ratio.max() > 1.2
    for before, after in zip(plain, robust, strict=True):
        own = ratio[torch.tensor(before.index) // ANSWERS].unsqueeze(-1)
        torch.testing.assert_close(after.advantages, (before.advantages * own).float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after.returns, before.returns, rtol=0, atol=0)


def test_a_ppo_trainer_is_robust_through_its_experience_maker() -> None:
    maker, _ = rollout("rloo")
    trainer = nest(experience_maker=maker)
    assert robustify(trainer, SET, pool="memory") is trainer
    for _ in range(8):
        maker.compute_advantages_and_returns(rollout("rloo")[1])
    assert not trainer.reweighter.metrics()["plain"]
    # The prompts of every rollout are new ones; the memory takes in a rollout when the next one comes.
    remembered = trainer.reweighter.state_dict()["pool"]["memory"]["samples"]["groups"]
    assert len(remembered.unique()) == 7 * PROMPTS


@pytest.mark.parametrize(
    ("trainer", "options", "error", "words"),
    [
        (nest(), {}, TypeError, "trainer must be OpenRLHF's"),
        (nest(reweighter="its own"), {}, ValueError, "must be robustified once"),
        (
            nest(loss_fn=losses_of.PairWiseLoss(), strategy=nest()),
            {"pool": "window"},
            ValueError,
            'pool must be "memory" or "batch"',
        ),
    ],
)
def test_what_cannot_be_made_robust(trainer: Any, options: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        robustify(trainer, SET, **options)
