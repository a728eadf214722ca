"""Trainers on two gloo ranks: the gradient of one process with all samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
import experimental_trainers
import plain_trainers
import rollout_trainers
import tiny
from trainer_cases import KTO, MAIN, REWARD, expected, losses_with_kl, ten_remembered_steps
from trainer_steps import SET, N, gradient, in_order, remembered, worst

pytestmark = [*tiny.OTHERS_WARNINGS, pytest.mark.filterwarnings("ignore::UserWarning")]
HERE = Path(__file__).parent
TEN = {"max_steps": 10, "learning_rate": 0.0}
each_case = pytest.mark.parametrize("name", MAIN)
each_kind = pytest.mark.parametrize("kind", plain_trainers.KINDS)


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every run on two ranks, from one start."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    script = [str(HERE / "trainer_on_ranks.py"), str(folder)]
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    out: dict[str, Any] = torch.load(folder / "out.pt", weights_only=True)
    return out


def check_first_step(run: dict[str, Any], want: torch.Tensor) -> None:
    assert tiny.relative_error(run["gradients"][0], want) < 1e-5
    assert run["log"][0]["robust/gap"] > 0


def check_steps(run: dict[str, Any], want: list[torch.Tensor]) -> None:
    for got, wanted in zip(run["gradients"], want, strict=True):
        assert tiny.relative_error(got, wanted) < 1e-5
    assert run["log"][8]["robust/plain"] == 0.0 < run["log"][8]["robust/gap"]


@pytest.mark.parametrize("form", ["window", "lora"])
@each_case
def test_window(name: str, form: str, on_ranks: dict[str, Any], tmp_path: Path) -> None:
    case = MAIN[name]
    adapter = {"peft_config": tiny.lora(case.task)} if form == "lora" else {}
    check_first_step(on_ranks[f"{name} {form}"], expected(case, case.build(tmp_path, **adapter)))


@each_case
def test_memory(name: str, on_ranks: dict[str, Any], tmp_path: Path) -> None:
    case = MAIN[name]
    trainer = case.build(tmp_path, train_dataset=case.dataset(10 * N))
    check_steps(on_ranks[f"{name} memory"], ten_remembered_steps(case, trainer))


def own_scale(kind: str, on_ranks: dict[str, Any], folder: Path) -> float:
    """Of the untouched loop: a classifier's gradient is too large by the accumulation and by the ranks."""
    trainer = plain_trainers.build(folder, kind)
    want = gradient(plain_trainers.losses(kind, trainer, trainer.train_dataset).mean(), trainer.model)
    return plain_trainers.scale_between(on_ranks[f"{kind} plain"]["gradients"][0], want)


@pytest.mark.parametrize("form", ["window", "lora"])
@each_kind
def test_plain_trainer_window(kind: str, form: str, on_ranks: dict[str, Any], tmp_path: Path) -> None:
    trainer = plain_trainers.build(tmp_path, kind, model=plain_trainers.model(kind, adapter=form == "lora"))
    want = gradient(worst(plain_trainers.losses(kind, trainer, trainer.train_dataset)), trainer.model)
    check_first_step(on_ranks[f"{kind} {form}"], own_scale(kind, on_ranks, tmp_path) * want)


@each_kind
def test_plain_trainer_memory(kind: str, on_ranks: dict[str, Any], tmp_path: Path) -> None:
    trainer = in_order(plain_trainers.build(tmp_path, kind, n=10 * N))
    data, scale = trainer.train_dataset, own_scale(kind, on_ranks, tmp_path)
    parts = [plain_trainers.losses(kind, trainer, data[i : i + N]) for i in range(0, 10 * N, N)]
    check_steps(on_ranks[f"{kind} memory"], [scale * one for one in remembered(parts, trainer.model)])


def test_kto_with_its_kl_term(on_ranks: dict[str, Any], tmp_path: Path) -> None:
    """One term for the micro-batches that the ranks have at the same time: two of two, in a row."""
    options = {"loss_type": "kto", "train_sampling_strategy": "sequential"}
    trainer = KTO.build(tmp_path, 2, 4, **options)
    check_first_step(on_ranks["kto with kl"], gradient(worst(losses_with_kl(trainer, 4)), trainer.model))


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_experimental(name: str, on_ranks: dict[str, Any], tmp_path: Path) -> None:
    trainer = experimental_trainers.build(name, tmp_path, 8, 1)
    each = experimental_trainers.losses(name, trainer.model, list(trainer.train_dataset), 2)
    check_first_step(on_ranks[name], gradient(worst(each), trainer.model))


@pytest.mark.parametrize("kind", rollout_trainers.KINDS)
def test_rollouts(kind: str, on_ranks: dict[str, Any], tmp_path: Path) -> None:
    """Each rank generates its own half; the adversary sees the prompts of both."""
    run, model = on_ranks[kind], rollout_trainers.build(kind, tmp_path, 8, 1).model
    ratio = rollout_trainers.prompt_ratio(SET, run["rollouts"][0]["rewards"])
    rollouts = [seen["rollout"] for seen in run["rollouts"]]
    check_first_step(run, gradient(rollout_trainers.objective(kind, model, rollouts, ratio), model))


def test_online_dpo(on_ranks: dict[str, Any], tmp_path: Path) -> None:
    trainer, run = experimental_trainers.online(tmp_path, 8, 1), on_ranks["online"]
    each = torch.cat([experimental_trainers.online_losses(trainer, seen[0]) for seen in run["rollouts"]])
    check_first_step(run, gradient(worst(each), trainer.model))


def test_sharded_by_fsdp(on_ranks: dict[str, Any], tmp_path: Path) -> None:
    if "sharded window" not in on_ranks:
        pytest.skip("this Accelerate sets FSDP up on accelerators only")
    check_first_step(on_ranks["sharded window"], expected(REWARD, REWARD.build(tmp_path)))
    trainer = REWARD.build(tmp_path, train_dataset=REWARD.dataset(10 * N))
    check_steps(on_ranks["sharded memory"], ten_remembered_steps(REWARD, trainer))
