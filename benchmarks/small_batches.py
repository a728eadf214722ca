"""How robust is what you get when the samples come one by one?

    python benchmarks/small_batches.py [--quick] [--seeds 8] [--jobs 2] [--out benchmarks/results]

A logistic preference model on a population of pairs from a majority and two minorities (80 / 15 / 5%) that
weigh the same features differently. Its worst-case objective F is known and minimised to convergence in
float64, then each method runs the same 800 steps of 32 pairs, cut into micro-batches of 1, 8 or 32:

    s = (F(theta) - F*) / (F(theta_ERM) - F*)        0 is the robust optimum, 1 is what plain training reaches

Besides the plain case: losses whose level and spread shrink tenfold while training, and dropout. All runs start
where every loss is log 2. Writes a CSV and a picture.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean, median

import torch
from measuring import Row, machine, write_csv
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import softplus

from robustgrad import KL, AmbiguitySet, ChiSquare, CVaR, Reweighter, TotalVariation, robust_loss

BATCH, STEPS, POPULATION, LR = 32, 800, 4000, 0.1
SETS: dict[str, AmbiguitySet] = {
    "chi-square 1": ChiSquare(1.0),
    "chi-square .1": ChiSquare(0.1),
    "KL .5": KL(0.5),
    "CVaR .2": CVaR(0.2),
    "TV .2": TotalVariation(0.2, cap=1 + 0.2 * BATCH),  # the cap that the memory has for 32 samples a step
}
METHODS = ["plain", "micro-batch 1", "micro-batch 8", "window", "memory 1", "memory 8", "full data"]
HARDER = ["plain", "window", "memory 1"]
CASES = {"plain": METHODS, "drift": HARDER, "dropout": HARDER}
# At micro-batch 1, on every seed: the memory's s in units of the window's.
TARGETS = {"chi-square 1": 0.5, "chi-square .1": 0.5, "KL .5": 0.5, "TV .2": 0.5, "CVaR .2": 1.0}


def population(seed: int) -> Tensor:
    """(n, 6) feature differences chosen - rejected, group after group: clear margins, 1% of the labels wrong.

    The groups agree on four features and disagree on the second, and each minority has one of its own: the
    robust optimum is neither zero nor the plain one.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.tensor(
        [[1.5, 1.5, 0.5, 0.0, 0.0, 0.5], [1.5, -0.5, 0.5, 1.0, 0.0, 0.5], [1.5, -0.5, 0.5, 0.0, 1.0, 0.5]],
        dtype=torch.float64,
    )
    parts = []
    for share, direction in zip((0.80, 0.15, 0.05), wanted, strict=True):
        x = torch.randn(4 * POPULATION, 6, generator=generator, dtype=torch.float64)
        x = x[(x @ direction).abs() > 1][: round(share * POPULATION)]
        flips = torch.where(torch.rand(len(x), generator=generator) < 0.01, -1.0, 1.0)
        parts.append(x * ((x @ direction).sign() * flips)[:, None])
    return torch.cat(parts)


