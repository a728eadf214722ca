"""What breaks in the night: processes that die, disks that fill up, checkpoints that are not what they seem."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dying_loop
import pytest
import torch
from torch import Tensor, nn

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, RobustOptimizer, TotalVariation
from robustgrad.integrations import _state

each_set = pytest.mark.parametrize("ambiguity", [TotalVariation(0.2), ChiSquare(0.5), KL(0.3), CVaR(0.3)], ids=str)


@pytest.mark.parametrize("pool", ["memory", "window"])
def test_killed_at_twenty_random_places_and_resumed_is_bit_exact(tmp_path: Path, pool: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    dying_loop.train(whole, pool, lambda: None)
    rng, kills, server = random.Random(0), 0, multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch._dynamo"])  # what takes seconds to import
    while not (broken / "final.pt").exists():
        # Most die within two steps of a checkpoint, so that it takes about twenty of them.
        places = rng.randrange(2 * dying_loop.MICRO_BATCHES + 4) if kills < 20 else 10**9
        process = server.Process(target=dying_loop.until_killed, args=(broken, pool, places))
        process.start()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills == 20
    got, want = (torch.load(folder / "final.pt", weights_only=True) for folder in (broken, whole))
    assert all(torch.equal(got[name], want[name]) for name in want)


# Checkpoints that are not what they seem.


def fed(ambiguity: AmbiguitySet, pool: str = "memory") -> Reweighter:
    reweighter = Reweighter(ambiguity, pool=pool)
    for seed in range(2):
        losses = torch.rand(70, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        reweighter(losses)
        reweighter.step()
    return reweighter


def changed(*path: str, to: object = None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A copy of the state with one entry replaced, or left out."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        inner = state
        for name in path[:-1]:
            inner = inner[name]
        inner.pop(path[-1]) if to is None else inner.update({path[-1]: to})
        return state

    return change


SAMPLES = ("pool", "memory", "samples")
NOT_STATES = {
    "without the memory": changed("pool", "memory"),
    "without the samples": changed(*SAMPLES),
    "without the units": changed("pool", "memory", "units"),
    "a pool that is a string": changed("pool", to="x"),
    "a memory that is a string": changed("pool", "memory", to="x"),
    "fewer scores than weights": changed(*SAMPLES, "scores", to=torch.zeros(3, dtype=torch.float64)),
    "integer scores": changed(*SAMPLES, "scores", to=torch.zeros(70, dtype=torch.int64)),
    "a square of scores": changed(*SAMPLES, "scores", to=torch.zeros(70, 70)),
    "NaN in the memory": changed(*SAMPLES, "scores", to=torch.full((70,), torch.nan, dtype=torch.float64)),
    "negative weights": changed(*SAMPLES, "weight", to=torch.full((70,), -1.0, dtype=torch.float64)),
    "an unknown field": changed(*SAMPLES, "evil", to=torch.zeros(70)),
    "a spread of zero": changed("pool", "memory", "units", "spread", to=torch.zeros(())),
    "a mark that is a word": changed("pool", "marked", to="yes"),
    "a step size that is a word": changed("pool", "step_size", to="16"),
    "a count that is a word": changed("nonfinite", to="many"),
    "a count that is a fraction": changed("nonfinite", to=0.5),
}


@pytest.mark.parametrize("name", NOT_STATES)
def test_a_damaged_state_is_refused_and_changes_nothing(name: str) -> None:
    reweighter = fed(CVaR(0.5))
    bad, before = NOT_STATES[name](reweighter.state_dict()), str(reweighter.state_dict())
    with pytest.raises(ValueError, match=r"^(state|scores|weight|spread) .*(start the memory afresh)"):
        reweighter.load_state_dict(bad)
    assert str(reweighter.state_dict()) == before


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def truncated(folder: Path) -> None:
    path = folder / _state.NAME
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(folder: Path) -> None:
    torch.save(fed(KL(0.3)).state_dict() | {"pool": Bomb()}, folder / _state.NAME)


def bare_pickle(folder: Path) -> None:
    (folder / _state.NAME).write_bytes(pickle.dumps(Bomb(), protocol=2))


def text(folder: Path) -> None:
    (folder / _state.NAME).write_text("not a checkpoint")


@pytest.mark.parametrize("damage", [truncated, bomb, bare_pickle, text])
def test_a_damaged_file_is_refused_by_name_and_runs_nothing(
    tmp_path: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reweighter = fed(KL(0.3))
    _state.save(reweighter, tmp_path)
    damage(tmp_path)
    before = str(reweighter.state_dict())
    with pytest.raises(ValueError, match=r"robustgrad\.pt .*Resume from an earlier checkpoint"):
        _state.load(reweighter, tmp_path)
    assert str(reweighter.state_dict()) == before
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb(tmp_path)
    torch.load(tmp_path / _state.NAME, weights_only=False)
    assert (tmp_path / "exploded").exists()


FULL_DISK = """
import resource, signal, sys, torch
from test_faults import fed
from robustgrad import KL
from robustgrad.integrations import _state
reweighter = fed(KL(0.3))
_state.save(reweighter, sys.argv[1])
reweighter(torch.rand(9000, requires_grad=True))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # what comes beyond is refused, as by a full disk
try:
    _state.save(reweighter, sys.argv[1])
