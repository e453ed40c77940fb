"""How a gradient is seen: as a linear operator with two products."""

from .factors import OuterProduct, RowSparse
from .operator import Dense, GradientOperator, Sketched
from .rows_on_demand import RowsOnDemand

__all__ = ["Dense", "GradientOperator", "OuterProduct", "RowSparse", "RowsOnDemand", "Sketched"]
