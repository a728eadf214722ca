"""OpenRLHF's own loss modules, trainers and advantages under the adapter.

DeepSpeed, Ray, vLLM and FlashAttention, which OpenRLHF imports to run on GPUs, are stood in for where they
are not installed, and `Engine` below plays DeepSpeed's part: what it has to do is scale, accumulate and step.
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
import torch.nn.functional as F
from hollow import hollow
from torch import Tensor, nn

if find_spec("openrlhf") is None:
    pytest.skip("needs openrlhf; docs/other_trainers.md has the line that installs it", allow_module_level=True)
with hollow("deepspeed", "ray", "vllm", "flash_attn", "torchdata", "aiohttp", "pylatexenc"):
    from openrlhf.models import loss as losses_of
    from openrlhf.trainer.dpo_trainer import DPOTrainer
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.trainer.rm_trainer import RewardModelTrainer
    from openrlhf.trainer.sft_trainer import SFTTrainer

from robustgrad import ChiSquare, Reweighter
from robustgrad.integrations.openrlhf import RobustLoss, robustify

SET = ChiSquare(0.3)
N, T, WORDS = 8, 5, 12
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


class Engine(nn.Module):
    """What DeepSpeed's engine does with a loss: its `step` is called for every micro-batch."""

    def __init__(self, module: nn.Module, accumulation: int) -> None:
        super().__init__()
        self.module, self.accumulation = module, accumulation
        self.micro_steps = self.global_steps = 0
        self.gradients: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what it has not got, its module may have
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self.micro_steps += 1
        if self.micro_steps % self.accumulation == 0:
            self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters()]))
            self.zero_grad()
            self.global_steps += 1


