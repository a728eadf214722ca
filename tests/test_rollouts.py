"""GRPO and RLOO: the whole rollout's advantages are scaled, the adversary picks prompts by minus their reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
import tiny
import trl
from datasets import Dataset

from robustgrad import ChiSquare
from robustgrad.integrations.trl import robustify

pytestmark = tiny.OTHERS_WARNINGS
SET = ChiSquare(0.2)
PROMPTS, GENERATIONS = 4, 2
CUTS = pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)], ids=str)
TRAINERS = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}
each_trainer = pytest.mark.parametrize("kind", TRAINERS)


def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """Words differ in worth, and so do prompts."""
    return [len(prompt) + sum(map(ord, text)) % 17 / 4 for prompt, text in zip(prompts, completions, strict=True)]


def build(kind: str, folder: Path, *cut: int, **changes: Any) -> Any:
    trainer, config = TRAINERS[kind]
    options = {"num_generations": GENERATIONS, "max_completion_length": 5, "beta": 0.0, "temperature": 1.0}
    options |= {"loss_type": "grpo"} if kind == "grpo" else {}
    data = Dataset.from_dict({"prompt": tiny.texts(PROMPTS, 6, 1), "domain": ["a", "b", "a", "b"]})
    more = {name: changes.pop(name) for name in ("eval_dataset", "reward_funcs") if name in changes}
    args = config(**tiny.arguments(folder, *cut, **options, **changes))
    more = {"reward_funcs": reward} | more
    return trainer(model=tiny.causal_lm(), args=args, train_dataset=data, processing_class=tiny.tokenizer(), **more)


def spy(trainer: Any) -> dict[str, Any]:
    """The rollout before robustness, with the rewards and the scaled advantages."""
    seen: dict[str, Any] = {}
    rewards, score = trainer._calculate_rewards, trainer._generate_and_score_completions

    def calculate(*args: Any) -> Tensor:
        seen["rewards"] = rewards(*args)
        return seen["rewards"]

    def generate(inputs: Any) -> dict[str, Any]:
        out = score(inputs)
        seen.update(rollout=dict(out), mode=trainer.model.training)
        return out

    trainer._calculate_rewards, trainer._generate_and_score_completions = calculate, generate
    return seen


def expected(kind: str, trainer: Any, rollout: dict[str, Any], ratio: Tensor) -> Tensor:
    """sum_i ratio_i grad loss_i / n, one completion at a time."""
    model, total = trainer.model, 0.0
    for i, advantage in enumerate(rollout["advantages"]):
        prompt = rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()]
        completion = rollout["completion_ids"][i][rollout["completion_mask"][i].bool()]
        ids = torch.cat((prompt, completion))
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)[torch.arange(len(completion)), completion]
        total = total - ratio[i] * advantage * (logp.mean() if kind == "grpo" else logp.sum()) / len(ratio)
    grads = torch.autograd.grad(total, tiny.trainable(model))
    return torch.cat([grad.flatten() for grad in grads])


@CUTS
@each_trainer
def test_one_step(kind: str, micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    trainer = build(kind, tmp_path, micro_batch, accumulation, learning_rate=0.0)
    seen, gradients = spy(trainer), tiny.Gradients()
    trainer.add_callback(gradients)
    robustify(trainer, SET, pool="window")
    trainer.train()
    risk = -seen["rewards"].sum(-1).reshape(PROMPTS, GENERATIONS).mean(-1)
    ratio = SET.solve(risk).ratio.repeat_interleave(GENERATIONS)
    assert ratio.max() > 1.2
    want = expected(kind, trainer, seen["rollout"], ratio)
    assert tiny.relative_error(gradients.steps[0], want) < 1e-5
    assert trainer.state.log_history[0]["robust/gap"] > 0


@each_trainer
def test_evaluation_is_untouched(kind: str, tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": tiny.texts(PROMPTS, 6, 1)})
    trainer = robustify(build(kind, tmp_path, 8, 1, eval_dataset=data), SET)
    trainer.evaluate()
    assert trainer.reweighter.metrics() == {}


def test_memory_and_resume(tmp_path: Path) -> None:
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 10}
    straight = robustify(build("grpo", tmp_path / "a", 8, 1, **options), SET)
    straight.train()
    assert straight.state.log_history[9]["robust/plain"] == 0.0
    # Trained further to the bit it cannot be, as TRL's own resume is not; but it remembers.
    resumed = robustify(build("grpo", tmp_path / "b", 8, 1, **options), SET)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert resumed.state.log_history[10]["robust/plain"] == 0.0


def test_groups_and_scores(tmp_path: Path) -> None:
    trainer = build("grpo", tmp_path, 8, 1)
    seen = spy(trainer)

    def scores(rows: list[dict[str, Any]]) -> Tensor:
        return torch.tensor([float(row["domain"] == "a") for row in rows])

    robustify(trainer, SET, pool="batch", groups="domain", scores=scores)
    trainer.train()
    before = seen["rollout"]["advantages"]
    after = torch.cat([batch["advantages"] for batch in trainer._buffered_inputs])
    ratio = SET.solve(torch.tensor([1.0, 0.0])).ratio
    allowed = torch.cat((before * ratio[0], before * ratio[1]))
    assert before.abs().sum() > 0 and all((allowed - value).abs().min() < 1e-6 for value in after)


def test_completions_without_a_reward_have_no_say(tmp_path: Path) -> None:
    def some(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float | None]:
        values: list[float | None] = list(reward(prompts, completions))
        return [None, *values[1:]]

    trainer = build("grpo", tmp_path, 8, 1, reward_funcs=some)
    robustify(trainer, SET, pool="batch").train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.state.log_history[0]["robust/gap"] > 0
