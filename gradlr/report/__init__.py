"""`opt.report()`: rank, captured energy, norms and bytes of every parameter, as one table, one figure, or scalars."""

from .metrics import Observation, Observer, UpdateMetrics
from .summary import ParameterReport, Report, describe, report

__all__ = ["Observation", "Observer", "ParameterReport", "Report", "UpdateMetrics", "describe", "report"]