class Actor(nn.Module):
    """OpenRLHF keeps the engine of a language model inside an Actor."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.model = engine

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class RewardModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Embedding(WORDS, 1)
        self.model = nn.Identity()  # a trap: reward models have such a part, and it is no engine

    def forward(self, ids: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
        return (self.value(ids).squeeze(-1) * attention_mask).sum(-1), {}


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(WORDS, WORDS)

    def forward(self, ids: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
        rows = self.logits(ids[:, :-1]).log_softmax(-1)
        return rows.gather(-1, ids[:, 1:, None]).squeeze(-1), {}


def nest(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


class Strategy:
    """DeepspeedStrategy as far as the trainers ask it, for one process."""

    ring_attn_group = None

    def __init__(self, accumulation: int) -> None:
        self.accumulated_gradient, self.saved = accumulation, []
        model = nest(aux_loss_coef=0.0, nll_loss_coef=0.0, margin_loss_enable=False, compute_fp32_loss_enable=False,
                     label_smoothing=0.0, ipo_enable=False)  # fmt: skip
        logger = nest(wandb=nest(key=None), tensorboard_dir=None, logging_steps=1)
        self.args = nest(model=model, ds=nest(packing_samples=False), logger=logger, train=nest(batch_size=N),
                         eval=nest(steps=10**6), ckpt=nest(save_steps=4, path="", max_num=1, max_mem=1))  # fmt: skip

    def is_rank_0(self) -> bool:
        return False

    def print(self, *_: Any) -> None: ...

    def all_reduce(self, logs: Any) -> Any:
        return logs

    def get_grad_norm(self, model: Any) -> float:
        return 0.0

    def backward(self, loss: Tensor, model: Any, optimizer: Any) -> None:
        (model.model if isinstance(model, Actor) else model).backward(loss)

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any) -> None:
        (model.model if isinstance(model, Actor) else model).step()

    def save_ckpt(self, *args: Any) -> None:
        self.saved.append(args[-1])


def texts(seed: int, size: int) -> Tensor:
    return torch.randint(1, WORDS, (size, 1, T), generator=torch.Generator().manual_seed(seed))


def loader(kind: type, size: int) -> Any:
    """12 steps of N samples, in micro-batches."""

    def micro_batch(i: int) -> Any:
        first, second, real = texts(2 * i, N), texts(2 * i + 1, N), torch.ones(N, 1, T, dtype=torch.long)
        if kind is SFTTrainer:
            return [(first[at], real[at], real[at].float()) for at in cuts]
        last = [[0.0] * size if kind is RewardModelTrainer else [1] * size] * len(cuts)
        return [(first[at], real[at], second[at], real[at], more) for at, more in zip(cuts, last, strict=True)]

    cuts = [slice(start, start + size) for start in range(0, N, size)]
    batches = [one for i in range(12) for one in micro_batch(i)]
    return torch.utils.data.DataLoader(batches, batch_size=None)


def build(kind: type, size: int, consumed: int = 0) -> tuple[Any, Engine]:
    torch.manual_seed(0)
    engine = Engine(RewardModel() if kind is RewardModelTrainer else LanguageModel(), N // size)
    model = engine if kind is RewardModelTrainer else Actor(engine)
    more = {"ref_model": Actor(Engine(LanguageModel(), 1)), "beta": 0.5} if kind is DPOTrainer else {}
    scheduler = nest(get_last_lr=lambda: [0.0])
    trainer = kind(
        model=model, strategy=Strategy(N // size), optim=None, train_dataloader=loader(kind, size),
        eval_dataloader=None, scheduler=scheduler, tokenizer=nest(pad_token_id=0), max_epochs=1, **more,
    )  # fmt: skip
    return trainer, engine


def sample_losses(kind: type, trainer: Any, step: int) -> Tensor:
    model, first, second = trainer.model, texts(2 * step, N)[:, 0], texts(2 * step + 1, N)[:, 0]
    if kind is RewardModelTrainer:
        margin = model.module.value(first).sum((1, 2)) - model.module.value(second).sum((1, 2))
        return F.softplus(-margin)

    def log_prob(model: Any, ids: Tensor, start: int = 1) -> Tensor:
        rows = model.model.module.logits.weight.log_softmax(-1)
        return rows[ids[:, start - 1 : -1], ids[:, start:]].sum(-1)

    if kind is SFTTrainer:
        return -log_prob(model, first) / (T - 1)
    margin = log_prob(model, first) - log_prob(model, second)
    fixed = log_prob(trainer.ref_model, first) - log_prob(trainer.ref_model, second)
    return F.softplus(-0.5 * (margin - fixed.detach()))


each_trainer = pytest.mark.parametrize("kind", [RewardModelTrainer, DPOTrainer, SFTTrainer], ids=lambda k: k.__name__)


@pytest.mark.parametrize("size", [8, 2, 1])
@each_trainer
def test_every_step_of_a_trainer_follows_the_memory(kind: type, size: int) -> None:
    """12 steps; the reference has its own Reweighter, told of whole steps."""
    trainer, engine = build(kind, size)
    robustify(trainer, SET).fit(trainer.args)
    reference = Reweighter(SET)
    assert len(engine.gradients) == 12
    for step, got in enumerate(engine.gradients):
        losses = sample_losses(kind, trainer, step)
        ratio = reference.ratio(losses.detach())
        reference.step()
        want = torch.autograd.grad((ratio * losses).sum() / N, list(engine.parameters()))
        torch.testing.assert_close(got, torch.cat([one.flatten() for one in want]), rtol=1e-4, atol=1e-6)
    assert ratio.max() > 1.2 and not reference.metrics()["plain"]


@each_trainer
def test_checkpoints_carry_the_memory_and_logs_the_metrics(kind: type) -> None:
    trainer, _ = build(kind, 2)
    robustify(trainer, SET)
    seen: list[dict[str, float]] = []
    save = trainer.save_logs_and_checkpoints.__self__.save
    trainer.save_logs_and_checkpoints.__self__.save = lambda *args: (seen.append(args[3]), save(*args))
    trainer.fit(trainer.args)
    states = trainer.strategy.saved
    assert len(seen) == 12 and seen[-1]["robust/gap"] > 0 and seen[0]["robust/plain"] == 1.0
    assert [sorted(state) for state in states] == [["consumed_samples", "robustgrad"]] * 3
    resumed = robustify(build(kind, 2)[0], SET)
    resumed.reweighter.load_state_dict(states[-1]["robustgrad"])
    for name, value in trainer.reweighter.metrics().items():
        assert torch.equal(resumed.reweighter.metrics()[name], value), name


def test_evaluation_is_untouched() -> None:
    trainer, _ = build(RewardModelTrainer, 8)
    robustify(trainer, SET)
    with torch.no_grad():
        trainer.loss_fn(rewards(1), rewards(2))
    assert trainer.reweighter.metrics() == {}


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
        (build(RewardModelTrainer, 8)[0], {"pool": "window"}, ValueError, 'pool must be "memory" or "batch"'),
    ],
)
def test_what_cannot_be_made_robust(trainer: Any, options: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        robustify(trainer, SET, **options)
