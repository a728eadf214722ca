"""Who may import whom, and that `import robustgrad` loads torch and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import robustgrad

PACKAGE = Path(robustgrad.__file__).parent
# Each module may import those before it; what stands on one line may not import each other.
LAYERS = [
    {"_version", "_checks", "_state_checks"},
    {"_token_checks", "_conjugate_gradient", "ambiguity"},
    {"objectives", "npg", "prompt_groups", "_balls"},
    {"radius", "schedule"},
    {"_units", "samples", "hook", "_graph"},
    {"distributed", "token_units", "_reductions", "_remembered"},
    {"pool", "_traced"},
    {"memory", "window", "_attribution"},
    {"pools", "capture"},
    {"ratios", "robust_loss"},
    {"reweighter"},
    {"optimizer", "robust_ppo", "gradient_penalty", "baselines", "report"},
    {"__init__"},
    {"integrations", "cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
ALLOWED_OUTSIDE = {"torch", "numpy", *sys.stdlib_module_names}
# The one place that knows other people's packages; the kernels, loaded where they run, need Triton.
ALLOWED_IN = {
    "integrations": {"transformers", "accelerate", "verl", "axolotl", "pydantic"},
    "ambiguity/_triton": {"triton"},
    "report": {"matplotlib", "jinja2", "rich"},
    "cli": {"typer", "rich"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def component(parts: tuple[str, ...]) -> str:
    return parts[0] if parts else "__init__"


def imports(path: Path) -> list[tuple[str, str]]:
    """("outside" or "inside", name) of everything a file imports."""
    folder = path.relative_to(PACKAGE).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [("outside", alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(("outside", node.module.split(".")[0]))
        elif isinstance(node, ast.ImportFrom):
            here = folder[: len(folder) - node.level + 1]
            inner = (*here, *(node.module.split(".") if node.module else ()))
            found += [("inside", component(inner or (alias.name,))) for alias in node.names]
    return found


def violations(path: Path) -> list[str]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = component(parts)
    allowed = ALLOWED_OUTSIDE.union(*(ALLOWED_IN.get("/".join(parts[:depth]), set()) for depth in (1, 2)))
    wrong = []
    for kind, name in imports(path):
        if kind == "outside" and name not in allowed:
            wrong.append(f"{path.name} imports {name}")
        if kind == "inside" and name != own and RANK[name] >= RANK[own]:
            wrong.append(f"{own} imports {name}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    assert violations(path) == []


def test_the_import_rule_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "pool.py").write_text(
        "import transformers\nfrom .reweighter import Reweighter\nfrom . import _checks\n"
    )
    assert violations(tmp_path / "pool.py") == ["pool.py imports transformers", "pool imports reweighter"]


def loaded(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after the statement, beside those of torch alone."""
    code = f"{statement}; import sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    run = [sys.executable, "-W", "error", "-c"]
    with_it = subprocess.run([*run, code], capture_output=True, text=True, check=True).stdout.split()
    bare = subprocess.run([*run, code.replace(statement, "import torch, torch.distributed")],
                          capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    return {m for m in set(with_it) - set(bare) if m not in sys.stdlib_module_names}


def test_import_is_light() -> None:
    modules = ("objectives", "baselines", "npg", "gradient_penalty", "robust_ppo", "radius", "report", "schedule")
    statement = ", ".join(f"robustgrad.{name}" for name in modules)
    assert loaded(f"import robustgrad, {statement}") == {"robustgrad"}


def test_the_lightness_test_can_fail() -> None:
    assert "pytest" in loaded("import robustgrad, pytest")


def test_public_names_exist_and_are_few() -> None:
    assert all(hasattr(robustgrad, name) for name in robustgrad.__all__)
    assert len(robustgrad.__all__) <= 12


def test_files_stay_readable() -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > 250} == {}


def lengths(source: str) -> dict[str, int]:
    """Lines in the body of every function, without its docstring; those of Triton too."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            found[node.name] = body[-1].end_lineno - body[0].lineno + 1 if body else 0
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_short(path: Path) -> None:
    assert {name: lines for name, lines in lengths(path.read_text()).items() if lines > 30} == {}


def test_the_length_of_a_function_is_counted() -> None:
    assert lengths('def f():\n    """Says."""\n    a = 1\n\n    return a\ndef g():\n    """Says."""\n') == {
        "f": 3,
        "g": 0,
    }
