"""Changes one operator or constant of the package at a time and asks the tests: mutants.py --share 0.06 --seed 0.

A sample of all such changes, drawn by file. Each is written into a copy of the repository, never here, and tested by
a process forked from this one, which has loaded torch and pytest already. First come the tests that take seconds;
those that survive meet the slower ones. docs/mutation.md explains what survives.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parent.parent
FILES = [
    *sorted((ROOT / "robustgrad/ambiguity").glob("*.py")),
    *(ROOT / f"robustgrad/{name}.py" for name in ("pool", "memory", "_remembered", "window", "ratios", "reweighter")),
]
NEEDS_A_GPU = re.compile("_kernel|_fused|__init__")

# Arithmetic is exchanged with arithmetic, a comparison with its boundary and with its opposite. The rest of what
# cosmic-ray knows raises a TypeError at once, or touches annotations, which never run.
OPERATORS = re.compile(
    "core/(ReplaceBinaryOperator_((Add|Sub|Mul|Div|FloorDiv|Mod|Pow)_(Add|Sub|Mul|Div)|BitAnd_BitOr)"
    "|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt"
    "|Is_IsNot|IsNot_Is)|ReplaceUnaryOperator_(USub_UAdd|Delete_Not|Delete_Invert)"
    "|Replace(TrueWithFalse|FalseWithTrue|AndWithOr|OrWithAnd|BreakWithContinue|ContinueWithBreak)"
    "|AddNot|NumberReplacer|ZeroIterationForLoop)$"
)

# Not drawn, because no answer can show them: where a search begins, from which a better place is found in any case, ...
STARTS = {"_zero_of_sample", "stride", "bracket", "_narrow"}
# ... and the sizes from which another way to the same answer is the quicker one.
SIZES = {"_SEVERAL", "LONG", "BLOCK", "_BLOCK", "_PASSES", "_GRID_SIZE", "_GRID_SIZE_ELSEWHERE", "_MOST_STEPS"}

OF_SETS = ("threshold", "ambiguity_edges", "ambiguity_scale", "ambiguity_effort", "ambiguity_sizes")
QUICK = {
    "ambiguity": (*OF_SETS, "fuzz", "ambiguity_degenerate"),
    "robustgrad": ("pool_edges", "ratio", "window", "reweighter", "memory"),
}
# The last of each start processes of their own.
SLOW = {
    "ambiguity": ("ambiguity_ways", "ambiguity_laws", "robust_loss", "memory", "compiled", "kernel"),
    "robustgrad": (
        "prompt_groups",
        "schedule",
        "token_units",
        "optimizer_checkpoints",
        "kernel",
        "faults",
        "distributed",
    ),
}
# Without what takes minutes, and without the compilation of kernels, which do not change.
WITHOUT = "not twenty and not build"
# A change may well make a loop endless, or a tensor double in it.
PATIENCE = 4.0  # times what the tests take without a change
MOST_MEMORY = 6 * 2**30


@dataclass(frozen=True)
class Mutant:
    file: str
    operator: str
    number: int
    source: str

    @property
    def tested_by(self) -> str:
        return Path(self.file).parent.name

    def change(self) -> str:
        """The line before and after."""
        lines = difflib.unified_diff((ROOT / self.file).read_text().splitlines(), self.source.splitlines(), n=0)
        return "\n".join(line for line in list(lines)[2:])


def positions(source: str) -> list[tuple[str, int]]:
    """Every place where an operator applies and an answer may show it, as (operator, number)."""
    tree, silent, found = get_ast(source), silences(source), []
    for name in (name for name in operator_names() if OPERATORS.match(name)):
        operator = get_operator(name)()
        places = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
        heard = (n for n, (begin, _) in enumerate(places) if not any(low <= begin < high for low, high in silent))
        found += [(name, number) for number in heard]
    return found


def silences(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where STARTS and SIZES are, and comparisons with a size, each from and to a (line, column)."""
    return [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for node in ast.walk(ast.parse(source))
        if is_silent(node)
    ]


