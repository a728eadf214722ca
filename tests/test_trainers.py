"""Trainers of other libraries, unmodified: one optimizer step follows the hand-written weighted sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("trl")
import tiny
import trl
from datasets import concatenate_datasets
from peft import TaskType
from transformers import Trainer

from robustgrad import ChiSquare, TotalVariation
from robustgrad.integrations import hf_trainer
from robustgrad.integrations.trl import robustify, unrobustify

pytestmark = tiny.OTHERS_WARNINGS
SET = ChiSquare(0.5)
CUTS = pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)], ids=lambda n: str(n))
N = 8


def log_probability(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Of the completion given the prompt: alone, unpadded."""
    ids = torch.tensor([prompt + completion])
    rows = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return rows[torch.arange(len(rows)), ids[0, 1:]][len(prompt) - 1 :].sum()


def reward_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    chosen, rejected = (
        model(input_ids=torch.tensor([row[f"{one}_ids"]])).logits[0, 0] for one in ("chosen", "rejected")
    )
    return F.softplus(rejected - chosen)


def centred_reward_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    chosen, rejected = (
        model(input_ids=torch.tensor([row[f"{one}_ids"]])).logits[0, 0] for one in ("chosen", "rejected")
    )
    return F.softplus(rejected - chosen) + 0.01 * (chosen + rejected) ** 2


