"""The code that a reader would copy runs: README blocks in order, and every example in a docstring."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import robustgrad

README = Path(__file__).parent.parent / "README.md"
# These need a whole framework, which their own tests bring; they have no examples to run.
FRAMEWORKS = {"robustgrad.integrations.verl", "robustgrad.integrations.axolotl"}
MODULES = [m.name for m in pkgutil.walk_packages(robustgrad.__path__, "robustgrad.") if m.name not in FRAMEWORKS]


@pytest.mark.parametrize("name", ["robustgrad", *MODULES])
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", ["Reweighter", "robust_loss"])
def test_the_main_names_have_an_example(name: str) -> None:
    assert ">>>" in getattr(robustgrad, name).__doc__


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_readme_code_runs() -> None:
    names: dict[str, object] = {}
    for block in blocks():
        exec(compile(block, str(README), "exec"), names)


def test_readme_shows_code_early_and_briefly() -> None:
    lines = README.read_text().splitlines()
    start = lines.index("```python")
    assert start < 30
    assert lines.index("```", start) - start - 1 <= 12


def test_readme_commands_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_readme_links_exist() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