def is_silent(node: ast.AST) -> bool:
    if isinstance(node, ast.keyword):
        return node.arg == "strict"  # of a zip, whose lengths are equal in any case
    if isinstance(node, ast.Assign | ast.Compare):
        return any(isinstance(name, ast.Name) and name.id in SIZES for name in ast.walk(node))
    return isinstance(node, ast.FunctionDef) and node.name in STARTS


def changes(source: str, mutated: str) -> bool:
    """Whether that is another program, and one: 1e100 + 1 is 1e100, and `f(+x)` is no call with a star."""
    try:
        return ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def drawn(share: float, seed: int) -> Iterator[Mutant]:
    for file in FILES:
        if NEEDS_A_GPU.search(file.name):
            continue
        name, source = str(file.relative_to(ROOT)), file.read_text()
        places = positions(source)
        wanted = max(1, round(share * len(places)))
        for operator, number in random.Random(f"{seed} {name}").sample(places, len(places)):
            if not wanted:
                break
            mutated = mutate_code(source, get_operator(operator)(), number)
            if changes(source, mutated):
                wanted -= 1
                yield Mutant(name, operator.removeprefix("core/"), number, mutated)


def survives(copy: Path, mutant: Mutant, tests: tuple[str, ...], longest: float) -> bool:
    file = copy / mutant.file
    original = file.read_text()
    file.write_text(mutant.source)
    try:
        return passes(copy, tests, longest)
    finally:
        file.write_text(original)


def passes(copy: Path, tests: tuple[str, ...], longest: float | None = None) -> bool:
    child = multiprocessing.get_context("fork").Process(target=run_tests, args=(copy, tests))
    child.start()
    try:
        child.join(longest)
    finally:
        if child.exitcode is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
    return child.exitcode == 0


def run_tests(copy: Path, tests: tuple[str, ...]) -> None:
    os.setsid()  # so that whatever the tests start ends with them
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    os.chdir(copy)
    os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    sys.path[0] = str(copy)
    log = os.open("mutant.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    import pytest

    files = [f"tests/test_{name}.py" for name in tests]
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", WITHOUT, *files])
    sys.stdout.flush()
    os._exit(code)


def copied(folder: str) -> Path:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site", "runs")
    return Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=ignored))


def survivors(copy: Path, mutants: list[Mutant], tests: dict[str, tuple[str, ...]]) -> Iterator[Mutant]:
    longest = {}
    for group in {mutant.tested_by for mutant in mutants}:
        began = time.monotonic()
        if not passes(copy, tests[group]):
            print((copy / "mutant.log").read_text()[-3000:])
            raise SystemExit(f"the tests of {group} fail without any change")
        longest[group] = 30 + PATIENCE * (time.monotonic() - began)
    for mutant in mutants:
        if survives(copy, mutant, tests[mutant.tested_by], longest[mutant.tested_by]):
            yield mutant
        else:
            print(f"killed {mutant.file} {mutant.operator} {mutant.number}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.06)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.dont_write_bytecode = True
    for name in ("torch", "pytest", "scipy.optimize", "cvxpy"):
        importlib.import_module(name)
    sample = list(drawn(options.share, options.seed))
    with tempfile.TemporaryDirectory() as folder:
        copy, alive = copied(folder), sample
        for tests in (QUICK, SLOW):
            alive = list(survivors(copy, alive, tests))
    for mutant in alive:
        print(f"SURVIVES {mutant.file} {mutant.operator} {mutant.number}\n{mutant.change()}")
    of, left = (Counter(mutant.file for mutant in mutants) for mutants in (sample, alive))
    for file in of:
        print(f"{of[file] - left[file]:4} of {of[file]:4} {file}")
    print(f"{len(sample) - len(alive)} of {len(sample)} killed, seed {options.seed}, share {options.share}")


if __name__ == "__main__":
    main()