def dpo_margin(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    def ratio(name: str) -> Tensor:
        with torch.no_grad():
            old = log_probability(reference, row["prompt_ids"], row[name])
        return log_probability(model, row["prompt_ids"], row[name]) - old

    return 0.1 * (ratio("chosen_ids") - ratio("rejected_ids"))


def dpo_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    return F.softplus(-dpo_margin(model, reference, row))


def hinge_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    return (1 - dpo_margin(model, reference, row)).clamp_min(0)


def kto_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        old = log_probability(reference, row["prompt_ids"], row["completion_ids"])
    ratio = log_probability(model, row["prompt_ids"], row["completion_ids"]) - old
    return torch.sigmoid(-0.1 * ratio) if row["label"] else torch.sigmoid(0.1 * ratio)


def sft_losses(model: nn.Module, reference: nn.Module, row: dict[str, Any]) -> Tensor:
    ids = row["input_ids"]
    return -log_probability(model, ids[:1], ids[1:]) * N / (sum(lengths_of_sentences()) - N)


def lengths_of_sentences() -> list[int]:
    return [len(text.split()) + 1 for text in tiny.sentences()["text"]]  # with the end token


@dataclass(frozen=True)
class Case:
    """One trainer: how to build it, and the loss of one example."""

    trainer: type
    config: type
    losses: Callable[[nn.Module, nn.Module, dict[str, Any]], Tensor]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def task(self) -> TaskType:
        return TaskType.SEQ_CLS if self.trainer is trl.RewardTrainer else TaskType.CAUSAL_LM

    def model(self, seed: int = 0) -> nn.Module:
        return tiny.classifier(seed=seed) if self.task is TaskType.SEQ_CLS else tiny.causal_lm(seed=seed)

    def dataset(self) -> Any:
        by_trainer = {trl.KTOTrainer: tiny.judged, trl.SFTTrainer: tiny.sentences}
        return by_trainer.get(self.trainer, tiny.pairs)()

    def build(self, folder: Path, micro_batch: int = 8, accumulation: int = 1, **changes: Any) -> Trainer:
        more = {"ref_model": self.model(1)} if self.trainer in (trl.DPOTrainer, trl.KTOTrainer) else {}
        for name in (
            "peft_config",
            "model",
            "train_dataset",
            "eval_dataset",
            "data_collator",
            "callbacks",
            "ref_model",
        ):
            if name in changes:
                more[name] = changes.pop(name)
        if "peft_config" in more:
            more.pop("ref_model", None)
        args = self.config(**tiny.arguments(folder, micro_batch, accumulation, **dict(self.options), **changes))
        more = {"model": self.model(), "train_dataset": self.dataset()} | more
        torch.manual_seed(7)
        return self.trainer(args=args, processing_class=tiny.tokenizer(), **more)


REWARD = Case(trl.RewardTrainer, trl.RewardConfig, reward_losses)
DPO = Case(trl.DPOTrainer, trl.DPOConfig, dpo_losses)
KTO = Case(trl.KTOTrainer, trl.KTOConfig, kto_losses, (("loss_type", "apo_zero_unpaired"),))
SFT = Case(trl.SFTTrainer, trl.SFTConfig, sft_losses)
CASES = {
    "reward": REWARD,
    "reward, centred": Case(
        trl.RewardTrainer, trl.RewardConfig, centred_reward_losses, (("center_rewards_coefficient", 0.01),)
    ),
    "dpo": DPO,
    "dpo hinge": Case(trl.DPOTrainer, trl.DPOConfig, hinge_losses, (("loss_type", ["hinge"]),)),
    "kto": KTO,
    "sft": SFT,
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MAIN = pytest.mark.parametrize("case", [REWARD, DPO, KTO, SFT], ids=["reward", "dpo", "kto", "sft"])


def expected(case: Case, trainer: Trainer, ambiguity: Any = SET, losses: Any = None) -> Tensor:
    """sum_i q_i grad loss_i, for the model as it is now, one example at a time."""
    model = trainer.model
    reference = getattr(trainer, "ref_model", None)
    if reference is None:
        reference = copy.deepcopy(case.model(0)) if case.losses in (dpo_losses, hinge_losses, kto_losses) else model
    losses = losses or (lambda row: case.losses(model, reference, row))
    each = torch.stack([losses(row) for row in trainer.train_dataset])
    weights = ambiguity.solve(each).weights
    grads = torch.autograd.grad((weights * each).sum(), tiny.trainable(model))
    return torch.cat([grad.flatten() for grad in grads])


def one_step(trainer: Trainer) -> Tensor:
    gradients = tiny.Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps[0]


@CUTS
@each_case
def test_window_is_exact_for_any_cut(case: Case, micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    trainer = case.build(tmp_path, micro_batch, accumulation)
    want = expected(case, trainer)
    got = one_step(robustify(trainer, SET, pool="window"))
    assert tiny.relative_error(got, want) < 1e-5
    assert tiny.relative_error(expected(case, trainer, ChiSquare(0.0)), want) > 0.1  # not plain averaging


@CUTS
@MAIN
def test_lora(case: Case, micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    trainer = case.build(tmp_path, micro_batch, accumulation, peft_config=tiny.lora(case.task))
    want = expected(case, trainer)
    got = one_step(robustify(trainer, SET, pool="window"))
    assert len(got) < 1000 and tiny.relative_error(got, want) < 1e-5


@MAIN
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 2), (1, 8)], ids=str)
def test_memory_gives_the_same_gradient_for_any_cut(
    case: Case, micro_batch: int, accumulation: int, tmp_path: Path
) -> None:
    """After 64 samples the memory has a rule; then plain averaging ends, at micro-batch 1 as well."""
    data = {"train_dataset": concatenate_datasets([case.dataset()] * 10)}

    def steps(*cut: int) -> list[Tensor]:
        trainer = case.build(tmp_path, *cut, max_steps=10, **data)
        gradients = tiny.Gradients()
        trainer.add_callback(gradients)
        robustify(trainer, SET).train()
        assert trainer.state.log_history[8]["robust/plain"] == 0.0 < trainer.state.log_history[8]["robust/gap"]
        return gradients.steps

    for got, want in zip(steps(micro_batch, accumulation), steps(8, 1), strict=True):
        assert tiny.relative_error(got, want) < 2e-3  # ten steps of float32 apart


def test_batch_pool_warns_at_micro_batch_one(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="plain averaging"):
        one_step(robustify(REWARD.build(tmp_path, 1, 8), SET, pool="batch"))


def test_kto_groups_follow_the_order_of_the_losses(tmp_path: Path) -> None:
    """KTO sorts the losses: desirable first."""
    domain = [i % 2 for i in range(N)]
    trainer = KTO.build(tmp_path, train_dataset=KTO.dataset().add_column("domain", domain))
    reference, rows = trainer.ref_model, list(trainer.train_dataset)
    losses = torch.stack([kto_losses(trainer.model, reference, row) for row in rows])
    ids = torch.tensor([row["domain"] for row in rows])
    means = torch.stack([losses[ids == i].mean() for i in range(2)]).detach()
    weights = SET.solve(means[ids]).weights
    grads = torch.autograd.grad((weights * losses).sum(), tiny.trainable(trainer.model))
    got = one_step(robustify(trainer, SET, pool="window", groups="domain"))
    assert tiny.relative_error(got, torch.cat([grad.flatten() for grad in grads])) < 1e-5


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@MAIN
def test_precision_and_checkpointing(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    options = options | ({"gradient_checkpointing_kwargs": {"use_reentrant": False}} if "bf16" not in options else {})
    trainer = case.build(tmp_path, 2, 4, **options)
    want = expected(case, trainer)
    got = one_step(robustify(trainer, SET, pool="window"))
    assert tiny.relative_error(got, want) < (0.2 if "bf16" in options else 1e-5)


def test_gradients_are_clipped_after_reweighting(tmp_path: Path) -> None:
    got = one_step(robustify(REWARD.build(tmp_path, 2, 4, max_grad_norm=0.5), SET, pool="window"))
    torch.testing.assert_close(got.norm(), torch.tensor(0.5))
    want = one_step(robustify(REWARD.build(tmp_path, 2, 4), SET, pool="window"))
    assert tiny.relative_error(got, 0.5 * want / want.norm()) < 1e-5


@MAIN
@pytest.mark.parametrize("pool", ["memory", "window"])
def test_logged_losses_and_evaluation_stay(case: Case, pool: str, tmp_path: Path) -> None:
    options = {"eval_dataset": case.dataset(), "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"learning_rate": 0.0, "per_device_eval_batch_size": 8}
    histories = []
    for robust in (False, True):
        trainer = case.build(tmp_path, 2, 4, **options)
        if robust:
            robustify(trainer, SET, pool=pool)
        trainer.train()
        histories.append([entry for entry in trainer.state.log_history if "train_runtime" not in entry])
    for plain, robust in zip(*histories, strict=True):
        extra = robust.keys() - plain.keys()
        assert all(key.startswith("robust/") for key in extra) and ("loss" in plain) == bool(extra)
        same = [key for key in plain if key != "grad_norm" and not key.endswith(("runtime", "second"))]
        torch.testing.assert_close([robust[key] for key in same], [plain[key] for key in same], rtol=1e-5, atol=1e-6)


@MAIN
@pytest.mark.parametrize("pool", ["memory", "window"])
def test_resumes_to_the_bit(case: Case, pool: str, tmp_path: Path) -> None:
    """Dropout on; from the middle of an epoch, where the trainer restores its random numbers late."""
    data = concatenate_datasets([case.dataset()] * 10)
    model = {"model": case.model()}
    model["model"].config.attention_dropout = 0.1

    def build(name: str) -> Trainer:
        built = case.model()
        built.config.attention_dropout = 0.1
        for module in built.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 9, "optim": "adamw_torch"}
        return robustify(case.build(tmp_path / name, 4, 2, train_dataset=data, model=built, **options), SET, pool=pool)

    straight, resumed = build("a"), build("b")
    straight.train()
    checkpoint = tmp_path / "a" / "checkpoint-9"
    assert torch.load(checkpoint / "robustgrad.pt", weights_only=True)["configuration"]["pool"] == pool
    assert not list(checkpoint.glob("*.part"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for got, want in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(got, want)
    assert resumed.state.log_history[-2]["robust/value"] == straight.state.log_history[-2]["robust/value"]


def test_resuming_a_plain_run_says_that_the_memory_is_empty(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    REWARD.build(tmp_path, 4, 1, **options).train()
    trainer = robustify(REWARD.build(tmp_path, 4, 1, **options), SET)
    with pytest.warns(UserWarning, match="memory of recent losses starts empty"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_unrobustify_restores_the_trainer(tmp_path: Path) -> None:
    want = one_step(REWARD.build(tmp_path, 2, 4))
    trainer = REWARD.build(tmp_path, 2, 4, train_dataset=tiny.pairs().add_column("domain", [0, 1] * 4))
    before = dict(trainer.__dict__)
    unrobustify(robustify(trainer, SET, pool="window", groups="domain"))
    assert trainer.__dict__.keys() == before.keys() and trainer.data_collator is before["data_collator"]
    torch.testing.assert_close(one_step(trainer), want)
    with pytest.raises(ValueError, match="Call robustify first"):
        unrobustify(trainer)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    trainer = robustify(REWARD.build(tmp_path), SET)
    with pytest.raises(ValueError, match=r"once, got one with Reweighter.*unrobustify"):
        robustify(trainer, SET)
    with pytest.raises(TypeError, match="RobustOptimizer"):
        robustify(nn.Linear(1, 1), SET)
    with pytest.raises(TypeError, match=r"robustgrad\.integrations\.trl"):
        hf_trainer.robustify(REWARD.build(tmp_path), SET)
    with pytest.raises(TypeError, match="ambiguity set"):
        robustify(REWARD.build(tmp_path), 0.1)
    for loss_type, options, found in [
        (["aot"], {}, "aot.*pairwise"),
        (["sft"], {"auxiliary": "keep"}, "one number for the batch"),
        (["sigmoid", "sft"], {}, 'auxiliary="keep"'),
    ]:
        with pytest.raises(ValueError, match=found):
            robustify(DPO.build(tmp_path, loss_type=loss_type), SET, **options)
    with pytest.raises(ValueError, match="packing=False"):
        robustify(SFT.build(tmp_path, packing=True, max_length=8), SET)
    with pytest.raises(ValueError, match=r"pool='window', got 1.*gradient_accumulation_steps"):
        robustify(REWARD.build(tmp_path, 1, 1), SET, pool="window")
    running = REWARD.build(tmp_path)
    running.is_in_train = True
    with pytest.raises(ValueError, match=r"before trainer\.train"):
        robustify(running, SET)
    fused = REWARD.build(tmp_path)
    fused.args.use_liger_kernel = True
    with pytest.raises(ValueError, match="liger_kernel_config"):
        robustify(fused, SET)
    with pytest.raises(ValueError, match="'domain' must be in every example"):
        robustify(REWARD.build(tmp_path), SET, groups="domain").train()


def test_a_trainer_that_does_not_call_compute_loss(tmp_path: Path) -> None:
    trainer = robustify(REWARD.build(tmp_path), SET)
    trainer._robustgrad.original["training_step"] = lambda model, *_: sum(p.sum() for p in model.parameters()).detach()
    with pytest.raises(RuntimeError, match=r"RewardTrainer does not call compute_loss"):
        trainer.train()


def test_dpo_sft_term_keeps_its_own_gradient(tmp_path: Path) -> None:
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    trainer = DPO.build(tmp_path, 2, 4, **options)
    robust, plain = expected(DPO, trainer), expected(DPO, trainer, ChiSquare(0.0))
    term = one_step(DPO.build(tmp_path, 2, 4, **options)) - plain
    got = one_step(robustify(trainer, SET, pool="window", auxiliary="keep"))
    assert tiny.relative_error(got, robust + term) < 1e-5


def test_first_dpo_step_is_plain_where_reference_is_policy(tmp_path: Path) -> None:
    """All losses are log 2, but for the rounding of reference log-probabilities at another batch shape."""
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3, "ref_model": tiny.causal_lm(0)}
    got = one_step(robustify(DPO.build(tmp_path, 2, 4, **options), TotalVariation(0.3), pool="window"))
    assert tiny.relative_error(got, one_step(DPO.build(tmp_path, 2, 4, **options))) < 1e-5
