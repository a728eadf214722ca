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

from robustgrad.ambiguity import KL, ChiSquare, CVaR, TotalVariation, _fused, _kernel

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason='Triton is not installed: "robustgrad[triton]"')
BESIDE_PYTHON = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
needs_compiler = pytest.mark.skipif(
    not all(shutil.which(tool, path=BESIDE_PYTHON) for tool in (os.environ.get("CXX", "c++"), "ninja")),
    reason='no C++ compiler or no ninja: "robustgrad[cpp]"',
)
KINDS = ["plain", "top", "near", "ball", "price", "tilt", "softmax"]
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
    assert_parity_in_a_process("tests/kernel_parity.py", TRITON_INTERPRET="1", ROBUSTGRAD_KERNEL="triton")


@needs_compiler
def test_parity_in_cpp() -> None:
    """The operator is registered once, at import: a process of its own."""
    assert_parity_in_a_process("tests/kernel_parity.py", ROBUSTGRAD_KERNEL="cpp", OMP_NUM_THREADS="1")


@needs_triton
@pytest.mark.parametrize(("capability", "variant"), [(80, "float32"), (90, "float64 with base and mask")])
@pytest.mark.parametrize("kind", KINDS)
def test_builds(kind: str, capability: int, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to machine code, which needs no GPU; and no number is narrowed to float32 on the way in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from robustgrad.ambiguity._triton_rows import solve_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype, weighted, rows, losses, warps = VARIANTS[variant]
    constants: dict[str, Any] = {"KIND": kind, "FULL": dtype == "fp64", "R": rows, "N": losses}
    constants |= {"BASED": weighted, "MASKED": weighted}
    types = {"losses": f"*{dtype}", "base": "*fp64", "mask": "*u8", "ratio": "*fp64"}
    types |= dict.fromkeys(("rows", "n", "base_step", "mask_step"), "i32")
    types |= dict.fromkeys(("first", "second", "third", "fourth", "fifth"), "fp64")
    source = ASTSource(solve_rows, types | dict.fromkeys(constants, "constexpr"), constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert f"sm_{capability}" in built.asm["ptx"] and len(built.asm["cubin"]) > 1000
    if dtype == "fp64" and kind in ("plain", "top", "ball", "price"):  # exp and its kin start in float32
        assert ".f32" not in built.asm["ptx"]


@needs_triton
def test_numbers_arrive_in_float64() -> None:
    """Triton takes a Python number for float32 where the kernel does not say otherwise."""
    from robustgrad.ambiguity._triton_rows import solve_rows

    declared = {p.name: p.annotation_type for p in solve_rows.params}
    assert {declared[name] for name in ("first", "second", "third", "fourth", "fifth")} == {"fp64"}


def test_a_cpu_tensor_is_left_to_torch() -> None:
    assert not _kernel.takes(torch.randn(8))


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


def test_where_the_kernel_does_not_run_torch_does_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(_kernel, "_launch", no_compiler)
    with pytest.warns(UserWarning, match=r"does not run on cpu.*find C compiler.*ROBUSTGRAD_KERNEL=torch"):
        assert not _kernel._tried_on(torch.device("cpu"))
    monkeypatch.setattr(_kernel, "_NAME", "triton")
    with pytest.raises(RuntimeError, match="C compiler"):
        _kernel._tried_on(torch.device("cpu"))


def test_an_old_gpu_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernel, "_runs", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not _kernel._runs_on(torch.device("cuda", 0))


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
def test_one_launch_in_a_cuda_graph(ambiguity: Any) -> None:
    losses = torch.randn(64, 512, device="cuda", dtype=torch.float64)
    want = ambiguity.solve(losses).ratio
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ambiguity.solve(losses)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured = ambiguity.solve(losses).ratio
    graph.replay()
    assert torch.equal(captured, want)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ambiguity.solve(losses)
    assert [event.name for event in profile.events() if "solve_rows" in event.name or "kernel" in event.name] == [
        "solve_rows"
    ]
