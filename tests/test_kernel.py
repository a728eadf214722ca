"""The kernels: parity of Triton's in its interpreter and of the C++ one, that they build, and how one is chosen."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import inputs
import pytest
import torch

from robustgrad import Reweighter
from robustgrad.ambiguity import KL, ChiSquare, CVaR, TotalVariation, _fused, _kernel

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason='Triton is not installed: "robustgrad[triton]"')
BESIDE_PYTHON = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
needs_compiler = pytest.mark.skipif(
    not all(shutil.which(tool, path=BESIDE_PYTHON) for tool in (os.environ.get("CXX", "c++"), "ninja")),
    reason='no C++ compiler or no ninja: "robustgrad[cpp]"',
)
ROWS, MEMORY, TRIAL = (f"tests/{name}.py" for name in ("kernel_parity", "memory_kernel_parity", "kernel_trial"))
KINDS = ["plain", "top", "near", "ball", "price", "tilt", "softmax"]
NUMBERS = ("first", "second", "third", "fourth", "fifth")
VARIANTS = {  # dtype, base and mask, rows and losses of a program, warps
    "float64 with base and mask": ("fp64", True, 1, 4096, 16),
    "float32": ("fp32", False, 2, 256, 4),
}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=HERE.parent, env=os.environ | environment
    )


def assert_parity_in_a_process(*files: str, **environment: str) -> None:
    run = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files, **environment)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout, run.stdout[-500:]


@needs_triton
def test_parity_in_the_interpreter() -> None:
    """Triton decides at its import whether it interprets: a process of its own."""
    assert_parity_in_a_process(ROWS, MEMORY, TRIAL, TRITON_INTERPRET="1", ROBUSTGRAD_KERNEL="triton")


@needs_compiler
def test_parity_in_cpp() -> None:
    """The operator is registered once, at import: a process of its own."""
    assert_parity_in_a_process(ROWS, ROBUSTGRAD_KERNEL="cpp", OMP_NUM_THREADS="1")


@needs_triton
@pytest.mark.parametrize(("capability", "variant"), [(80, "float32"), (90, "float64 with base and mask")])
@pytest.mark.parametrize("kind", KINDS)
def test_builds(kind: str, capability: int, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to machine code, which needs no GPU; and no number is narrowed to float32 on the way in."""
    from robustgrad.ambiguity._triton.rows import solve_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype, weighted, rows, losses, warps = VARIANTS[variant]
    constants: dict[str, Any] = {"KIND": kind, "FULL": dtype == "fp64", "R": rows, "N": losses}
    constants |= {"BASED": weighted, "MASKED": weighted}
    types = {"losses": f"*{dtype}", "base": "*fp64", "mask": "*u8", "ratio": "*fp64"}
    types |= dict.fromkeys(("rows", "n", "base_step", "mask_step"), "i32")
    types |= dict.fromkeys(NUMBERS, "fp64")
    code = built(solve_rows, types, constants, capability, warps)
    if dtype == "fp64" and kind in ("plain", "top", "ball", "price"):  # exp and its kin start in float32
        assert ".f32" not in code


