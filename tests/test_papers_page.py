"""docs/papers.md names what exists: functions, tests, examples and their options."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "papers.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(robustgrad\.[\w.]+)`", PAGE))))
def test_functions_exist(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:tests|examples)/[\w/]+\.(?:py|txt)", PAGE))))
def test_files_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`python (examples/\w+\.py[^`]*)`", PAGE))))
def test_commands_use_options_that_exist(command: str) -> None:
    script, *options = command.split()
    shared = [f"examples/{name}.py" for name in ("policy_run", "rollouts", "rewards")]
    source = "".join((ROOT / name).read_text() for name in (script, *shared))
    for option in options:
        assert not option.startswith("--") or f'"{option}"' in source


def test_every_public_objective_and_baseline_is_on_the_page() -> None:
    for module, left_out in (
        ("objectives", {"log_ratios", "sequence_log_probs", "sequence_mean", "sequence_sum", "token_log_probs"}),
        ("baselines", set()),
    ):
        for name in set(importlib.import_module(f"robustgrad.{module}").__all__) - left_out:
            assert f"`robustgrad.{module}.{name}`" in PAGE, name
