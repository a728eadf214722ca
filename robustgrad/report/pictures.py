"""The report as matplotlib pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .curve import ShiftCurve
from .summary import ModelReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#0072b2", "#d55e00")  # told apart by colour-blind readers too
_SHOWN = 12  # groups


def shift_picture(report: Report) -> Figure:
    """The shift curve of each model, with its band."""
    axes = _axes("expected loss, worst case")
    for model, color in zip(report.models, _COLORS, strict=False):
        _curve(axes, model.curve, color, model.name)
    axes.legend(frameon=False)
    return _of_shares(axes)


def gain_picture(report: Report) -> Figure | None:
    """How much lower the second model's shift curve is; None for one model."""
    if report.gain is None:
        return None
    axes = _axes(f"loss saved by {_plain(_short(report.models[1].name))}")
    _curve(axes, report.gain, "#009e73", "")
    axes.axhline(0.0, color="grey", linewidth=0.8)
    return _of_shares(axes)


def group_picture(model: ModelReport) -> Figure | None:
    """What share of the weight each group has, before and in the worst case; None without groups."""
    rows = model.groups[:_SHOWN]
    if not rows:
        return None
    axes = _axes("", height=1.2 + 0.42 * len(rows))
    places = range(len(rows))
    axes.barh([i - 0.2 for i in places], [row.share for row in rows], 0.38, color="#bbbbbb", label="all")
    worst = [row.worst_share for row in rows]
    axes.barh([i + 0.2 for i in places], worst, 0.38, color=_COLORS[1], label="in the worst case")
    axes.set_yticks(list(places), [_plain(_short(row.group)) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of the weight")
    axes.xaxis.set_major_formatter(_percent)
    axes.legend(frameon=False)
    return _figure_of(axes)


def loss_picture(model: ModelReport) -> Figure:
    """How the losses are distributed, before and in the worst case."""
    axes, losses = _axes("share of the weight"), model.losses.numpy()
    bins = 40 if losses.min() < losses.max() else 1
    axes.hist(losses, bins, weights=model.base.numpy(), color="#bbbbbb", label="all")
    axes.hist(losses, bins, weights=model.weights.numpy(), color=_COLORS[1], histtype="step", label="in the worst case")
    axes.set_xlabel("loss")
    axes.legend(frameon=False)
    return _figure_of(axes)


def _axes(ylabel: str, height: float = 3.4) -> Axes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is missing. Install it with pip install "robustgrad[plot]".') from error
    # Not through pyplot: no window, no backend, nothing global.
    axes: Axes = Figure(figsize=(5.6, height), layout="constrained").subplots()
    axes.set_ylabel(ylabel)
    return axes


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _of_shares(axes: Axes) -> Figure:
    axes.set_xlabel("share of the prompts that changes")
    axes.xaxis.set_major_formatter(_percent)
    return _figure_of(axes)


def _curve(axes: Axes, curve: ShiftCurve, color: str, label: str) -> None:
    axes.plot(curve.shares, curve.values, color=color, marker="o", markersize=3, label=_plain(_short(label)))
    axes.fill_between(curve.shares, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)


def _percent(share: float, _: object) -> str:
    return f"{share:.0%}"


def _short(text: str) -> str:
    return text if len(text) <= 32 else text[:31] + "…"


def _plain(text: str) -> str:
    """As matplotlib shows it: on one line, not as a formula, and not hidden by a leading underscore."""
    # Half of a surrogate pair cannot be drawn.
    readable = " ".join(text.encode("utf-8", "replace").decode().split())
    return readable.replace("$", r"\$").lstrip("_")
