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
PAGES = [README, README.parent / "docs" / "radius.md"]
# These need a whole framework, which their own tests bring; they have no examples to run.
FRAMEWORKS = {"robustgrad.integrations.verl", "robustgrad.integrations.axolotl"}
MODULES = [m.name for m in pkgutil.walk_packages(robustgrad.__path__, "robustgrad.") if m.name not in FRAMEWORKS]


@pytest.mark.parametrize("name", ["robustgrad", *MODULES])
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", ["Reweighter", "robust_loss"])
def test_the_main_names_have_an_example(name: str) -> None:
    assert ">>>" in getattr(robustgrad, name).__doc__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_a_page_runs(page: Path) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)


def test_readme_shows_code_early_and_briefly() -> None:
    lines = README.read_text().splitlines()
    start = lines.index("```python")
    assert start < 30
    assert lines.index("```", start) - start - 1 <= 12


def test_readme_commands_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
