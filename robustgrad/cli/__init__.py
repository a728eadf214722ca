"""The commands of `robustgrad`, one file each."""

import typer

from .check import check
from .report import report
from .weights import weights

# Plain texts: the names of files and columns may hold what a markup would take for its own.
app = typer.Typer(
    help="Worst-case weights, checks and reports from files of per-sample losses.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (weights, check, report):
    app.command()(command)
