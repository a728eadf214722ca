"""OpenRLHF's own trainers under the adapter, from `fit` to the gradients of every step.

`Engine` plays DeepSpeed's part: what it has to do is scale, accumulate and step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hollow import hollow
from test_openrlhf import HOLLOW, SET, N, T, nest, rewards
from torch import Tensor, nn

with hollow(*HOLLOW):
    from openrlhf.trainer.dpo_trainer import DPOTrainer
    from openrlhf.trainer.rm_trainer import RewardModelTrainer
    from openrlhf.trainer.sft_trainer import SFTTrainer

from robustgrad import Reweighter
from robustgrad.integrations.openrlhf import robustify

WORDS = 12


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
