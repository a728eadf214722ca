"""What robustness costs and buys, from the losses of trained models: shift curves, worst cases, pictures, a page."""

from .curve import ShiftCurve, shift_curve
from .evaluation import Evaluation
from .page import save_page
from .pictures import gain_picture, group_picture, loss_picture, shift_picture
from .summary import ModelReport, Report, report
from .tables import shift_table

__all__ = [
    "Evaluation",
    "ModelReport",
    "Report",
    "ShiftCurve",
    "gain_picture",
    "group_picture",
    "loss_picture",
    "report",
    "save_page",
    "shift_curve",
    "shift_picture",
    "shift_table",
]
