"""`opt.report()`: rank, captured energy, norms and bytes of every parameter, as text, HTML, a figure or scalars."""

from .contents import ParameterReport, Report, report

__all__ = ["ParameterReport", "Report", "report"]
