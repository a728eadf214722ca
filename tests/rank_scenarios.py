"""What each of several gloo processes does in the tests of `distributed`, and how to start them."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, RobustOptimizer, TotalVariation

SETS: list[AmbiguitySet] = [TotalVariation(0.2), ChiSquare(0.5), KL(0.3), CVaR(0.3)]
SPLITS = {2: [(4, 4), (5, 3), (7, 1), (8, 0)], 4: [(2, 2, 2, 2), (5, 2, 1, 0)]}
STEPS = 14  # of 8 samples: the memory is filled after 8 of them


def start(scenario: str, world: int, **arguments: Any) -> list[Any]:
    """What the scenario returns on each rank; an exception comes back as itself."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (scenario, world, folder, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, scenario: str, world: int, folder: str, arguments: dict[str, Any]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    seconds = arguments.get("timeout", 60)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    try:
        out = globals()[scenario](rank, world, **{k: v for k, v in arguments.items() if k != "timeout"})
    except Exception as error:
        out = error
    torch.save(out, Path(folder) / f"{rank}.pt")
    if "timeout" not in arguments and not isinstance(out, Exception):
        dist.barrier()
    os._exit(0)  # a group that timed out is not waited for


# --- a loop whose steps are cut over ranks and micro-batches ---


def data(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def model() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 1).double()


