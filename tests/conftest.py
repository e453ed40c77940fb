"""Fixed seeds for every test, and one thread: on small matrices, waiting threads cost ten times what they save."""

from collections import defaultdict

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `sampled`, two thirds of the cases become slow, as in a Latin square.

    Three tests of the same parameters leave each pair of values of two parameters to at least one of them.
    """
    numbers, places = {}, defaultdict(dict)
    for item in items:
        if item.get_closest_marker("sampled") is None:
            continue
        test = item.path, item.originalname
        number = numbers.setdefault(test, len(numbers))
        for name, value in item.callspec.params.items():
            known = places[test, name]
            number += known.setdefault(repr(value), len(known))
        if number % 3:
            item.add_marker(pytest.mark.slow)
