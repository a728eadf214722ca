"""GRPO, RLOO, GMPO: the whole rollout's advantages are scaled, the adversary picks prompts by minus their reward."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
import tiny
import trl
from datasets import Dataset
from peft import TaskType
from rollout_trainers import DIVISOR, KINDS, PROMPTS, build, objective, prompt_ratio, reward, spy
from trainer_steps import gradient, steps

from robustgrad import ChiSquare
from robustgrad.integrations.trl import robustify

pytestmark = [*tiny.OTHERS_WARNINGS, pytest.mark.filterwarnings("ignore::UserWarning")]
SET = ChiSquare(0.2)
CUTS = pytest.mark.parametrize("cut", [(8, 1), (2, 4), (1, 8)], ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)


def errors(kind: str, trainer: Any, **terms: Any) -> float:
    """Train one step; how far its gradient is from that of the hand-written objective."""
    seen = spy(trainer)
    got = steps(robustify(trainer, SET, pool="window"))[0]
    total = objective(kind, trainer.model, [seen["rollout"]], prompt_ratio(SET, seen["rewards"]), **terms)
    return tiny.relative_error(got, gradient(total, trainer.model))


@CUTS
@each_kind
def test_one_step(kind: str, cut: tuple[int, int], tmp_path: Path) -> None:
    trainer = build(kind, tmp_path, *cut, learning_rate=0.0)
    assert errors(kind, trainer) < 1e-5
    assert trainer.state.log_history[0]["robust/gap"] > 0


@each_kind
def test_lora(kind: str, tmp_path: Path) -> None:
    trainer = build(kind, tmp_path, 2, 4, learning_rate=0.0, peft_config=tiny.lora(TaskType.CAUSAL_LM))
    assert errors(kind, trainer) < 1e-5


def loss_types() -> set[str]:
    """All that the installed GRPOTrainer knows."""
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    named = re.findall(r"self\.loss_type (?:==|in) (\[[^\]]*\]|\"\w+\")", source)
    return set(re.findall(r'"(\w+)"', " ".join(named)))


def test_every_loss_type_is_checked() -> None:
    assert {"grpo", "dapo"} <= loss_types() <= DIVISOR.keys()


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", sorted(DIVISOR.keys() - {"rloo", "gmpo"}))
def test_loss_types_and_their_kl_term(loss_type: str, beta: float, tmp_path: Path) -> None:
    """The policy loss is reweighted, the term keeps its own weight."""
    if loss_type not in loss_types():
        pytest.skip(f"TRL {trl.__version__} has no loss_type={loss_type!r}")
    needs = {"luspo": {"importance_sampling_level": "sequence"}, "cispo": {"epsilon_high": 5.0}}
    options = {"loss_type": loss_type, "beta": beta} | needs.get(loss_type, {})
    trainer = build("grpo", tmp_path, 8, 1, learning_rate=0.0, **options)
    terms = {"beta": beta, "reference": trainer.ref_model} if beta else {}
    assert errors(loss_type, trainer, **terms) < 1e-5


def test_rloo_has_its_kl_term_in_the_advantages(tmp_path: Path) -> None:
    trainer = build("rloo", tmp_path, 2, 4, learning_rate=0.0, beta=0.3)
    assert errors("rloo", trainer) < 1e-5


def test_a_rollout_for_several_steps_is_generated_once(tmp_path: Path) -> None:
    trainer = build("grpo", tmp_path, 4, 1, max_steps=2, steps_per_generation=2, learning_rate=0.0)
    calls = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: calls.append(len(inputs)) or generate(inputs)
    robustify(trainer, SET, pool="window").train()
    assert calls == [8]


@each_kind
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
