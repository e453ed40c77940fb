"""What a trainer of transformers, or any subclass of it, would optimize by itself, and the modules that hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttachError
from ..params.kinds import KINDS, plan_parameters

Groups = list[dict[str, Any]]


def host_groups(trainer: Any, create_optimizer: Callable[[], torch.optim.Optimizer]) -> Groups:
    """The groups of the optimizer that the trainer would make: torch's SGD, which keeps nothing, in the place of `args.optim`."""
    given, optim = trainer.optimizer, trainer.args.optim
    trainer.optimizer, trainer.args.optim = None, "sgd"
    try:
        return create_optimizer().param_groups
    finally:
        trainer.optimizer, trainer.args.optim = given, optim


def module_to_train(trainer: Any, groups: Groups) -> nn.Module:
    """The trainer's model, or a container of it and of what else the trainer trains, such as a loss with weights of its own.

    Raises:
        AttachError: the trainable parameters of these modules are not those of the groups.
    """
    model, wanted = trainer.model, _parameters(groups)
    missing = wanted.keys() - _trainable(model).keys()
    others = {name: module for name, module in _modules_of(trainer) if missing & _trainable(module).keys()}
    module = Together(model, others) if others else model
    found = _trainable(module)
    if lost := [tuple(wanted[key].shape) for key in wanted if key not in found]:
        raise AttachError(
            f"{_name(trainer)} would also train {len(lost)} parameters (of shapes {', '.join(map(str, lost[:3]))}) of no module "
            "that it keeps: store their module as an attribute of the trainer before training, as in self.head = head"
        )
    if left := [name for key, (name, _) in found.items() if key not in wanted]:
        raise AttachError(
            f"{_name(trainer)} would train {len(wanted)} of {len(found)} trainable parameters, and {left[0]!r} is not among "
            "them: freeze what is not to be trained (requires_grad_(False)) before training"
        )
    return module


def require_all(optimizer: Any, groups: Groups, trainer: Any) -> None:
    """Raise an AttachError where the trainer would train what a given optimizer is not attached to."""
    attached = {id(record.plan.parameter) for record in optimizer.records}
    if left := [tuple(one.shape) for key, one in _parameters(groups).items() if key not in attached]:
        raise AttachError(
            f"{_name(trainer)} would train {len(left)} parameters (of shapes {', '.join(map(str, left[:3]))}) that the given "
            "optimizer is not attached to: give gradlr={options} in its place, which attaches to all of them; or freeze them "
            "(requires_grad_(False))"
        )


def all_groups(trainer: Any, module: nn.Module, groups: Groups, given: Groups) -> Groups:
    """The `groups=` of `gradlr.attach`: those given by the user, and those whose rate or decay the trainer has chosen itself."""
    usual = {"lr": trainer.args.learning_rate, "weight_decay": trainer.args.weight_decay}
    wanted = {id(one): {key: group[key] for key in usual} for group in groups for one in group["params"]}
    found: dict[tuple[tuple[str, float], ...], list[str]] = {}
    patterns = [pattern for group in given for pattern in _patterns(group)]
    for plan in plan_parameters(module):
        if any(fnmatchcase(plan.name, pattern) for pattern in patterns):
            continue
        asked = wanted[id(plan.parameter)]
        options = tuple((key, asked[key]) for key in usual if key in KINDS[plan.kind].options and asked[key] != usual[key])
        if options:
            found.setdefault(options, []).append(escape(plan.name))
    return [*given, *({"match": names, **dict(options)} for options, names in found.items())]


class Together(nn.Module):
    """A model, whose parameters keep their names, and other modules, whose names begin with the trainer's own for them.

    Args:
        model: What the trainer calls its model.
        others: What else it trains, by the names of its attributes.
    """

    def __init__(self, model: nn.Module, others: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.model, self.others = model, nn.ModuleDict(others)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As every module's, without the container's own two names."""
        for name, parameter in super().named_parameters("", recurse, remove_duplicate):
            own = name.partition(".")[2]
            yield f"{prefix}.{own}" if prefix else own, parameter


def _modules_of(trainer: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, value in vars(trainer).items():
        if isinstance(value, nn.Module):
            yield name, value
        elif isinstance(value, Mapping) and value and all(isinstance(one, nn.Module) for one in value.values()):
            yield name, nn.ModuleDict(value)
        elif isinstance(value, Sequence) and value and all(isinstance(one, nn.Module) for one in value):
            yield name, nn.ModuleList(value)


def _patterns(group: dict[str, Any]) -> Sequence[str]:
    match = group.get("match", ())
    return [match] if isinstance(match, str) else match


def _trainable(module: nn.Module) -> dict[int, tuple[str, Tensor]]:
    return {id(one): (name, one) for name, one in module.named_parameters() if one.requires_grad}


def _parameters(groups: Groups) -> dict[int, Tensor]:
    return {id(one): one for group in groups for one in group["params"] if one.requires_grad}


def _name(trainer: Any) -> str:
    return f"{type(trainer).__name__}.create_optimizer()"
