"""The plain Trainer: losses reduced inside the model, the loop's own scale, tokens that are no samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import tiny
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from robustgrad import ChiSquare
from robustgrad.integrations.hf_trainer import robustify

pytestmark = tiny.OTHERS_WARNINGS
SET = ChiSquare(0.5)
N, LENGTH, LABELS = 8, 6, 3
CUTS = pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)], ids=lambda n: str(n))


def rows(kind: str, n: int = N) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 20, (n, LENGTH), generator=random)
    labels = {
        "classes": torch.arange(n) % LABELS,
        "regression": torch.randn(n, generator=random),
        "tokens": ids.masked_fill(torch.arange(LENGTH) >= 3 + torch.arange(n)[:, None] % 4, -100),
    }[kind]
    return [{"input_ids": ids[i], "attention_mask": torch.ones_like(ids[i]), "labels": labels[i]} for i in range(n)]


def build(
    folder: Path, model: nn.Module, kind: str, cut: tuple[int, int] = (8, 1), n: int = N, **changes: Any
) -> Trainer:
    args = TrainingArguments(**tiny.arguments(folder, *cut, **changes))
    return Trainer(model=model, args=args, train_dataset=rows(kind, n))


def token_losses(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
    return F.cross_entropy(logits, row["labels"][1:], reduction="none")  # 0 where ignored


def expected(trainer: Trainer, loss: Callable[[nn.Module, dict[str, Tensor]], Tensor], scale: float = 1.0) -> Tensor:
    model = trainer.model
    losses = torch.stack([loss(model, row) for row in trainer.train_dataset])
    weights = SET.solve(losses).weights
    grads = torch.autograd.grad(scale * (weights * losses).sum(), tiny.trainable(model))
    return torch.cat([grad.flatten() for grad in grads])


def step(trainer: Trainer, **options: Any) -> Tensor:
    gradients = tiny.Gradients()
    trainer.add_callback(gradients)
    robustify(trainer, SET, pool="window", **options).train()
    return gradients.steps[0]


def plain_step(trainer: Trainer) -> Tensor:
    gradients = tiny.Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps[0]


def class_loss(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(input_ids=row["input_ids"][None]).logits, row["labels"][None])


def square(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    return (model(input_ids=row["input_ids"][None]).logits[0, 0] - row["labels"]).square()


def own_scale(folder: Path, model: Callable[[], nn.Module], kind: str, cut: tuple[int, int], loss: Any) -> float:
    """By how much the untouched loop's gradient exceeds that of the mean; ours to keep, not to mend."""
    trainer = build(folder, model(), kind, cut)
    losses = torch.stack([loss(trainer.model, row) for row in trainer.train_dataset])
    grads = torch.autograd.grad(losses.mean(), tiny.trainable(trainer.model))
    mean = torch.cat([grad.flatten() for grad in grads])
    got = plain_step(trainer)
    scale = (got.norm() / mean.norm()).item()
    assert tiny.relative_error(got, scale * mean) < 1e-5
    return scale


