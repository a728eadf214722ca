"""The speed targets, each with where its figure comes from and when it is met."""

from __future__ import annotations

from collections.abc import Callable

Row = dict[str, str]
Results = dict[str, list[Row]]
Figure = Callable[[Results], str | None]
Met = Callable[[str], bool]

TV, CHI2, KL, CVAR = "TotalVariation(radius=0.1)", "ChiSquare(radius=0.5)", "KL(radius=0.5)", "CVaR(alpha=0.2)"
CLOSED_FORM = (TV, CHI2, CVAR)
EVERY = (*CLOSED_FORM, KL)
FUSED = [
    (of_sets, sets, at, sizes, limit)
    for of_sets, sets in (("total variation, chi-square, CVaR", CLOSED_FORM), ("KL", (KL,)))
    for at, sizes, limit in (("up to 512 losses", (8, 64, 512), 2), ("65,536 losses", (65536,), 12))
]


def solves(results: Results, sets: tuple[str, ...], sizes: tuple[int, ...], rows: int = 1) -> list[Row]:
    found = results.get("weight_solver_throughput_cpu", [])
    return [row for row in found if row["set"] in sets and int(row["n"]) in sizes and int(row["rows"]) == rows]


def slowest(of: str, sizes: tuple[int, ...] = (8, 64, 512)) -> Figure:
    """The most microseconds of a set among the sizes."""

    def figure(results: Results) -> str | None:
        times = [float(row["exact_us"]) for row in solves(results, (of,), sizes)]
        return f"{max(times):.0f} us" if times else None

    return figure


def least_times(over: str, sizes: tuple[int, ...]) -> Figure:
    """How many times as long a competitor takes, where it comes closest."""

    def figure(results: Results) -> str | None:
        several = solves(results, EVERY, sizes)
        times = [float(row[f"{over}_us"]) / float(row["exact_us"]) for row in several if _number(row[f"{over}_us"])]
        return f"{min(times):.1f}x" if times else None

    return figure


def most_times(over: str, sets: tuple[str, ...], sizes: tuple[int, ...], rows: int = 1, of: str = "exact") -> Figure:
    """How many times as long as a yardstick we take, where it is most."""

    def figure(results: Results) -> str | None:
        several = [row for row in solves(results, sets, sizes, rows) if row.get(f"{of}_us")]
        times = [float(row[f"{of}_us"]) / float(row[f"{over}_us"]) for row in several]
        return f"{max(times):.2f}x" if times else None

    return figure


def fused(results: Results) -> Results:
    """The results as if the C++ kernel were the exact solve."""
    rows = results.get("weight_solver_throughput_cpu", [])
    return results | {
        "weight_solver_throughput_cpu": [row | {"exact_us": row["fused_us"]} for row in rows if row.get("fused_us")]
    }


def of_pool(column: str, sets: tuple[str, ...]) -> Figure:
    def figure(results: Results) -> str | None:
        times = [float(row[column]) for row in results.get("memory_pool_cost_cpu", []) if row["set"] in sets]
        return f"{max(times):.0f} us" if times else None

    return figure


def most_launches(results: Results) -> str | None:
    rows = [row for row in results.get("memory_pool_launches", []) if row["by_kernels"]]
    if not rows:
        return None
    within, first = (max(int(row[name]) for row in rows) for name in ("by_kernels", "by_kernels_first_of_step"))
    return f"{first} in the first of a step and {within} in the others, counted without a GPU"


def share(ranks: int, samples: int) -> Figure:
    def figure(results: Results) -> str | None:
        for row in results.get("scaling", []):
            if (int(row["ranks"]), int(row["samples"])) == (ranks, samples):
                return f"{float(row['percent_of_1s_step']):.1f}% of a 1 s step, {row['how']}"
        return None

    return figure


def compiled_over_mean(size: int) -> Figure:
    def figure(results: Results) -> str | None:
        times = [float(row["compiled_times_mean"]) for row in results.get("compiled_solver_cpu", [])
                 if int(row["n"]) == size]  # fmt: skip
        return f"{max(times):.0f}x" if times else None

    return figure


def said(text: str) -> Figure:
    return lambda results: text


def nothing(results: Results) -> str | None:
    return None


def at_most(limit: float) -> Met:
    return lambda figure: _leading(figure) <= limit


def at_least(limit: float) -> Met:
    return lambda figure: _leading(figure) >= limit


def _leading(figure: str) -> float:
    return float(figure.split()[0].rstrip("x,"))


def _number(cell: str) -> bool:
    return cell.replace(".", "", 1).isdigit()


TARGETS: list[tuple[str, Figure, Met | None]] = [
    ("chi-square, up to 512 losses: at most 80 us", slowest(CHI2), at_most(80)),
    ("total variation, up to 512 losses: at most 50 us", slowest(TV), at_most(50)),
    ("CVaR, up to 512 losses: at most 50 us", slowest(CVAR), at_most(50)),
    ("KL, up to 512 losses: at most 700 us", slowest(KL), at_most(700)),
    *((f"at least 100 times cvxpy's speed at {n} losses", least_times("cvxpy", (n,)), at_least(100))
      for n in (8, 64, 512, 4096)),
    *((f"at least 8 times bisection's speed at {n:,} losses", least_times("bisection", (n,)), at_least(8))
      for n in (8, 512, 65536, 2**20)),
    ("65,536 losses: no slower than one sort", most_times("sort", EVERY, (65536,)), at_most(1)),
    ("4096 rows of 64: at most 3 sorts of the same tensor", most_times("sort", EVERY, (64,), 4096),
     at_most(3)),
    ("memory of 512, fit of total variation, chi-square, CVaR: at most 60 us", of_pool("fit_us", CLOSED_FORM),
     at_most(60)),
    ("memory of 512, fit of KL: at most 320 us", of_pool("fit_us", (KL,)), at_most(320)),
    ("ratio of a new loss: at most 30 us", of_pool("ratio_1_us", EVERY), at_most(30)),
    *((f"fused CPU path, {of_sets}, {at}: at most {limit} times `mean()`",
       most_times("mean", sets, sizes, of="fused"), at_most(limit)) for of_sets, sets, at, sizes, limit in FUSED),
    *((f"its operator alone, {of_sets}, {at}: at most {limit} times `mean()`",
       most_times("mean", sets, sizes, of="operator"), at_most(limit)) for of_sets, sets, at, sizes, limit in FUSED),
    *((f"torch.compile instead, {n:,} losses: at most {limit} times `mean()`", compiled_over_mean(n), at_most(limit))
      for n, limit in ((512, 2), (65536, 12))),
    ("fused CPU path, up to 4096 losses: at least 1000 times cvxpy's speed",
     lambda results: least_times("cvxpy", (8, 64, 512, 4096))(fused(results)), at_least(1000)),
    ("CUDA: one launch a solve up to 4096 losses", nothing, None),
    ("CUDA: within 5 copies of 1e7 losses", nothing, None),
    ("CUDA: no host sync, capturable in a CUDA graph", nothing, None),
    ("CUDA: memory pool, at most 3 launches a micro-batch", most_launches, at_most(3)),
    ("kernel in Triton's interpreter: within 2e-6 of torch, same ties", said("tests/test_kernel.py"), None),
    ("kernel builds for sm_80 and sm_90", said("tests/test_kernel.py"), None),
    ("torch.compile(fullgraph=True), torch.func", said("tests/test_compiled.py"), None),
    ("4 ranks, 1e6 samples a step", share(4, 1_000_000), None),
    ("1024 ranks, 1e6 samples a step", share(1024, 1_000_000), None),
]  # fmt: skip
