"""What two runs of finetune have left behind, compared bit for bit."""

import json

import torch

# Of the log: what a clock or the system tells.
TIMED = ("tokens_per_second", "peak_memory", "train_runtime", "train_samples_per_second", "train_steps_per_second",
         "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "total_flos", "train_loss")  # fmt: skip


def assert_same(one, other):
    for path in (one / "model").iterdir():
        assert path.read_bytes() == (other / "model" / path.name).read_bytes(), path.name
    left, right = (sorted((path / "checkpoints").iterdir()) for path in (one, other))
    assert [path.name for path in left] == [path.name for path in right] and len(left) == 1
    for name in ("optimizer.pt", "scheduler.pt"):
        states = (torch.load(path / name, weights_only=True) for path in (*left, *right))
        assert list(differences(*states)) == [], name
    assert history(one) == history(other)


def differences(one, other, path=""):
    """Where two checkpoints differ, in a bit or more."""
    if type(one) is not type(other):
        yield path
    elif isinstance(one, dict):
        yield from [path] if one.keys() != other.keys() else ()
        yield from (found for key in one for found in differences(one[key], other.get(key), f"{path}/{key}"))
    elif isinstance(one, list | tuple):
        yield from [path] if len(one) != len(other) else ()
        pairs = enumerate(zip(one, other, strict=False))
        yield from (found for index, pair in pairs for found in differences(*pair, f"{path}/{index}"))
    elif not (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other):
        yield path


def log(out):
    """The log in the last checkpoint."""
    last = max((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def history(out):
    return [{key: value for key, value in entry.items() if key not in TIMED} for entry in log(out)]


def logged(out, key):
    return [entry[key] for entry in log(out) if key in entry]
