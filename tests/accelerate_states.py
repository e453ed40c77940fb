"""What accelerate keeps for the whole process, and tests must not leave to each other."""

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState


def forget_accelerate():
    # Precision and accumulation are one for the process.
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def fresh_accelerate():
    forget_accelerate()
    yield
    forget_accelerate()
