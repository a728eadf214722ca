"""The report as one HTML page that needs nothing else: no network, no script, pictures inlined."""

from __future__ import annotations

import base64
import io
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from .pictures import gain_picture, group_picture, loss_picture, shift_picture
from .summary import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_page(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the page; texts, names and groups are escaped, whatever they hold. Returns its path.

    Raises: ImportError: matplotlib or Jinja is missing: pip install "robustgrad[plot]".
    """
    path = Path(path)
    # Half of a surrogate pair, as a cut through an emoji leaves it, cannot be written.
    path.write_bytes(render(report).encode("utf-8", "replace"))
    return path


def render(report: Report) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError('jinja2 is missing. Install it with pip install "robustgrad[plot]".') from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    pictures = [(model, _inlined(group_picture(model)), _inlined(loss_picture(model))) for model in report.models]
    curves = {"shift": _inlined(shift_picture(report)), "gain": _inlined(gain_picture(report))}
    return template.render(report=report, pictures=pictures, **curves)


def _inlined(figure: Figure | None) -> str | None:
    if figure is None:
        return None
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
