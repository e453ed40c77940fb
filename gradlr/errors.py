"""The errors and the warning that gradlr raises; every message says what, where, with which numbers, and what to do."""

import sys
import warnings
from pathlib import Path


class GradlrError(Exception):
    """Root of all errors of gradlr: `except gradlr.GradlrError` catches each of them."""


class ArgumentError(GradlrError, ValueError):
    """An argument is out of range, unknown, or matches nothing. Nothing was changed."""


class ShapeError(GradlrError, ValueError):
    """A tensor has a shape that the operation is not defined for."""


class LossError(GradlrError, ValueError):
    """What was shown to the tracker is not one real number."""


class AttachError(GradlrError, RuntimeError):
    """The model cannot be attached to, or is not the model any more that was attached to."""


class BackwardError(GradlrError, RuntimeError):
    """A backward pass does something that an update inside backward would get wrong."""


class ParallelError(GradlrError, RuntimeError):
    """The processes of a group do not train one and the same model, or one of them is gone."""


class NonFiniteError(GradlrError, ArithmeticError):
    """A gradient holds NaN or infinity."""


class CheckpointError(GradlrError, ValueError):
    """A state_dict does not fit the optimizer or tracker it is loaded into."""


class GradlrWarning(UserWarning):
    """Something is legal and yet probably not what was meant."""


# Warnings point at the user's line: neither into gradlr nor into torch, whose wrappers stand between.
_OWN = (str(Path(__file__).parent), f"{Path('site-packages', 'torch')}", f"{Path('dist-packages', 'torch')}")


def warn(message: str) -> None:
    """Warn of something legal that was probably not meant, at the line outside of gradlr and torch that led to it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and any(place in frame.f_code.co_filename for place in _OWN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, GradlrWarning, stacklevel=level)
