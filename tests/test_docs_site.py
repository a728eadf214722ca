"""The site builds with every warning an error, and its pictures are drawn by the script that is said to draw them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='the site needs pip install "robustgrad[docs]"')
    pytest.importorskip("mkdocstrings")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr
    assert "What each case needs beyond the two lines" in (tmp_path / "small_batches" / "index.html").read_text()


def script(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_pictures_are_those_of_the_script(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = script("pictures")
    shown = re.findall(r"pictures/(\w+)\.svg", (DOCS / "how_it_works.md").read_text())
    assert shown == [picture.__name__ for picture in pictures.PICTURES]
    assert {path.stem for path in (DOCS / "pictures").iterdir()} == set(shown)
    pictures.draw(tmp_path, pictures.PICTURES[:2])  # the others train or stream for half a minute
    for picture in pictures.PICTURES[:2]:
        drawn = (tmp_path / f"{picture.__name__}.svg").read_text()
        assert drawn.count("<path") > 10


# A section ends at the next heading of its level; what stands in code is no heading.
TEXT = """# Title

first

## One, two
[a](docs/b.md) [c](d.py) [e](https://f.g)
```
# no heading
```
### Inner
x
## Last
y
"""


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("mkdocs")
    module = script("shown")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(TEXT)
    return module


def markdown(hook: ModuleType, text: str, page: str = "a.md") -> str:
    return hook.on_page_markdown(text, page=SimpleNamespace(file=SimpleNamespace(src_uri=page)))


def test_pictures_of_benchmarks_are_found(hook: ModuleType) -> None:
    assert markdown(hook, "![a](../benchmarks/results/b.png)") == "![a](benchmarks/results/b.png)"


def test_pictures_of_a_page_that_is_shown_are_found(hook: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "README.md").write_text("# B\n![a](results/b.png)\n")
    assert markdown(hook, "[B](../benchmarks/README.md)") == "![a](benchmarks/results/b.png)"


def test_links_of_a_page_in_a_folder_stay(hook: ModuleType) -> None:
    assert markdown(hook, "see [a](../a.md)", "api/b.md") == "see [a](../a.md)"


def test_a_section_of_the_readme_is_shown(hook: ModuleType) -> None:
    shown = markdown(hook, "before\n\n[One, two](../README.md#one-two)\n\nafter [it](../README.md#last).\n")
    section = "[a](b.md) c [e](https://f.g)\n```\n# no heading\n```\n### Inner\nx"
    assert shown == f"before\n\n{section}\n\nafter it.\n"


def test_a_whole_page_is_shown(hook: ModuleType) -> None:
    assert markdown(hook, "[All](../README.md)").startswith("first\n\n## One, two\n")


def test_a_script_is_shown_as_code(hook: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    assert markdown(hook, "[a](../a.py)") == "```py\na = 1\n```"


def test_a_section_that_is_missing_stops_the_build(hook: ModuleType) -> None:
    with pytest.raises(Exception, match=r"README.md has no section #three"):
        markdown(hook, "[Three](../README.md#three)")