@CUTS
@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_classifier(kind: str, micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    loss, labels = (class_loss, LABELS) if kind == "classes" else (square, 1)
    cut = (micro_batch, accumulation)
    scale = own_scale(tmp_path, lambda: tiny.classifier(labels), kind, cut, loss)
    trainer = build(tmp_path, tiny.classifier(labels), kind, cut)
    want = expected(trainer, loss, scale)
    assert tiny.relative_error(step(trainer), want) < 1e-5


def tokens_of_all(trainer: Trainer) -> int:
    return int(sum((row["labels"][1:] != -100).sum() for row in trainer.train_dataset))


@CUTS
def test_causal_lm(micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    trainer = build(tmp_path, tiny.causal_lm(), "tokens", (micro_batch, accumulation))
    count = tokens_of_all(trainer)
    want = expected(trainer, lambda model, row: token_losses(model, row).sum() * N / count)
    assert tiny.relative_error(step(trainer), want) < 1e-5


@CUTS
def test_label_smoothing(micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    trainer = build(tmp_path, tiny.causal_lm(), "tokens", (micro_batch, accumulation), label_smoothing_factor=0.1)
    count = tokens_of_all(trainer)

    def loss(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
        logp = model(input_ids=row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
        smooth = (-logp.mean(-1))[row["labels"][1:] != -100].sum()
        return (0.9 * token_losses(model, row).sum() + 0.1 * smooth) * N / count

    want = expected(trainer, loss)
    assert tiny.relative_error(step(trainer), want) < 1e-5


def test_unequal_micro_batches(tmp_path: Path) -> None:
    """6 samples as 4 + 2: a token mean over the step weighs all of them alike."""
    trainer = build(tmp_path, tiny.causal_lm(), "tokens", (4, 2), n=6)
    count = tokens_of_all(trainer)
    want = expected(trainer, lambda model, row: token_losses(model, row).sum() * 6 / count)
    assert tiny.relative_error(step(trainer), want) < 1e-5


def mixture() -> nn.Module:
    torch.manual_seed(0)
    sizes = tiny.config().to_dict()
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id")  # fmt: skip
    more = {"num_local_experts": 4, "num_experts_per_tok": 1, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(MixtralConfig(**{name: sizes[name] for name in kept}, **more))


@CUTS
def test_router_loss_is_kept(micro_batch: int, accumulation: int, tmp_path: Path) -> None:
    """A full sum over (1, experts): at micro-batch 1 it looks like a sample."""
    cut = (micro_batch, accumulation)
    trainer = build(tmp_path, mixture(), "tokens", cut)
    count = tokens_of_all(trainer)

    def loss(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
        return token_losses(model, row).sum() * N / count

    robust = expected(trainer, loss)
    losses = torch.stack([loss(trainer.model, row) for row in trainer.train_dataset])
    grads = torch.autograd.grad(losses.mean(), tiny.trainable(trainer.model))
    plain = plain_step(build(tmp_path, mixture(), "tokens", cut))
    router = plain - torch.cat([grad.flatten() for grad in grads])
    assert router.norm() > 0.01 * plain.norm()
    assert tiny.relative_error(step(trainer), robust + router) < 1e-4


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_torch_compile_takes_a_loss_of_its_own(tmp_path: Path) -> None:
    """Inside the compiled model nobody sees the losses; with compute_loss_func they are made outside."""
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = build(tmp_path, tiny.causal_lm(), "tokens", (2, 4), **compiled)
    with pytest.raises(ValueError, match="compute_loss_func"):
        robustify(trainer, SET)

    def loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch)

    args = TrainingArguments(**tiny.arguments(tmp_path, 2, 4, **compiled))
    trainer = Trainer(tiny.causal_lm(), args, train_dataset=rows("tokens"), compute_loss_func=loss_func)
    want = expected(trainer, lambda model, row: token_losses(model, row).sum())
    got = step(trainer)
    assert tiny.relative_error(got, want * (got.norm() / want.norm())) < 1e-5


def test_model_init(tmp_path: Path) -> None:
    args = TrainingArguments(**tiny.arguments(tmp_path, 2, 4))
    trainer = Trainer(model_init=lambda: tiny.classifier(LABELS), args=args, train_dataset=rows("classes"))
    first = step(trainer)
    second = step_again(trainer)
    torch.testing.assert_close(first, second)


def step_again(trainer: Trainer) -> Tensor:
    gradients = tiny.Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps[0]


def test_groups_from_a_column(tmp_path: Path) -> None:
    """A column that the trainer would drop; text or numbers."""
    domains = [["old", "new", "odd"][i % 3] for i in range(N)]
    data = [row | {"domain": name} for row, name in zip(rows("classes"), domains, strict=True)]
    args = TrainingArguments(**tiny.arguments(tmp_path, 2, 4))
    trainer = Trainer(
        model=tiny.classifier(LABELS), args=args, train_dataset=data, eval_dataset=data[:4],
    )  # fmt: skip
    model = trainer.model
    losses = torch.stack([class_loss(model, row) for row in data])
    ids = torch.tensor([["old", "new", "odd"].index(name) for name in domains])
    means = torch.stack([losses[ids == i].mean() for i in range(3)]).detach()
    weights = SET.solve(means[ids]).weights
    grads = torch.autograd.grad((weights * losses).sum(), tiny.trainable(model))
    want = torch.cat([grad.flatten() for grad in grads])
    got = step(trainer, groups="domain")
    scale = (got.norm() / want.norm()).item()
    assert tiny.relative_error(got, scale * want) < 1e-5
    assert trainer.evaluate()["eval_loss"] > 0
