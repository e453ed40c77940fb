"""What two runs of finetune have left behind, compared bit for bit."""

import json

import torch


def assert_same(one, other):
    for path in (one / "model").iterdir():
        assert path.suffix == ".pt" or path.read_bytes() == (other / "model" / path.name).read_bytes()
    left, right = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (one, other))
    for state in (left, right):
        del state["more"]["done"]["value"]["seconds"]
    assert list(differences(left, right)) == []
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


def history(out):
    timed = ("rate", "memory")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]
