"""Prints, as JSON, what torch's own tests give to its optimizers (`optim_db`), as far as gradlr has an option of that kind.

A process of its own: importing torch's test modules changes settings of torch for good, and takes seconds.
"""

import json
import sys
import types
import unittest
import warnings

import torch


def plain(value):
    return {"tensor": value.tolist()} if isinstance(value, torch.Tensor) else value


def translated(kwargs):
    """The options as `attach` names them; None where one has no counterpart (foreach, capturable, rho, ...)."""
    known = {"lr": "lr", "weight_decay": "weight_decay", "momentum": "beta"}
    first = {"beta": kwargs["betas"][0]} if "betas" in kwargs else {}
    rest = {key: value for key, value in kwargs.items() if key != "betas"}
    if not rest.keys() <= known.keys():
        return None
    return {key: plain(value) for key, value in ({known[key]: value for key, value in rest.items()} | first).items()}


def main():
    warnings.simplefilter("ignore")
    # Of this package, torch's test modules ask for a base class only, and the table for nothing.
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    from torch.testing._internal.common_optimizers import optim_db

    taken, refused = [], []
    for info in optim_db:
        name = info.optim_cls.__name__
        taken += [(name, one.desc, translated(one.kwargs)) for one in info.optim_inputs_func(device="cpu")]
        for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            one = error.optimizer_error_input
            is_known = "betas" not in one.kwargs or not 0 <= one.kwargs["betas"][0] < 1  # of the second there is none here
            refused.append((name, one.desc, translated(one.kwargs) if is_known else None))
    json.dump({"taken": taken, "refused": refused}, sys.stdout)


if __name__ == "__main__":
    main()
