"""Fixed seeds for every test, and one thread: on small matrices, waiting threads cost ten times what they save."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
