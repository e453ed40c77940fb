"""Twenty steps of each case end where they ended when they were recorded: what may be rewritten, and may not move.

Where a change of the numbers is meant, record anew (see golden/record.py):  PYTHONPATH=tests python -m golden.record [NAME ...]
"""

import pytest
import torch
from golden import digests
from golden.processes import run, run_in_processes
from golden.trajectories import DRAWN, TRAJECTORIES

# Of each tensor's largest entry. The same sums in another order differ in their last bits, 1e-16, and twenty steps carry that
# further; where directions of a gradient are all but null, shifted Cholesky factors amplify it. Noise of 1e-15 on all weights
# before each step comes out below a fiftieth of this (`record --sensitivity`). Whatever is computed otherwise moves far more.
RTOL = 1e-12

ALONE = [name for name, one in TRAJECTORIES.items() if one.processes == 1]
# FSDP2 of torch 2.6 asks the CPU's streams for events, which they do not have.
HAS_FSDP_ON_CPU = torch.__version__ >= "2.7"
IN_TWO = [name for name, one in TRAJECTORIES.items() if one.processes == 2]


def assert_as_recorded(name, kept):
    recorded = digests.read(name)
    assert recorded is not None, f"{name} was never recorded"
    now, bound = digests.digest(kept), 0.0 if TRAJECTORIES[name].is_exact else RTOL
    if now.get(DRAWN) != recorded.get(DRAWN):
        pytest.skip("recorded on a processor that draws other random numbers in float32")
    far = [move for move in digests.moves(recorded, now) if move.share > bound]
    assert not far, f"{len(far)} numbers of {name} have moved:\n" + "\n".join(map(str, far[:8]))


@pytest.fixture(scope="module")
def kept_in_two():
    return run_in_processes([name for name in IN_TWO if HAS_FSDP_ON_CPU or not name.startswith("sharded")], 2)


@pytest.mark.parametrize("name", ALONE)
def test_steps_end_where_they_were_recorded(name):
    assert_as_recorded(name, run(name))


@pytest.mark.parametrize("name", IN_TWO)
def test_steps_of_two_processes_end_where_they_were_recorded(name, kept_in_two):
    if name not in kept_in_two:
        pytest.skip("torch 2.6 shards no model on the CPU")
    assert_as_recorded(name, kept_in_two[name])


def test_every_file_is_of_a_case_and_all_are_small():
    files = list(digests.DATA.iterdir())
    assert {path.name for path in files} == {f"{name}.json" for name in TRAJECTORIES}
    assert sum(path.stat().st_size for path in files) < 200_000
