"""Fixed seeds for every test, and one thread: on small matrices, waiting threads cost ten times what they save."""

import os
from collections import defaultdict

import pytest
import torch

from gradlr import tensors

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # asked for when Triton is imported


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def asynchronous(monkeypatch):
    """CPU tensors count as those of a device that the host runs ahead of, so that what only a GPU would take is run."""
    traits = tensors.DeviceTraits(is_async=True, widest_float=torch.float64)
    monkeypatch.setitem(tensors._OVERRIDES, "cpu", traits)


@pytest.fixture(autouse=True)
def _device_is(request):
    if getattr(request, "param", None) == "asynchronous":
        if only := request.node.get_closest_marker("synchronous"):  # of one of the test's parameters
            pytest.skip(only.args[0])
        request.getfixturevalue("asynchronous")


def pytest_generate_tests(metafunc):
    """Tests marked `also_asynchronous` are run in both modes, but for those marked `synchronous`."""
    if metafunc.definition.get_closest_marker("also_asynchronous") and not metafunc.definition.get_closest_marker("synchronous"):
        metafunc.parametrize("_device_is", ["synchronous", "asynchronous"], indirect=True)


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
