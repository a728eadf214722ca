"""Trainers of other libraries, unmodified: one optimizer step follows the hand-written weighted sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("trl")
import tiny
from datasets import concatenate_datasets
from trainer_cases import CASES, DPO, KTO, MAIN, REWARD, SFT, Case, expected, losses_with_kl, ten_remembered_steps
from trainer_steps import SET, N, gradient, in_order, steps, worst
from transformers import Trainer

from robustgrad import ChiSquare, TotalVariation
from robustgrad.integrations import hf_trainer
from robustgrad.integrations.trl import robustify, unrobustify

pytestmark = tiny.OTHERS_WARNINGS
CUTS = pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)], ids=lambda n: str(n))
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_trainer = pytest.mark.parametrize("case", MAIN.values(), ids=MAIN)


def one_step(trainer: Trainer) -> Tensor:
    return steps(trainer)[0]


@CUTS
@each_case
def test_window_is_exact_for_any_cut(case: Case, micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    trainer = case.build(tmp_path, micro_batch, accumulation)
    want = expected(case, trainer)
    got = one_step(robustify(trainer, SET, pool="window"))
    assert tiny.relative_error(got, want) < 1e-5
    assert tiny.relative_error(expected(case, trainer, ChiSquare(0.0)), want) > 0.1  # not plain averaging


@CUTS
@each_trainer
def test_lora(case: Case, micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    trainer = case.build(tmp_path, micro_batch, accumulation, peft_config=tiny.lora(case.task))
    want = expected(case, trainer)
    got = one_step(robustify(trainer, SET, pool="window"))
    assert len(got) < 1000 and tiny.relative_error(got, want) < 1e-5


@each_trainer
def test_memory_follows_losses_handed_over_one_by_one(case: Case, tmp_path: Path) -> None:
    """After 64 samples the memory has a rule; then plain averaging ends, at micro-batch 1 as well."""
    options = {"train_dataset": case.dataset(10 * N), "max_steps": 10, "learning_rate": 0.0}
    trainers = [in_order(case.build(tmp_path, *cut, **options)) for cut in [(8, 1), (2, 4), (1, 8)]]
    want = ten_remembered_steps(case, trainers[0])
    for trainer in trainers:
        for got, wanted in zip(steps(robustify(trainer, SET)), want, strict=True):
            assert tiny.relative_error(got, wanted) < 1e-5
        assert trainer.state.log_history[8]["robust/plain"] == 0.0 < trainer.state.log_history[8]["robust/gap"]


def test_batch_pool_warns_at_micro_batch_one(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="plain averaging"):
        one_step(robustify(REWARD.build(tmp_path, 1, 8), SET, pool="batch"))


def test_kto_groups_follow_the_order_of_the_losses(tmp_path: Path) -> None:
    """KTO sorts the losses: desirable first."""
    domain = [i % 2 for i in range(N)]
    trainer = KTO.build(tmp_path, train_dataset=KTO.dataset().add_column("domain", domain))
    rows = list(trainer.train_dataset)
    losses = KTO.losses(trainer, rows)
    ids = torch.tensor([row["domain"] for row in rows])
    means = torch.stack([losses[ids == i].mean() for i in range(2)]).detach()
    want = gradient((SET.solve(means[ids]).weights * losses).sum(), trainer.model)
    got = one_step(robustify(trainer, SET, pool="window", groups="domain"))
    assert tiny.relative_error(got, want) < 1e-5


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_kto_with_its_kl_term(micro_batch: int, tmp_path: Path) -> None:
    """The term is one number for a micro-batch, made of its completions, each with its neighbour's prompt."""
    options = {"loss_type": "kto", "train_sampling_strategy": "sequential"}
    trainer = KTO.build(tmp_path, micro_batch, N // micro_batch, **options)
    want = gradient(worst(losses_with_kl(trainer, micro_batch)), trainer.model)
    got = one_step(robustify(trainer, SET, pool="window"))
    assert tiny.relative_error(got, want) < 1e-5
    assert tiny.relative_error(expected(KTO, trainer), want) > 1e-3  # the term matters


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@each_trainer
def test_precision_and_checkpointing(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    options = options | ({"gradient_checkpointing_kwargs": {"use_reentrant": False}} if "bf16" not in options else {})
    trainer = case.build(tmp_path, 2, 4, **options)
    want = expected(case, trainer)
    got = one_step(robustify(trainer, SET, pool="window"))
    assert tiny.relative_error(got, want) < (0.2 if "bf16" in options else 1e-5)


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_torch_compile(tmp_path: Path) -> None:
    """A reward model's losses are made outside of it; beside TRL's fused LM head torch's compiler fails."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = REWARD.build(tmp_path, **compiled)
    want = expected(REWARD, trainer)
    assert tiny.relative_error(one_step(robustify(trainer, SET, pool="window")), want) < 1e-5
    assert hasattr(trainer.model_wrapped, "_orig_mod")
    for case in (DPO, KTO, SFT):
        with pytest.raises(ValueError, match=r"torch_compile must be False for .*fused LM head"):
            robustify(case.build(tmp_path, **compiled), SET)


def test_gradients_are_clipped_after_reweighting(tmp_path: Path) -> None:
    got = one_step(robustify(REWARD.build(tmp_path, 2, 4, max_grad_norm=0.5), SET, pool="window"))
    torch.testing.assert_close(got.norm(), torch.tensor(0.5))
    want = one_step(robustify(REWARD.build(tmp_path, 2, 4), SET, pool="window"))
    assert tiny.relative_error(got, 0.5 * want / want.norm()) < 1e-5


@each_trainer
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


@each_trainer
@pytest.mark.parametrize("pool", ["memory", "window"])
def test_resumes_to_the_bit(case: Case, pool: str, tmp_path: Path) -> None:
    """Dropout on; from the middle of an epoch, where the trainer restores its random numbers late."""
    data = concatenate_datasets([case.dataset()] * 10)

    def build(name: str) -> Trainer:
        built = with_dropout(case.model())
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


def with_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model


@pytest.mark.parametrize("survey", ["train", "eval"])
def test_a_survey_in_train_mode_sees_the_masks_of_its_step(survey: str, tmp_path: Path) -> None:
    """Also in the first step after an evaluation, and after a resume in the middle of an epoch."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"train_dataset": tiny.pairs(40), "eval_dataset": tiny.pairs()}

    def run(name: str, **resume: str) -> list[dict[str, float]]:
        trainer = REWARD.build(tmp_path / name, 2, 4, model=with_dropout(REWARD.model()), **options)
        robustify(trainer, SET, pool="window", survey=survey).train(**resume)
        return [entry for entry in trainer.state.log_history if "robust/mean" in entry]

    straight = run("a")
    resumed = run("b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    same = [entry["robust/mean"] == pytest.approx(entry["loss"], rel=1e-4) for entry in straight + resumed[2:]]
    assert same == [survey == "train"] * 6
    for again, once in zip(resumed[2:], straight[2:], strict=True):
        assert all(again[key] == once[key] for key in ("loss", "robust/value"))


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