except (OSError, RuntimeError):
    sys.exit(7)
"""


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], env=environment, capture_output=True)
    assert done.returncode == 7, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [_state.NAME]
    resumed = Reweighter(KL(0.3))
    _state.load(resumed, tmp_path)
    assert str(resumed.state_dict()) == str(fed(KL(0.3)).state_dict())


# Storms, long runs, threads and processes.


@each_set
@pytest.mark.parametrize("pool", ["memory", "batch"])
def test_a_storm_of_nonfinite_losses_passes(ambiguity: AmbiguitySet, pool: str) -> None:
    """Every bad loss has a NaN gradient, none enters the memory, and afterwards all is as if they had not come."""
    draw = torch.Generator().manual_seed(0)
    stormy, calm = Reweighter(ambiguity, pool=pool), Reweighter(ambiguity, pool=pool)
    kinds = torch.tensor([torch.nan, torch.inf, -torch.nan], dtype=torch.float64)
    for step in range(60):
        losses = torch.randn(32, generator=draw, dtype=torch.float64)
        bad = torch.rand(32, generator=draw) < (0.5 if 20 <= step < 50 else 0.0)
        hit = torch.where(bad, kinds[torch.randint(3, (32,), generator=draw)], losses).requires_grad_()
        spared = losses.requires_grad_()
        stormy(hit).sum().backward()
        calm(spared, mask=~bad if bad.any() else None).sum().backward()  # rows with a mask are solved another way
        if pool == "memory":
            assert hit.grad[bad].isnan().all() and torch.equal(hit.grad[~bad], spared.grad[~bad])
        else:
            assert hit.grad.isnan().all() == bad.any()
        stormy.step(), calm.step()
    assert torch.equal(hit.grad, spared.grad) and hit.grad.isfinite().all()
    assert int(stormy.metrics()["nonfinite"]) > 300


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_many_steps_take_no_more_memory() -> None:
    """100,000 steps with ROBUSTGRAD_SOAK=100000; 3,000 otherwise."""
    net, steps = nn.Linear(4, 1), int(os.environ.get("ROBUSTGRAD_SOAK", 3000))
    optimizer = RobustOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), ChiSquare(0.5))
    before = 0
    for step in range(steps):
        optimizer.reweight(net(torch.randn(4, 4)).squeeze(-1).square()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1000:  # allocators and the memory itself are full by then
            before = resident()
    assert resident() - before < 2**22


def ratios_of(ambiguity: AmbiguitySet, seed: int, steps: int = 40) -> Tensor:
    """Of the last call of a stream of its own."""
    reweighter, draw = Reweighter(ambiguity), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        losses = torch.randn(16, generator=draw, dtype=torch.float64).requires_grad_()
        reweighter(losses).sum().backward()
        reweighter.step()
    assert losses.grad is not None
    return losses.grad


@each_set
def test_threads_do_not_disturb_each_other(ambiguity: AmbiguitySet) -> None:
    alone, together = [ratios_of(ambiguity, seed) for seed in range(4)], [torch.empty(0)] * 4

    def work(seed: int) -> None:
        together[seed] = ratios_of(ambiguity, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_reweighter_goes_to_another_process(start: str) -> None:
    context, reweighter = multiprocessing.get_context(start), fed(TotalVariation(0.2))
    losses = torch.linspace(0, 1, 9)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=dying_loop.ratio_elsewhere, args=(reweighter, losses, there))
    process.start()
    got = here.recv()
    process.join()
    assert got == reweighter.ratio(losses).tolist()
