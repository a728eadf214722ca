"""Draws the five pictures of docs/how_it_works.md with the package's own solver: python docs/pictures.py [FOLDER]"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, RobustOptimizer, TotalVariation
from robustgrad.objectives import bradley_terry

# One colour for each set, on every picture; told apart by colour-blind readers too.
SETS: dict[str, AmbiguitySet] = {
    "TotalVariation(0.1, cap=5)": TotalVariation(0.1, cap=5),
    "ChiSquare(0.5)": ChiSquare(0.5),
    "KL(0.3)": KL(0.3),
    "CVaR(0.4)": CVaR(0.4),
}
COLOURS = dict(zip(SETS, ("#d55e00", "#0072b2", "#009e73", "#cc79a7"), strict=True))


def losses(*shape: int, seed: int = 0) -> Tensor:
    """Like those of preference pairs: most are small, some are large."""
    margins = 1 + 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.softplus(-margins)


def ratios(axes: Axes) -> None:
    row = losses(400).sort().values
    for name, ambiguity in SETS.items():
        axes.plot(row, ambiguity.solve(row).ratio, label=name, color=COLOURS[name])
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":", label="plain averaging")
    axes.set(xlabel="loss of the sample", ylabel="ratio: what its gradient is multiplied by")


def reach(axes: Axes) -> None:
    row, grid = losses(4000), torch.logspace(-3, 1, 60).tolist()
    kinds: list[Callable[[float], AmbiguitySet]] = [
        lambda size: TotalVariation(size / 12, cap=5),
        ChiSquare,
        KL,
        lambda size: CVaR(1 / (1 + size)),
    ]
    for (name, _), kind in zip(SETS.items(), kinds, strict=True):
        worst = [kind(size).solve(row) for size in grid if size < 9]
        worst = [one for one in worst if one.ess > 0.1 * len(row)]
        shares = [float(one.ess) / len(row) for one in worst]
        label = name.split("(")[0] + (" with cap=5" if "cap" in name else "")
        axes.plot(shares, [float(one.value) for one in worst], label=label, color=COLOURS[name])
    axes.axhline(float(row.mean()), color="grey", linewidth=0.8, linestyle=":", label="mean: plain averaging")
    axes.set(xlabel="effective samples / samples", ylabel="worst-case mean loss", xlim=(1.02, 0.1))


def small_calls(axes: Axes) -> None:
    everything, sizes = losses(2**17), [2**k for k in range(9)]
    for name, ambiguity in SETS.items():
        whole = ambiguity.solve(everything)
        excess = float(whole.value - whole.mean)
        parts = [ambiguity.solve(everything.reshape(-1, size)) for size in sizes]
        kept = [float((part.value - part.mean).mean()) / excess for part in parts]
        axes.plot(sizes, kept, marker="o", markersize=3, label=f"{name}, per call", color=COLOURS[name])
        axes.plot(1, one_by_one(ambiguity, everything[:12_000]) / excess, "*", markersize=13, color=COLOURS[name])
    axes.plot([], [], "*", color="grey", markersize=10, label="with the memory, one by one")
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", ylim=(-0.05, 1.2))
    axes.set(xlabel="samples in a call", ylabel="share of the robust excess that is left")


def one_by_one(ambiguity: AmbiguitySet, stream: Tensor) -> float:
    """What the worst case adds to the mean where each loss comes alone, 32 a step; the first 2000 fill the memory."""
    reweighter = Reweighter(ambiguity)
    found = []
    for i, loss in enumerate(stream):
        found.append(reweighter.ratio(loss.reshape(1)))
        if i % 32 == 31:
            reweighter.step()
    seen, ratio = stream[2000:], torch.cat(found)[2000:]
    return float((ratio * seen).mean() - seen.mean())


def cuts(axes: Axes) -> None:
    ambiguity, past, step = ChiSquare(0.5), losses(512, seed=1), losses(32, seed=2)
    truth = losses(20_000, seed=3).sort().values
    axes.plot(truth, ambiguity.solve(truth).ratio, color="grey", linewidth=0.8, label="20 000 samples at once")
    for size, marker in ((32, "o"), (8, "x"), (1, "+")):
        reweighter = Reweighter(ambiguity)
        reweighter.ratio(past)
        reweighter.step()
        ratio = torch.cat([reweighter.ratio(part) for part in step.split(size)])
        axes.plot(step, ratio, marker, markersize=4 + 3 * (size == 32), fillstyle="none", color="#0072b2",
                  label=f"memory, {32 // size} x {size}")  # fmt: skip
    alone = torch.cat([ambiguity.solve(part).ratio for part in step.split(8)])
    axes.plot(step, alone, "s", markersize=4, color="#d55e00", label="solved per call, 4 x 8")
    axes.plot(step, torch.ones(32), "d", markersize=3, color="#cc79a7", label="solved per call, 32 x 1")
    axes.set(xlabel="loss of the sample", ylabel="ratio", xlim=(0, 2), ylim=(-0.1, 4))


def shift(axes: Axes) -> None:
    shares = torch.linspace(0, 1, 51)
    for radius, colour in ((0.0, "grey"), (0.1, "#d55e00"), (0.2, "#cc79a7")):
        found = torch.stack([trained(radius, seed) for seed in range(5)])
        lines = (1 - shares) * found[:, :1] + shares * found[:, 1:]
        axes.plot(shares, lines.mean(0), color=colour, label=f"radius {radius:g}" if radius else "plain")
        axes.fill_between(shares, lines.amin(0), lines.amax(0), color=colour, alpha=0.15, linewidth=0)
    axes.axvline(0.1, color="grey", linewidth=0.8, linestyle=":", label="in the training data")
    axes.set(xlabel="share of prompts that punish length", ylabel="mean loss of the trained reward model")


def trained(radius: float, seed: int) -> Tensor:
    """The task of examples/quickstart.py: mean loss on fresh pairs of the majority and of the minority."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = torch.nn.Linear(2, 1)
    optimizer = RobustOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-2), TotalVariation(radius))
    for _ in range(400):
        loss = optimizer.reweight(pair_losses(model, torch.rand(32, generator=random) < 0.1, random)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        kinds = (torch.zeros(5000, dtype=torch.bool), torch.ones(5000, dtype=torch.bool))
        return torch.stack([pair_losses(model, kind, random).mean() for kind in kinds])


def pair_losses(model: torch.nn.Module, minority: Tensor, random: torch.Generator) -> Tensor:
    n = len(minority)
    rejected = torch.randn(n, 2, generator=random)
    better = torch.stack([torch.where(minority, -1.0, 1.0), torch.full((n,), 0.5)], dim=1)
    chosen = rejected + better + 0.3 * torch.randn(n, 2, generator=random)
    return bradley_terry(model(chosen).squeeze(-1), model(rejected).squeeze(-1))


PICTURES = (ratios, reach, small_calls, cuts, shift)


def draw(folder: Path, pictures: Iterable[Callable[[Axes], None]] = PICTURES) -> None:
    """The same files to the byte each time, with the same versions."""
    plt.rcParams.update({"svg.hashsalt": "robustgrad", "font.size": 9, "legend.fontsize": 8})
    for picture in pictures:
        figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
        picture(axes)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / f"{picture.__name__}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
