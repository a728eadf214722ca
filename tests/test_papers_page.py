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


def test_blocks_print_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(code, names)
    shown = "".join(re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    number = re.compile(r"\d+\.\d+")
    printed = capsys.readouterr().out
    assert number.sub("", printed) == number.sub("", shown)
    values, expected = ([float(x) for x in number.findall(text)] for text in (printed, shown))
    assert values == pytest.approx(expected, abs=0.011)


def test_every_public_objective_and_baseline_is_on_the_page() -> None:
    for module, left_out in (
        ("objectives", {"log_ratios", "sequence_log_probs", "sequence_mean", "sequence_sum", "token_log_probs"}),
        ("baselines", set()),
    ):
        for name in set(importlib.import_module(f"robustgrad.{module}").__all__) - left_out:
            assert f"`robustgrad.{module}.{name}`" in PAGE, name