def losses_of(net: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.softplus(net(x).squeeze(-1) + x[:, 0] * x[:, 1])


def train(
    ambiguity: AmbiguitySet, pool: str, split: tuple[int, ...], rank: int, *, micro: int = 100, average: bool = False
) -> tuple[Tensor, Reweighter]:
    """The parameters after STEPS steps; `average`: ranks take the mean of their own, whatever their number."""
    net, world = model(), len(split)
    optimizer = RobustOptimizer(torch.optim.SGD(net.parameters(), lr=0.3), ambiguity, pool=pool)
    for step in data():
        own = step.split(split)[rank]

        def loss_fn(part: Tensor, n: int = len(own)) -> Tensor:
            base = torch.full((len(part),), 1 / max(n, 1)) if average else None
            total = optimizer.reweight(losses_of(net, part), base=base).sum()
            return total / n if average else total * world / 8

        parts = own.split(micro) if len(own) else (own,)
        losses = optimizer.window(loss_fn, parts, model=net) if pool == "window" else map(loss_fn, parts)
        for loss in losses:
            loss.backward()
        average_gradients(net)
        optimizer.step()
        optimizer.zero_grad()
    return parameters(net), optimizer.reweighter


def average_gradients(net: nn.Module) -> None:
    if dist.is_initialized():
        for p in net.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def parameters(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def alone(ambiguity: AmbiguitySet, pool: str, base: Tensor | None = None) -> Tensor:
    """One process that sees all eight samples of each step at once."""
    net = model()
    optimizer = RobustOptimizer(torch.optim.SGD(net.parameters(), lr=0.3), ambiguity, pool=pool)
    share = torch.full((8,), 1 / 8) if base is None else base / base.sum()
    for step in data():

        def loss_fn(x: Tensor) -> Tensor:
            return (optimizer.reweight(losses_of(net, x), base=base) * share).sum()

        losses = optimizer.window(loss_fn, [step], model=net) if pool == "window" else [loss_fn(step)]
        for loss in losses:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(net)


def cuts(rank: int, world: int) -> dict[tuple[Any, ...], Any]:
    """Parameters for every set, pool and split; and the robust state, for the memory."""
    out: dict[tuple[Any, ...], Any] = {}
    for ambiguity in SETS:
        for split in SPLITS[world]:
            for pool, micro in (("memory", 100), ("memory", 1), ("window", 2), ("batch", 100)):
                found, reweighter = train(ambiguity, pool, split, rank, micro=micro)
                out[repr(ambiguity), split, pool, micro] = found
                if pool == "memory":
                    out[repr(ambiguity), split, "state", micro] = reweighter.state_dict()
    for split in SPLITS[world]:
        for pool in ("memory", "window", "batch"):
            out["ratio", split, pool] = ratios(ChiSquare(0.5), pool, split, rank)
    for split in [split for split in SPLITS[world] if all(split)]:
        for pool in ("memory", "window", "batch"):
            out["average", split, pool] = train(ChiSquare(0.5), pool, split, rank, average=True)[0]
    return out


def ratios(ambiguity: AmbiguitySet, pool: str, split: tuple[int, ...], rank: int) -> Tensor:
    """(STEPS, n) what `ratio` gives the own part of each step."""
    reweighter, out = Reweighter(ambiguity, pool=pool), []
    for step in data()[..., 0]:
        own = step.split(split)[rank]
        if pool == "window":
            with reweighter.survey(nn.Identity()):
                reweighter.ratio(own)
        out.append(reweighter.ratio(own))
        reweighter.step()
    return torch.stack(out)


# --- other people's wrappers ---


def wrapped_models(rank: int, world: int) -> dict[str, Tensor]:
    """DDP with accumulation under no_sync, and FSDP2, both with a sum over all samples of the step."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    out = {}
    for name in ("ddp", "fsdp"):
        for pool in ("memory", "window"):
            net: Any = model()
            if name == "ddp":
                net = DistributedDataParallel(net)
            else:
                fully_shard(net)
            optimizer = RobustOptimizer(torch.optim.SGD(net.parameters(), lr=0.3), ChiSquare(0.5), pool=pool)
            for step in data():
                # As many micro-batches on each rank: every forward of FSDP collects parameters.
                parts = step.split((5, 3))[rank].tensor_split(2)

                def loss_fn(part: Tensor, net: Any = net, optimizer: RobustOptimizer = optimizer) -> Tensor:
                    return optimizer.reweight(losses_of(net, part)).sum() * world / 8

                losses = optimizer.window(loss_fn, parts, model=net) if pool == "window" else map(loss_fn, parts)
                iterator = iter(losses)
                for last in (False, True):
                    sync(net, last)
                    next(iterator).backward()
                optimizer.step()
                optimizer.zero_grad()
            whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
            out[f"{name} {pool}"] = torch.cat([p.detach().flatten() for p in whole])
    return out


def sync(net: Any, on: bool) -> None:
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(on)
    else:
        net.require_backward_grad_sync = on


# --- state, groups, and what goes wrong ---


def mesh_and_group(rank: int, world: int) -> dict[str, Any]:
    """Two data-parallel groups of two ranks each, as with tensor parallelism between them."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    losses = torch.arange(4.0) + 10 * rank
    out: dict[str, Any] = {}
    for name, group in (
        ("mesh", mesh),
        ("one dimension", mesh["dp"]),
        ("group", mesh.get_group("dp")),
        ("world", None),
    ):
        leaf = losses.clone().requires_grad_()
        Reweighter(CVaR(0.25), pool="batch", process_group=group)(leaf).sum().backward()
        out[name] = leaf.grad
    for name, wrong in (("unnamed", init_device_mesh("cpu", (2, 2))), ("text", "dp")):
        try:
            Reweighter(CVaR(0.25), process_group=wrong)
        except (TypeError, ValueError) as error:
            out[name] = str(error)
    return out


def unmarked(rank: int, world: int) -> dict[str, Any]:
    """No step is ever marked: the ranks exchange in each call and stay equal."""
    reweighter = Reweighter(ChiSquare(0.5))
    generator = torch.Generator().manual_seed(rank)
    for _ in range(60):
        reweighter(torch.rand(5 if rank == 0 else 2, generator=generator).requires_grad_())
    metrics = {name: value.item() for name, value in reweighter.metrics().items()}
    return {"state": reweighter.state_dict(), "metrics": metrics}


def missed_call(rank: int, world: int) -> None:
    reweighter = Reweighter(ChiSquare(0.5))
    reweighter.expects_steps = True
    if rank == 0:
        reweighter(torch.rand(4, requires_grad=True))
    reweighter.step()
    time.sleep(6)  # alive, but busy with something else


def nan_on_one_rank(rank: int, world: int, pool: str) -> None:
    reweighter = Reweighter(ChiSquare(0.5), pool=pool, on_nonfinite="raise")
    reweighter.expects_steps = True
    losses = torch.tensor([1.0, torch.nan if rank == 1 else 2.0], requires_grad=True)
    reweighter(losses)


def groups_on_one_rank(rank: int, world: int) -> None:
    Reweighter(ChiSquare(0.5), pool="batch")(
        torch.rand(3, requires_grad=True), groups=torch.arange(3) if rank else None
    )


def groups_across_ranks(rank: int, world: int) -> Tensor:
    losses = torch.tensor([[1.0, 5.0], [3.0, 2.0]][rank], requires_grad=True)
    ids = torch.tensor([[7, 2**60 + 1], [7, 2**60]][rank])
    Reweighter(CVaR(0.5), pool="batch")(losses, groups=ids).sum().backward()
    return losses.grad
