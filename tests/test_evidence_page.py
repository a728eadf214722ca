"""docs/evidence.md is what the committed results say, and nothing else."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "evidence.md", ROOT / "benchmarks" / "results" / "ood_protocol"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Modules of benchmarks/ by name, as they import each other."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The committed rows, to be changed."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


def changed(folder: Path, method: str, change: Callable[[dict], None]) -> None:
    path = folder / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["method"] == method:
            change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_is_made_from_the_committed_results(module: Callable[[str], ModuleType]) -> None:
    assert PAGE.read_text() == module("evidence_page").text(), "run python benchmarks/evidence_page.py"


def test_no_number_in_the_sentences_is_written_by_hand(module: Callable[[str], ModuleType]) -> None:
    methods, choices = module("evidence.methods"), module("evidence.choices").CHOICES
    text = re.sub(r"\{[^}]*\}|`[^`]*`", "", module("evidence.conclusions").TEXT.read_text())
    for name in sorted({*methods.METHODS, *methods.RADII, *methods.POOLS, *choices}, key=len, reverse=True):
        text = text.replace(name, "")
    assert re.findall(r"\d*\.\d+|\d+ ?%", text) == []


def test_other_results_give_another_page(module: Callable[[str], ModuleType], copy: Path) -> None:
    def worse(row: dict) -> None:
        row["measures"]["last"] = {name: {**values, "ece": 0.4321} for name, values in row["measures"]["last"].items()}

    changed(copy, "KL .1", worse)
    after = module("evidence_page").text(copy, PAGE)
    assert PAGE.read_text().count("0.432") < after.count("0.432")
    assert "Five conclusions" not in after  # they were drawn from other rows


def test_conclusions_that_do_not_hold_are_an_error(module: Callable[[str], ModuleType], copy: Path) -> None:
    results, conclusions = module("evidence.results").Results, module("evidence.conclusions").conclusions
    assert conclusions(results(copy))[0] == "## Five conclusions"

    def worthless(row: dict) -> None:
        row["measures"]["last"] = {name: {**values, "tv10": 9.0} for name, values in row["measures"]["last"].items()}

    changed(copy, "TV .1", worthless)
    with pytest.raises(ValueError, match=r"the results do not say .* lowers the worst case"):
        conclusions(results(copy))


def test_an_unfinished_run_is_compared_in_the_seeds_that_it_has(
    module: Callable[[str], ModuleType], copy: Path
) -> None:
    path = copy / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if row["method"] != "TV .1" or row["seed"] < 3]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    claims, comparisons = module("evidence.claims"), module("evidence.comparisons")
    few, all_ = (
        comparisons.Shifted(module("evidence.results").Results(folder), claims.HUMAN) for folder in (copy, RESULTS)
    )
    own, plain = few.both("TV .1", few.sets[0])
    assert len(own) == len(plain) == 3
    assert few.on("TV .1", few.sets[0]).mean == pytest.approx((own - plain).mean().item(), abs=1e-12)
    assert few.overall("TV .1").mean != all_.overall("TV .1").mean
    assert few.more_loss("TV .1").mean != all_.more_loss("TV .1").mean
    assert few.gain("TV .1", comparisons.MINORITY).mean != all_.gain("TV .1", comparisons.MINORITY).mean


def test_every_cell_has_all_its_seeds_and_learns(module: Callable[[str], ModuleType]) -> None:
    results, studies = module("evidence.results").Results(RESULTS), module("evidence.studies").studies()
    for study in studies:
        for method in study.methods:
            rows = results.rows((study.truth, study.capacity), method)
            assert [row["seed"] for row in rows] == list(range(results.about["seeds"])), (study.about, method)
    # The known scores are within reach: over .75 where the domains agree.
    none = (module("evidence.truth").Truth(conflict=0.0), "linear")
    assert min(results.values(none, "plain", "worst", results.known_set)) > 0.75


def test_pictures_are_there() -> None:
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", PAGE.read_text()):
        assert (PAGE.parent / picture).read_bytes().startswith(b"\x89PNG")
