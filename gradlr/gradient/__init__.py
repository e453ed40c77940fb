"""How a gradient is seen: as a linear operator with two products, captured by hooks."""

from .hook import HookCapture
from .operator import Dense, GradientOperator, Sketched

__all__ = ["Dense", "GradientOperator", "HookCapture", "Sketched"]
