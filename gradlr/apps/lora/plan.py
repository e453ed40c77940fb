"""Where each changed parameter goes in a peft adapter: low-rank, with its whole module, or nowhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from ...capture.layer_swap import AdaptedLayer
from ...errors import ArgumentError
from ...layers import LinearOp, layer_op

# peft calls a saved module's forward, which these do not have.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class AdapterPlan:
    """Where each changed parameter goes.

    Attributes:
        targets: Name of each low-rank layer, and whether it stores its weight as (fan_in, fan_out).
        biases: Names of the low-rank layers whose bias changed.
        saved: Names of the modules stored whole.
        left_out: Name of each parameter that is in neither, and why.
        modules: Every module by name, shared ones under each of their names.
    """

    modules: dict[str, nn.Module]
    targets: dict[str, bool] = field(default_factory=dict)
    biases: set[str] = field(default_factory=set)
    saved: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def bias_form(self) -> str | None:
        """How changed biases are stored: "lora_bias" where each layer has one, else "base_layer"; None where none changed."""
        if not self.biases:
            return None
        has_all = all(getattr(self.modules[name], "bias", None) is not None for name in self.targets)
        return "lora_bias" if has_all else "base_layer"

    @property
    def are_targets_exact(self) -> bool:
        """Whether peft, which also takes every module whose name ends with a target's, finds no others."""
        ends = tuple(f".{name}" for name in self.targets)
        return not any(name.endswith(ends) and name not in self.targets for name in self.modules)


def plan_adapter(model: nn.Module, changed: Iterable[str], save: tuple[str, ...]) -> AdapterPlan:
    """Sort the changed parameters.

    Args:
        model: The fine-tuned model.
        changed: Names in its state_dict, tied parameters under each of their names.
        save: Globs on the names of what may be stored with its whole module.

    Returns:
        The plan. Weight and bias of a Linear or transformers' Conv1D are low-rank, unless another module shares them: peft
        would adapt one of the two. Everything else is stored with the nearest module that peft can wrap.

    Raises:
        ArgumentError: peft would take another module, which it cannot store, for one that is to be stored.
    """
    plan = AdapterPlan(dict(model.named_modules(remove_duplicate=False)))
    aliases = _aliases(model)
    for name in changed:
        path, _, leaf = name.rpartition(".")
        module = plan.modules.get(path)
        is_transposed = None if module is None or not path else transposed(module)
        if is_transposed is not None and not _is_shared(module, path, aliases):
            plan.targets[path] = is_transposed
            plan.biases |= {path} if leaf == "bias" else set()
        elif not any(fnmatchcase(alias, pattern) for alias in aliases.get(name, (name,)) for pattern in save):
            plan.left_out[name] = "no low-rank layer, and save= does not match it"
        elif home := _home(path, plan.modules):
            plan.saved.append(home)
        else:
            plan.left_out[name] = "it belongs to the model itself, which peft cannot store as a module"
    _close(plan)
    return plan


def transposed(module: nn.Module) -> bool | None:
    """Whether a layer that peft's LoRA takes stores (fan_in, fan_out); None where the module is no such layer."""
    if isinstance(module, AdaptedLayer):  # attached with a capture: its class is gradlr's
        is_linear = module.weight.ndim == 2 and not issubclass(module._gradlr_original, nn.Embedding)
        return not issubclass(module._gradlr_original, nn.Linear) if is_linear else None
    found = layer_op(module)
    return found.is_transposed if isinstance(found, LinearOp) else None


def is_within(name: str, paths: Iterable[str]) -> bool:
    """Whether a module or parameter is one of the modules, or in one."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in by_tensor.values() for name in names}


def _is_shared(module: nn.Module, path: str, aliases: dict[str, tuple[str, ...]]) -> bool:
    return any(len(aliases[f"{path}.{leaf}"]) > 1 for leaf, _ in module.named_parameters(recurse=False))


def _home(path: str, modules: dict[str, nn.Module]) -> str:
    while path and (path not in modules or isinstance(modules[path], _CONTAINERS)):
        path = path.rpartition(".")[0]
    return path


def _close(plan: AdapterPlan) -> None:
    """Let the plan say what peft will do: it stores every module whose name ends with a saved one's, and all that is in it."""
    for name, module in plan.modules.items():
        cause = next((path for path in plan.saved if isinstance(module, _CONTAINERS) and name.endswith(path)), None)
        if cause:
            raise ArgumentError(
                f"module {cause!r} would be stored whole, and peft takes {name!r}, a {type(module).__name__}, for it as well, "
                "since their names end alike: leave it out with save=, or rename it"
            )
    wrapped = [name for name, module in plan.modules.items() if name.endswith(tuple(plan.saved)) and name]
    outermost = [name for name in wrapped if not is_within(name.rpartition(".")[0], wrapped)]
    plan.saved = sorted(set(outermost), key=list(plan.modules).index)
    plan.targets = {name: value for name, value in plan.targets.items() if not is_within(name, plan.saved)}
    plan.biases &= plan.targets.keys()
