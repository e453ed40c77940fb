"""How a gradient is seen: as a linear operator with two products."""

from .factors import OuterProduct, RowSparse
from .head import RowsOnDemand
from .operator import Dense, GradientOperator, Sketched

__all__ = ["Dense", "GradientOperator", "OuterProduct", "RowSparse", "RowsOnDemand", "Sketched"]
