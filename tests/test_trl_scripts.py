"""TRL's own training scripts, as installed, with two lines added: they run, and their logs say how robust they are."""

from __future__ import annotations

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of the scripts and what they import
IMPORT = "import robustgrad, robustgrad.integrations.trl"
CALL = "    robustgrad.integrations.trl.robustify(trainer, robustgrad.TotalVariation(0.1))"
SETTINGS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 12, "logging_steps": 1,
    "save_steps": 12, "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none",
    "disable_tqdm": True, "learning_rate": 1e-2,
}  # fmt: skip


def installed(name: str) -> str:
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "scripts" / f"{name}.py").read_text()


def with_two_lines(source: str) -> str:
    lines = source.splitlines()
    lines.insert(next(i for i, line in enumerate(lines) if line.startswith("    trainer.train(")), CALL)
    lines.insert(next(i for i, line in enumerate(lines) if line.startswith("import ")), IMPORT)
    assert len(lines) == len(source.splitlines()) + 2
    return "\n".join(lines)


def run(script: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[dict[str, Any]]:
    """Its log."""
    settings = {"dataset_name": folder / "data", "model_name_or_path": folder / "model", "output_dir": folder / "out",
                **SETTINGS, **settings}  # fmt: skip
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    state = json.loads((folder / "out" / "checkpoint-12" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(("name", "settings"), [("reward", {}), ("dpo", {"use_peft": True, "lora_r": 4})])
def test_runs_with_two_added_lines(
    name: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.classifier() if name == "reward" else tiny.causal_lm()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    tiny.pairs(96).to_json(tmp_path / "data" / "train.jsonl")
    script = tmp_path / f"{name}.py"
    script.write_text(with_two_lines(installed(name)))
    log = run(script, tmp_path, monkeypatch, **settings)
    assert [entry["robust/plain"] for entry in log] == [1.0] * 8 + [0.0] * 4
    assert all(entry["robust/gap"] > 0 for entry in log[8:])
    assert min(entry["robust/ess"] for entry in log[8:]) < 8
    saved = torch.load(tmp_path / "out" / "checkpoint-12" / "robustgrad.pt", weights_only=True)
    assert saved["configuration"]["ambiguity"] == "TotalVariation(radius=0.1)"
