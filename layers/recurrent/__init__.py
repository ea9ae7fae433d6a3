"""Nonlinear recurrences, solved for all times at once (ParaRNN, arXiv 2510.21450)."""

from hackle.layers.recurrent.dispatch import gru, gru_with_info, lstm, lstm_with_info
from hackle.layers.recurrent.layers import ParaGRU, ParaLSTM
from hackle.layers.recurrent.newton import SolveInfo
from hackle.layers.recurrent.newton_scan import check_jacobian, newton_scan

__all__ = [
    "ParaGRU",
    "ParaLSTM",
    "SolveInfo",
    "check_jacobian",
    "gru",
    "gru_with_info",
    "lstm",
    "lstm_with_info",
    "newton_scan",
]
