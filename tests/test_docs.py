"""The code that a reader would copy runs: README blocks in order, those of the pages, every example in a docstring."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import robustgrad

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# These need a whole framework, which their own tests bring; they have no examples to run.
FRAMEWORKS = {"robustgrad.integrations.verl", "robustgrad.integrations.axolotl"}
MODULES = [m.name for m in pkgutil.walk_packages(robustgrad.__path__, "robustgrad.") if m.name not in FRAMEWORKS]


@pytest.mark.parametrize("name", ["robustgrad", *MODULES])
def test_docstring_examples(name: str) -> None:
    if "._triton" in name:
        pytest.importorskip("triton")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", ["Reweighter", "robust_loss"])
def test_the_main_names_have_an_example(name: str) -> None:
    assert ">>>" in getattr(robustgrad, name).__doc__


class Block(NamedTuple):
    """A Python block and, where it shows a mistake, the message quoted below it."""

    page: Path
    number: int
    code: str
    message: str | None


def blocks(page: Path) -> list[Block]:
    fences = r"^```python\n(.*?)^```\n(?:```text\n(\w+(?:Error|Warning): .*?)\n```)?"
    found = re.findall(fences, page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(page, i, code, message or None) for i, (code, message) in enumerate(found)]


def run(block: Block, names: dict[str, object]) -> None:
    exec(compile(block.code, f"{block.page.name}, block {block.number}", "exec"), names)


PAGES = [README, *sorted(DOCS.rglob("*.md"))]
MISTAKES = [block for page in PAGES for block in blocks(page) if block.message]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.message is None:
            run(block, names)


@pytest.mark.parametrize("block", MISTAKES, ids=lambda block: f"{block.page.stem}-{block.number}")
def test_mistakes_give_the_message_quoted(block: Block, tmp_path: Path) -> None:
    """Each begins afresh, after the first block of its page."""
    names = trainers(block.code, tmp_path)
    run(blocks(block.page)[0], names)
    assert block.message in messages(block, names)


def messages(block: Block, names: dict[str, object]) -> list[str]:
    failed: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            run(block, names)
        except Exception as error:
            failed = [f"{type(error).__name__}: {error}"]
    return failed + [f"{one.category.__name__}: {one.message}" for one in warned]


def trainers(code: str, folder: Path) -> dict[str, object]:
    """The trainers that a block speaks of, of random models."""
    if "trainer" not in code:
        return {}
    pytest.importorskip("trl")
    import tiny
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    options = tiny.arguments(folder, 2, 1)
    given = {"processing_class": tiny.tokenizer()}
    with warnings.catch_warnings(action="ignore"):  # what the libraries say about their own options
        if "reward_trainer" in code:
            args = RewardConfig(**options)
            return {"reward_trainer": RewardTrainer(tiny.classifier(), args, train_dataset=tiny.pairs(), **given)}
        args = SFTConfig(packing=True, **options)
        return {"sft_trainer": SFTTrainer(tiny.causal_lm(), args, train_dataset=tiny.sentences(), **given)}


def test_the_quick_start_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """To two points: other versions and machines draw and round differently."""
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    shown = re.search(r"```text\n(radius .*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    assert shown is not None
    numbers = [[float(x) for x in re.findall(r"[\d.]+(?=%)", text)] for text in (shown[1], capsys.readouterr().out)]
    assert len(numbers[0]) == 4
    assert numbers[1] == pytest.approx(numbers[0], abs=2)


def test_there_are_twenty_mistakes() -> None:
    titles = re.findall(r"^### (\d+)\. ", (DOCS / "mistakes.md").read_text(), re.M)
    assert titles == [str(i) for i in range(1, 21)]
    assert len([block for block in MISTAKES if block.page.stem == "mistakes"]) == 20


def test_readme_shows_code_early_and_briefly() -> None:
    lines = README.read_text().splitlines()
    start = lines.index("```python")
    assert start < 30
    assert lines.index("```", start) - start - 1 <= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", page.read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_their_anchors_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# What users import from; everything else in the package is its inside.
PUBLIC = [
    "robustgrad",
    "robustgrad.baselines",
    "robustgrad.capture",
    "robustgrad.gradient_penalty",
    "robustgrad.npg",
    "robustgrad.objectives",
    "robustgrad.prompt_groups",
    "robustgrad.radius",
    "robustgrad.report",
    "robustgrad.robust_ppo",
    "robustgrad.schedule",
]


def public_names(module: ModuleType) -> set[str]:
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    listed = getattr(module, "__all__", [name for name in own if name[0] != "_"])
    return {f"{module.__name__}.{name}" for name in listed if not name.startswith("__")}


def documented() -> list[str]:
    """As users write them: a heading is given where a module has the name of its function."""
    entry = re.compile(r"^::: (\S+)(?:\n    options:\n      heading: (\S+))?", re.MULTILINE)
    found = [match for page in (DOCS / "api").glob("*.md") for match in entry.findall(page.read_text())]
    return [heading or name for name, heading in found]


def test_no_api_entry_is_a_whole_module() -> None:
    entries = [line[4:] for page in (DOCS / "api").glob("*.md") for line in page.read_text().splitlines()]
    assert [name for name in entries if (ROOT / f"{name.replace('.', '/')}.py").exists()] == []


def test_every_public_name_is_on_one_api_page() -> None:
    listed = [name for name in documented() if ".integrations." not in name]
    assert len(listed) == len(set(listed))
    assert set(listed) == set().union(*(public_names(importlib.import_module(name)) for name in PUBLIC))


def test_every_integration_is_on_an_api_page() -> None:
    """Read, not imported: each needs a package of its own."""
    for path in (ROOT / "robustgrad" / "integrations").glob("[!_]*.py"):
        public = re.findall(r"^(?:def|class) ([A-Za-z]\w+)\(.*", path.read_text(), re.M)
        assert any(f"robustgrad.integrations.{path.stem}.{name}" in documented() for name in public), path.stem