def built(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int) -> str:
    """The kernel as PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert f"sm_{capability}" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
    return str(made.asm["ptx"])


@needs_triton
@pytest.mark.parametrize(("kind", "capability"), [("near", 80), ("ball", 90), ("tilt", 80)])
def test_the_memory_builds(kind: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustgrad.ambiguity._triton.memory_learn import learn
    from robustgrad.ambiguity._triton.memory_meet import meet

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wide = dict.fromkeys(("alone", "ring", "mass", "numbers", "ratio", "seen"), "*fp64")
    types = {"losses": "*bf16", "scores": "*fp64", "base": "*fp64", "mask": "*u8", "nonfinite": "*i64"} | wide
    given = dict.fromkeys(("SCORED", "BASED", "MASKED", "ALONE"), True)
    met = built(meet, types | dict.fromkeys(("lane", "n", "m"), "i32"), given | {"KIND": kind, "R": 8, "N": 512},
                capability, 4)  # fmt: skip
    types = dict.fromkeys(("seen", "ring", "mass", "new_ring", "new_mass", "numbers"), "*fp64")
    types |= dict.fromkeys(("lane", "m", "b", "excess"), "i32") | dict.fromkeys(NUMBERS, "fp64")
    learned = built(learn, types, {"KIND": kind, "N": 1024, "KEPT": 512}, capability, 4)
    # exp and its kin look at bits as float32, but nothing is computed in it.
    assert not any(name in met + learned for name in (".rn.f32.f64", "add.f32", "mul.f32", "fma.rn.f32", "ex2.approx"))


@needs_triton
@pytest.mark.parametrize(
    ("kind", "dtype", "capability"),
    [("ball", "fp32", 90), ("top", "fp64", 80), ("tilt", "fp32", 80), ("tilt", "fp64", 90)],
)
def test_long_rows_build(
    kind: str, dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustgrad.ambiguity._triton.long_rows import gather, moment, survey, write
    from robustgrad.ambiguity._triton.long_tilt import normalise, reach, tilt
    from robustgrad.ambiguity._triton.search import search

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    known = {"KIND": kind, "FULL": dtype == "fp64", "BASED": True, "MASKED": True, "SHIFT": 29 * (dtype == "fp32")}
    known |= {"SECOND": True, "T": 256, "B": 256}
    types = {"losses": f"*{dtype}", "base": "*fp64", "mask": "*u8", "ends": "*i64"}
    types |= dict.fromkeys(("parts", "states", "ratio"), "*fp64") | dict.fromkeys((*NUMBERS, "radius"), "fp64")
    passes = {"ball": (search, gather, moment), "top": (search, gather), "tilt": (reach, tilt, normalise)}
    for kernel in (survey, *passes[kind], write):
        constants = {p.name: known[p.name] for p in kernel.params if p.is_constexpr}
        code = built(kernel, {p.name: types.get(p.name, "i32") for p in kernel.params}, constants, capability, 8)
        assert kind != "top" or ".f32" not in code


@needs_triton
def test_numbers_arrive_in_float64() -> None:
    """Triton takes a Python number for float32 where the kernel does not say otherwise."""
    from robustgrad.ambiguity._triton.long_rows import gather, write
    from robustgrad.ambiguity._triton.long_tilt import normalise, tilt
    from robustgrad.ambiguity._triton.memory_learn import learn
    from robustgrad.ambiguity._triton.rows import solve_rows
    from robustgrad.ambiguity._triton.search import search

    for kernel in (solve_rows, learn, search, gather, write, tilt, normalise):
        declared = {p.name: p.annotation_type for p in kernel.params if p.name in (*NUMBERS, "radius")}
        assert set(declared.values()) == {"fp64"}


@needs_triton
def test_a_triton_that_narrows_them_is_refused() -> None:
    from robustgrad.ambiguity._triton import require

    for version in ("3.4.0", "3.10.1+cu130", "4.0"):
        require(version)
    with pytest.raises(ImportError, match=r"triton must be 3.4 or newer, got 3.2.0"):
        require("3.2.0")


def test_a_cpu_tensor_is_left_to_torch() -> None:
    assert not _kernel.reaches(torch.randn(8))


def test_the_name_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ROBUSTGRAD_KERNEL must be 'torch' or 'triton' or 'cpp', got 'cuda'"):
        _kernel.chosen("cuda")
    assert _kernel.chosen("torch") == "torch" and _kernel.chosen("cpp") == "cpp"
    monkeypatch.setattr(_kernel, "find_spec", lambda name: None)
    assert _kernel.chosen(None) == "torch"
    with pytest.raises(ImportError, match=r'pip install "robustgrad\[triton\]"'):
        _kernel.chosen("triton")
    monkeypatch.setattr(_kernel, "find_spec", lambda name: name)
    assert _kernel.chosen(None) == _kernel.chosen("triton") == "triton"


def test_without_a_compiler_the_error_says_what_is_missing(tmp_path: Path) -> None:
    compiler = str(tmp_path / "none")
    run = python("-c", "import robustgrad", ROBUSTGRAD_KERNEL="cpp", CXX=compiler, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert "ImportError: ROBUSTGRAD_KERNEL" in run.stderr and 'pip install "robustgrad[cpp]"' in run.stderr


def test_the_kernel_that_solves_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_fused, "_load", lambda: None)
    with caplog.at_level(logging.INFO, "robustgrad"):
        _fused.build()
    assert [record.message for record in caplog.records] == ["ROBUSTGRAD_KERNEL=cpp: the C++ kernel solves on the CPU."]


def test_another_source_is_another_build() -> None:
    names = {
        _fused._name(*parts) for parts in (("2.4", "source"), ("2.5", "source"), ("2.5", "other"), ("2.5s", "ource"))
    }
    assert len(names) == 4 and all(name.isidentifier() for name in names)


def test_an_old_gpu_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for major, supported in ((6, False), (7, True), (9, True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 1))
        assert _kernel._supported(torch.device("cuda", 0)) is supported


def test_the_variable_is_read() -> None:
    run = python("-c", "import robustgrad", ROBUSTGRAD_KERNEL="cuda")
    assert "ROBUSTGRAD_KERNEL must be" in run.stderr


@pytest.mark.parametrize("ambiguity", inputs.SETS, ids=str)
def test_every_set_has_a_recipe(ambiguity: Any) -> None:
    recipe = ambiguity._recipe()
    assert recipe.kind in KINDS and len(recipe.numbers) <= 5
    assert (recipe.kind == "plain") == (ambiguity in inputs.PLAIN)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("ambiguity", [TotalVariation(0.1), ChiSquare(0.5), KL(0.3), CVaR(0.2)], ids=str)
@needs_triton
@pytest.mark.parametrize("shape", [(64, 512), (2, 100_000)], ids=str)
def test_in_a_cuda_graph(ambiguity: Any, shape: tuple[int, int]) -> None:
    losses = torch.randn(shape, device="cuda", dtype=torch.float64)
    want = ambiguity.solve(losses).ratio
    torch.testing.assert_close(want.cpu(), ambiguity.solve(losses.cpu()).ratio, rtol=2e-6, atol=2e-6)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ambiguity.solve(losses)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured = ambiguity.solve(losses).ratio
    graph.replay()
    assert torch.equal(captured, want)
    if shape[-1] > 4096:
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ambiguity.solve(losses)
    assert [event.name for event in profile.events() if "solve_rows" in event.name or "kernel" in event.name] == [
        "solve_rows"
    ]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("ambiguity", [TotalVariation(0.1), ChiSquare(0.5), KL(0.3), CVaR(0.2)], ids=str)
@needs_triton
def test_a_training_step_with_its_memory_in_a_cuda_graph(ambiguity: Any) -> None:
    """The memory goes on with each replay, and is that of the CPU."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    pools = [Reweighter(ambiguity, memory=64), Reweighter(ambiguity, memory=64)]
    losses, batches = torch.zeros(32, device="cuda", dtype=torch.float64), torch.randn(12, 32, dtype=torch.float64)

    def step() -> torch.Tensor:
        ratio = torch.cat([pools[0].ratio(part) for part in losses.split(8)])
        pools[0].step()
        return ratio

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches[:6]:
            losses.copy_(batch)
            step()
    torch.cuda.current_stream().wait_stream(side)
    for batch in batches[:6]:
        pools[1].ratio(batch)
        pools[1].step()
    with torch.cuda.graph(graph):
        found = step()
    for batch in batches[6:]:
        losses.copy_(batch)
        graph.replay()
        torch.testing.assert_close(found.cpu(), pools[1].ratio(batch), rtol=2e-6, atol=2e-6)
        pools[1].step()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@needs_triton
def test_launches_of_the_memory_pool() -> None:
    reweighter, losses = Reweighter(ChiSquare(0.5), memory=64), torch.randn(32, device="cuda")
    for _ in range(6):
        reweighter(losses.clone().requires_grad_())
        reweighter.step()
    leaf = losses.clone().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        reweighter(leaf)
    assert [event.name for event in profile.events() if event.device_type.name == "CUDA"] == ["learn", "meet"]
