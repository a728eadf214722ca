"""The pictures of the page."""

from __future__ import annotations

from pathlib import Path

from .comparisons import MAJORITY, MINORITY, Comparison
from .known_tables import LINEAR, NOISY
from .methods import RADII
from .results import Results


def draw(results: Results, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    if results.known_set is None:
        return
    _radii(results, folder / "radius.png")
    _gains(results, folder / "gains.png")


def _radii(results: Results, path: Path) -> None:
    """Accuracy on both domains against the radius, without label noise and with."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(12, 6), sharex="col", sharey="row", layout="constrained")
    for row, (title, cell) in zip(panels, {"right labels": LINEAR, "20% wrong labels": NOISY}.items(), strict=True):
        own = Comparison(results, cell)
        for panel, name in zip(row, ("TV", "chi-square", "KL"), strict=True):
            methods = [method for method in RADII if method.startswith(f"{name} ")]
            radii = [float(method.rsplit(" ", 1)[1]) for method in methods]
            for which, label in ((MAJORITY, "majority"), (MINORITY, "minority")):
                panel.plot(radii, [own.accuracy(method, which) for method in methods], "o-", label=label)
            panel.set_xscale("symlog", linthresh=0.01)
            panel.grid(alpha=0.3)
            panel.set_title(f"{name}, {title}")
        row[0].set_ylabel("accuracy")
    for panel in panels[1]:
        panel.set_xlabel("radius (0: plain)")
    panels[0][0].legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _gains(results: Results, path: Path) -> None:
    """What each method gains over plain training, with its interval."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for panel, (title, cell) in zip(panels, {"right labels": LINEAR, "20% wrong labels": NOISY}.items(), strict=True):
        own = Comparison(results, cell)
        for shift, (which, label) in zip((-0.15, 0.15), ((MAJORITY, "majority"), (MINORITY, "minority")), strict=True):
            gains = [own.gain(method, which) for method in own.others]
            places = [place + shift for place in range(len(own.others))]
            middle = [gain.mean for gain in gains]
            ends = [[gain.mean - gain.low for gain in gains], [gain.high - gain.mean for gain in gains]]
            panel.errorbar(middle, places, xerr=ends, fmt="o", label=label)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set(title=title, xlabel="accuracy - plain, 95% interval")
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(own.others)), own.others)
    panels[0].invert_yaxis()
    panels[0].legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
