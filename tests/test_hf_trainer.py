"""The plain Trainer: losses reduced inside the model, the loop's own scale, tokens that are no samples."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import tiny
from plain_trainers import KINDS, build, loss, losses, model, own_scale, rows, scale_between
from trainer_steps import SET, N, gradient, in_order, remembered, steps, worst
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from robustgrad.integrations.hf_trainer import robustify

pytestmark = tiny.OTHERS_WARNINGS
CUTS = pytest.mark.parametrize("cut", [(8, 1), (2, 4), (1, 8)], ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)


def step(trainer: Trainer, **options: Any) -> Tensor:
    return steps(robustify(trainer, SET, pool="window", **options))[0]


@CUTS
@each_kind
def test_window_is_exact_for_any_cut(kind: str, cut: tuple[int, int], tmp_path: Path) -> None:
    trainer = build(tmp_path, kind, cut)
    want = gradient(worst(losses(kind, trainer, trainer.train_dataset)), trainer.model)
    assert tiny.relative_error(step(trainer), own_scale(kind, tmp_path, cut) * want) < 1e-5


@each_kind
def test_lora(kind: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, kind, (2, 4), model=model(kind, adapter=True))
    want = gradient(worst(losses(kind, trainer, trainer.train_dataset)), trainer.model)
    assert len(want) < 1000 and tiny.relative_error(step(trainer), own_scale(kind, tmp_path, (2, 4)) * want) < 1e-5


@each_kind
def test_memory_follows_losses_handed_over_one_by_one(kind: str, tmp_path: Path) -> None:
    cuts = [(8, 1), (1, 8)]
    trainers = [in_order(build(tmp_path, kind, cut, n=10 * N, max_steps=10, learning_rate=0.0)) for cut in cuts]
    data = trainers[0].train_dataset
    parts = [losses(kind, trainers[0], data[i : i + N]) for i in range(0, 10 * N, N)]
    want = remembered(parts, trainers[0].model)
    for cut, trainer in zip(cuts, trainers, strict=True):
        scale = own_scale(kind, tmp_path, cut)
        for got, wanted in zip(steps(robustify(trainer, SET)), want, strict=True):
            assert tiny.relative_error(got, scale * wanted) < 1e-5
        assert trainer.state.log_history[8]["robust/plain"] == 0.0 < trainer.state.log_history[8]["robust/gap"]


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@each_kind
def test_precision_and_checkpointing(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    more = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if "bf16" not in options else {}
    scale = own_scale(kind, tmp_path, (2, 4))
    trainer = build(tmp_path, kind, (2, 4), **options, **more)
    want = gradient(worst(losses(kind, trainer, trainer.train_dataset)), trainer.model)
    assert tiny.relative_error(step(trainer), scale * want) < (0.2 if "bf16" in options else 1e-5)


@CUTS
def test_label_smoothing(cut: tuple[int, int], tmp_path: Path) -> None:
    def smoothed() -> Trainer:
        return in_order(build(tmp_path, "tokens", cut, label_smoothing_factor=0.1, learning_rate=0.0))

    trainer = smoothed()
    each = torch.stack([smooth_loss(trainer.model, row) for row in trainer.train_dataset])
    # Older Trainers average over the tokens of a micro-batch here, not of the step.
    of_step = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
    parts = [trainer.train_dataset] if of_step else [trainer.train_dataset[i : i + cut[0]] for i in range(0, N, cut[0])]
    share = torch.tensor([len(part) / tokens_of(part) for part in parts for _ in part])
    scale = scale_between(steps(smoothed())[0], gradient((share * each).mean(), trainer.model))
    want = scale * gradient(worst(share * each), trainer.model)
    assert tiny.relative_error(step(trainer), want) < 1e-5


def tokens_of(data: list[dict[str, Tensor]]) -> int:
    return int(sum((row["labels"][1:] != -100).sum() for row in data))


def smooth_loss(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    logp = model(input_ids=row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
    uniform = (-logp.mean(-1))[row["labels"][1:] != -100].sum()
    return 0.9 * loss("tokens", model, row) + 0.1 * uniform


def test_unequal_micro_batches(tmp_path: Path) -> None:
    """6 samples as 4 + 2: a token mean over the step weighs all of them alike."""
    trainer = build(tmp_path, "tokens", (4, 2), n=6)
    want = gradient(worst(losses("tokens", trainer, trainer.train_dataset)), trainer.model)
    assert tiny.relative_error(step(trainer), want) < 1e-5


def mixture() -> nn.Module:
    torch.manual_seed(0)
    sizes = tiny.config().to_dict()
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id")  # fmt: skip
    more = {"num_local_experts": 4, "num_experts_per_tok": 1, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(MixtralConfig(**{name: sizes[name] for name in kept}, **more))


@CUTS
def test_router_loss_is_kept(cut: tuple[int, int], tmp_path: Path) -> None:
    """A full sum over (1, experts): at micro-batch 1 it looks like a sample."""
    trainer = build(tmp_path, "tokens", cut, model=mixture())
    each = losses("tokens", trainer, trainer.train_dataset)
    robust = gradient(worst(each), trainer.model)
    plain = steps(build(tmp_path, "tokens", cut, model=mixture()))[0]
    router = plain - gradient(each.mean(), trainer.model)
    assert router.norm() > 0.01 * plain.norm()
    assert tiny.relative_error(step(trainer), robust + router) < 1e-4


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_torch_compile_takes_a_loss_of_its_own(tmp_path: Path) -> None:
    """Inside the compiled model nobody sees the losses; with compute_loss_func they are made outside."""
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    with pytest.raises(ValueError, match="compute_loss_func"):
        robustify(build(tmp_path, "tokens", (2, 4), **compiled), SET)

    def loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch)

    trainer = build(tmp_path, "tokens", (2, 4), compute_loss_func=loss_func, **compiled)
    want = gradient(worst(losses("tokens", trainer, trainer.train_dataset)), trainer.model)
    assert tiny.relative_error(step(trainer), want) < 1e-5


def test_model_init_and_an_optimizer_of_its_own(tmp_path: Path) -> None:
    """Every run begins with a new model and an empty memory; `optimizers=` is refused beside model_init."""
    args = TrainingArguments(**tiny.arguments(tmp_path, 2, 4, max_steps=12))
    made = {"model_init": lambda trial=None: model("classes"), "train_dataset": rows("classes", 96)}
    with pytest.raises(RuntimeError, match="optimizers"):
        Trainer(args=args, **made, optimizers=(torch.optim.SGD(model("classes").parameters(), lr=0.1), None))
    own = torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}
    trainer = robustify(Trainer(args=args, **made, optimizer_cls_and_kwargs=own), SET)
    first = steps(trainer)
    second = steps(trainer)
    torch.testing.assert_close(first, second)
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.9
    assert trainer.state.log_history[9]["robust/plain"] == 0.0


def test_groups_from_a_column(tmp_path: Path) -> None:
    """A column that the trainer would drop; text or numbers."""
    domains = [["old", "new", "odd"][i % 3] for i in range(N)]
    data = [row | {"domain": name} for row, name in zip(rows("classes"), domains, strict=True)]
    args = TrainingArguments(**tiny.arguments(tmp_path, 2, 4))
    trainer = Trainer(model=model("classes"), args=args, train_dataset=data, eval_dataset=data[:4])
    each = losses("classes", trainer, data)
    ids = torch.tensor([["old", "new", "odd"].index(name) for name in domains])
    means = torch.stack([each[ids == i].mean() for i in range(3)]).detach()
    want = gradient((SET.solve(means[ids]).weights * each).sum(), trainer.model)
    got = step(trainer, groups="domain")
    assert tiny.relative_error(got, own_scale("classes", tmp_path, (2, 4)) * want) < 1e-5
    assert trainer.evaluate()["eval_loss"] > 0
