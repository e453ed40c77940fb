"""Every way in which one entry of a saved dict can be another than it should."""

import copy
import functools

import torch

from gradlr import CheckpointError


def paths(value, path=()):
    """Where each entry lies, keys of dicts and indices of lists."""
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from paths(item, (*path, key))


def damages(value):
    """Other values in an entry's place."""
    yield from (None, "text", 2.5, -1, True, [], {}, torch.zeros(2, 3, 2, 2), torch.zeros(1, dtype=torch.complex64), [None])
    if isinstance(value, torch.Tensor):
        yield from (value.unsqueeze(0), value[..., None], value.bool(), value.to_sparse() if value.ndim else value)
        yield from (torch.cat([value, value]), value[:0], value[:-1]) if value.ndim else ()


def damaged(state):
    """(path, number of the damage, the state with it); what is not damaged is shared with `state`."""
    for path in paths(state):
        yield path, -1, replaced(state, path)
        value = functools.reduce(lambda place, key: place[key], path, state)
        for index, other in enumerate(damages(value)):
            yield path, index, replaced(state, path, other)


def replaced(value, path, *other):
    """A copy with another entry there, or none."""
    copied, (key, *rest) = copy.copy(value), path
    if rest:
        copied[key] = replaced(value[key], rest, *other)
    elif other:
        (copied[key],) = other
    else:
        copied.pop(key)
    return copied


def is_refused(load):
    """Whether it ends in an error of gradlr's; any other one passes."""
    try:
        load()
    except CheckpointError:
        return True
    return False


def listed(value):
    """The same without tensors, so that two of them compare (and NaN with itself); faster than their repr."""
    if isinstance(value, torch.Tensor):
        return repr((value.dtype, value.tolist()))
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)