def minimised(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """The minimiser of a convex function of six numbers: L-BFGS, then subgradient steps from where it stalls."""
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    for _ in range(5):
        lbfgs = torch.optim.LBFGS([theta], max_iter=200, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def closure(lbfgs: torch.optim.LBFGS = lbfgs) -> Tensor:
            lbfgs.zero_grad()
            value = objective(theta)
            value.backward()
            return value

        lbfgs.step(closure)
    best, lowest = theta.detach().clone(), objective(theta).item()
    point, mean = best.clone(), torch.zeros(6, dtype=torch.float64)
    for t in range(1500):
        leaf = point.clone().requires_grad_()
        objective(leaf).backward()
        point = point - 0.3 / (1 + t / 10) * leaf.grad
        mean += (point - mean) / (1 + t / 2)  # later points count more
        for candidate in (point, mean) if t % 25 == 24 else ():
            if (value := objective(candidate).item()) < lowest:
                best, lowest = candidate.clone(), value
    return best


def losses_of(theta: Tensor, x: Tensor) -> Tensor:
    return softplus(-x @ theta)


def trained(method: str, ambiguity: AmbiguitySet, data: Tensor, seed: int, case: str) -> Tensor:
    """The average of the second half of the iterates, after all steps of SGD."""
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    mean, model = torch.zeros(6, dtype=torch.float64), torch.nn.Dropout(0.1 if case == "dropout" else 0.0)
    kind, _, size = method.partition(" ")
    pool = {"micro-batch": "batch", "window": "window", "memory": "memory"}.get(kind)
    reweighter = None if pool is None else Reweighter(ambiguity, pool=pool)
    micro = int(size) if size.isdigit() else BATCH
    order = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    for t in range(STEPS):
        scale = 10 ** (-t / STEPS) if case == "drift" else 1.0
        chosen = torch.randint(len(data), (BATCH,), generator=order)
        full = ambiguity.solve(losses_of(theta.detach(), data)).ratio if method == "full data" else None

        # Level and spread shrink together; the step is stretched by as much below.
        def loss_fn(index: Tensor, theta: Tensor = theta, full: Tensor | None = full, scale: float = scale) -> Tensor:
            losses = scale * (losses_of(theta, model(data[index])) + 1.0)
            if full is not None:
                losses = losses * full[index]
            return (losses if reweighter is None else reweighter(losses)).sum() / BATCH

        parts = chosen.split(micro)
        window = reweighter is not None and pool == "window"
        for loss in reweighter.window(loss_fn, parts, model=model) if window else map(loss_fn, parts):
            loss.backward()
        with torch.no_grad():
            theta -= LR * (1 - 0.9 * t / STEPS) / scale * theta.grad
        theta.grad = None
        if reweighter is not None:
            reweighter.step()
        if t >= STEPS // 2:
            mean += theta.detach() / (STEPS - STEPS // 2)
    return mean


def one_seed(job: tuple[int, dict[str, list[str]]]) -> list[Row]:
    """All sets, methods and cases of one seed."""
    import warnings

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*batch pool of")  # what the table is about
    seed, cases = job
    data, rows = population(seed), []
    erm = minimised(lambda theta: losses_of(theta, data).mean())
    for name, ambiguity in SETS.items():

        def worst(theta: Tensor, ambiguity: AmbiguitySet = ambiguity) -> Tensor:
            return robust_loss(losses_of(theta, data), ambiguity)

        lowest, plain = worst(minimised(worst)).item(), worst(erm).item()
        for case, method in [(case, method) for case, methods in cases.items() for method in methods]:
            value = worst(trained(method, ambiguity, data, seed, case)).item()
            s = (value - lowest) / (plain - lowest)
            about = {"set": name, "case": case, "method": method, "seed": seed}
            rows.append(about | {"s": s, "F": value, "F_min": lowest, "F_ERM": plain})
    return rows


def geometric_mean(values: list[float]) -> float:
    return math.exp(fmean(math.log(max(value, 1e-12)) for value in values))


def groups(rows: list[Row], *keys: str) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    seen: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        seen.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from seen.items()


def discrete(seed: int) -> Row:
    """Losses that are 0 or 1: the mean ratio, which should be 1, and the worst-case value that is reached."""
    generator, out = torch.Generator().manual_seed(seed), {"seed": seed}
    for name, ambiguity in SETS.items():
        reweighter, ratios, paid = Reweighter(ambiguity), [], []
        for _ in range(200):
            losses = (torch.rand(BATCH, generator=generator) < 0.15).double().requires_grad_()
            reweighter(losses).sum().backward()
            reweighter.step()
            ratios.append(losses.grad.mean().item())
            paid.append((losses.grad * losses.detach()).mean().item())
        worst = ambiguity.solve((torch.arange(10000) < 1500).double()).value.item()
        out |= {f"{name}: mean ratio": fmean(ratios[50:]), f"{name}: value": fmean(paid[50:]) / worst}
    return out


def show(console: Console, rows: list[Row], discretes: list[Row]) -> None:
    for (case,), part in groups(rows, "case"):
        table = Table("set", title=f"s, geometric mean (lowest to highest) of the seeds: {case}")
        methods = list(dict.fromkeys(row["method"] for row in part))
        for method in methods:
            table.add_column(method, justify="right")
        for (name,), own in groups(part, "set"):
            cells = []
            for method in methods:
                s = [row["s"] for row in own if row["method"] == method]
                cells.append(f"{geometric_mean(s):.2g}\n({min(s):.2g} to {max(s):.2g})")
            table.add_row(name, *cells)
        console.print(table)
    table = Table("set", "target", "median", "worst seed", "kept on", title="memory 1 / window, seed by seed (plain)")
    plain = {(row["set"], row["method"], row["seed"]): row["s"] for row in rows if row["case"] == "plain"}
    for name, target in TARGETS.items():
        seeds = sorted({seed for own, _, seed in plain if own == name})
        times = [plain[name, "memory 1", seed] / plain[name, "window", seed] for seed in seeds]
        kept = sum(value <= target for value in times)
        table.add_row(name, f"{target}", f"{median(times):.2f}", f"{max(times):.2f}", f"{kept} of {len(times)} seeds")
    console.print(table)
    table = Table("set", "mean ratio", "value / worst case", title="Losses that are 0 or 1, memory")
    for name in SETS:
        cells = [f"{fmean(row[f'{name}: {what}'] for row in discretes):.3f}" for what in ("mean ratio", "value")]
        table.add_row(name, *cells)
    console.print(table)


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(CASES), figsize=(16, 4.5), sharey=True, layout="constrained")
    for panel, case in zip(panels, CASES, strict=True):
        for i, name in enumerate(SETS):
            for j, method in enumerate(METHODS):
                s = [row["s"] for row in rows if (row["set"], row["case"], row["method"]) == (name, case, method)]
                if s:
                    label = method if i == 0 else None
                    panel.plot([i + (j - 3.5) / 12] * len(s), s, ".", color=f"C{j}", alpha=0.5)
                    panel.plot(i + (j - 3.5) / 12, geometric_mean(s), "D", color=f"C{j}", label=label)
        panel.set_xticks(range(len(SETS)), SETS, rotation=20)
        panel.set(yscale="log", title=case)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("s: 0 robust optimum, 1 plain optimum")
    panels[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, three methods, the plain case")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    cases = {"plain": HARDER} if arguments.quick else CASES
    seeds = 2 if arguments.quick else arguments.seeds
    console = Console(width=160)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        jobs = pool.map(one_seed, [(seed, cases) for seed in range(seeds)])
        rows = [row for part in track(jobs, "seeds", seeds, console=console) for row in part]
    discretes = [discrete(seed) for seed in range(seeds)]
    show(console, rows, discretes)
    if arguments.quick:
        return
    path = arguments.out / "small_batches.csv"
    write_csv(path, rows, machine("cpu"))
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
