"""A run that is killed and resumed from its last checkpoint ends where the uninterrupted one ends, to the bit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from robustgrad import KL, ChiSquare, Reweighter

SCRIPT = Path(__file__).parent / "resumable_loop.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder: Path, pool: str, ranks: int, *more: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, str(SCRIPT), str(folder), pool, *more]


def run(*arguments: object) -> torch.Tensor:
    folder = arguments[0]
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "final.pt")


def killed(folder: Path, pool: str, ranks: int) -> None:
    """Start, and kill -9 everything in the middle of a step, once there is a checkpoint."""
    process = subprocess.Popen(
        command(folder, pool, ranks, "--hang-at", "17"),
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 90
    while len(pids := [file.read_text() for file in folder.glob("hanging-*")]) < ranks or "" in pids:
        assert time.monotonic() < deadline, "the loop did not come to the step where it hangs"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    # The launcher gives each rank a process group of its own: those die by themselves.
    for pid in map(int, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert (folder / "checkpoint.pt").exists() and not (folder / "final.pt").exists()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("pool", ["memory", "window"])
def test_kill_and_resume_is_bit_exact(tmp_path: Path, pool: str, ranks: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = run(whole, pool, ranks)
    killed(broken, pool, ranks)
    torch.testing.assert_close(run(broken, pool, ranks), expected, rtol=0, atol=0)
    if ranks == 2:
        # On one rank the sums of a step are rounded in another order, nothing else differs.
        (broken / "final.pt").unlink()
        torch.testing.assert_close(run(broken, pool, 1), expected, rtol=0, atol=1e-9)


def fed(*arguments: object, **options: object) -> Reweighter:
    reweighter = Reweighter(*arguments, **options)
    reweighter(torch.rand(70, requires_grad=True))
    reweighter.step()
    return reweighter


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Reweighter(ChiSquare(1.0)), r"ambiguity=ChiSquare\(radius=1.0\).*got ChiSquare\(radius=0.5\)"),
        (lambda: Reweighter(KL(0.5)), r"ambiguity=KL\(radius=0.5\)"),
        (lambda: Reweighter(ChiSquare(0.5), memory=64), "memory=64.*got None"),
        (lambda: Reweighter(ChiSquare(0.5), pool="window"), "pool=window.*got memory"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(other, message: str) -> None:
    state = fed(ChiSquare(0.5)).state_dict()
    with pytest.raises(ValueError, match=message):
        other().load_state_dict(state)


def test_a_checkpoint_of_another_version_is_refused() -> None:
    state = fed(ChiSquare(0.5)).state_dict()
    with pytest.raises(ValueError, match="version 1, got 99"):
        Reweighter(ChiSquare(0.5)).load_state_dict(state | {"version": 99})
