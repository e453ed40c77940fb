"""Where each changed parameter goes in a peft adapter: low-rank, with its whole module, or nowhere; and what peft is told."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ...errors import ArgumentError
from ...layers import LinearOp, layer_op

# peft calls a saved module's forward, which these do not have.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# The names by which peft recognizes a tied embedding or head.
_TIED_NAMES = ("embed_tokens", "lm_head")
# peft takes no empty list of targets; this one matches nothing.
_NO_TARGETS = "dummy-target-modules"


@dataclass
class AdapterPlan:
    """Where each changed parameter goes.

    Attributes:
        modules: Every module by name, shared ones under each of their names.
        targets: Name of each low-rank layer, and whether it stores its weight as (fan_in, fan_out).
        biases: Names of the low-rank layers whose bias changed.
        saved: Names of the modules stored whole.
        left_out: Name of each parameter that is in neither, and why.
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
    shared = {name.rpartition(".")[0] for name, names in aliases.items() if len(names) > 1}
    for name in changed:
        path, _, leaf = name.rpartition(".")
        layer = layer_op(plan.modules[path]) if path in plan.modules and path else None
        if isinstance(layer, LinearOp) and path not in shared:
            plan.targets[path] = layer.is_transposed
            plan.biases |= {path} if leaf == "bias" else set()
            continue
        home = path
        while home and (home not in plan.modules or isinstance(plan.modules[home], _CONTAINERS)):
            home = home.rpartition(".")[0]
        if not any(fnmatchcase(alias, pattern) for alias in aliases.get(name, [name]) for pattern in save):
            plan.left_out[name] = "no low-rank layer, and save= does not match it"
        elif home:
            plan.saved.append(home)
        else:
            plan.left_out[name] = "it belongs to the model itself, which peft cannot store as a module"
    _follow_peft(plan)
    return plan


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    by_tensor = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor[id(parameter)].append(name)
    return {name: names for names in by_tensor.values() for name in names}


def _follow_peft(plan: AdapterPlan) -> None:
    """Let the plan say what peft will do: it stores every module whose name ends with a saved one's, and all that is in it."""
    wrapped: dict[str, nn.Module] = {name: one for name, one in plan.modules.items() if name and name.endswith(tuple(plan.saved))}
    for name, module in wrapped.items():
        if isinstance(module, _CONTAINERS):
            cause = next(path for path in plan.saved if name.endswith(path))
            raise ArgumentError(
                f"module {cause!r} would be stored whole, and peft takes {name!r}, a {type(module).__name__}, for it as well, "
                "since their names end alike: leave it out with save=, or rename it"
            )
    plan.saved = [name for name in wrapped if not _is_within(name.rpartition(".")[0], wrapped)]
    plan.targets = {name: value for name, value in plan.targets.items() if not _is_within(name, plan.saved)}
    plan.biases &= plan.targets.keys()


def _is_within(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def adapter_config(plan: AdapterPlan, model: nn.Module, ranks: dict[str, int]) -> dict[str, Any]:
    """adapter_config.json, a LoraConfig as plain values: what peft must be told to put each tensor in its place.

    Args:
        plan: What goes where.
        model: The fine-tuned model.
        ranks: Rank of each low-rank layer.

    Returns:
        lora_alpha = r for each layer, so that the scaling is 1; layers whose rank is not the most frequent one stand in
        `rank_pattern` and `alpha_pattern`.
    """
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _targets(plan),
        "modules_to_save": plan.saved or None,
        "fan_in_fan_out": any(plan.targets.values()),
        "bias": "lora_only" if plan.bias_form == "base_layer" else "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", "") or None,
    }
    # Younger than the rest: older versions of peft read the adapter where it is not needed.
    config |= {"lora_bias": True} if plan.bias_form == "lora_bias" else {}
    return config | ({"ensure_weight_tying": True} if _is_tie_known(plan, model) else {})


def _targets(plan: AdapterPlan) -> list[str] | str:
    # peft also takes every module whose name ends with one of a list; a text is a pattern for whole names.
    ends = tuple(f".{name}" for name in plan.targets)
    is_list_exact = not any(name.endswith(ends) and name not in plan.targets for name in plan.modules)
    names = sorted(plan.targets)
    return (names if is_list_exact else "|".join(map(re.escape, names))) or _NO_TARGETS


def _is_tie_known(plan: AdapterPlan, model: nn.Module) -> bool:
    """Whether peft can keep the tie: between the input embedding and one head without a bias, under a name that it knows."""
    embedding = getattr(model, "get_input_embeddings", None)
    if embedding is None or not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    weight = getattr(embedding(), "weight", None)
    tied = [name for name, module in plan.modules.items() if weight is not None and getattr(module, "weight", None) is weight]
    heads = [name for name in tied if isinstance(head := plan.modules[name], nn.Linear) and head.bias is None]
    is_named = any(name.rpartition(".")[2] in _TIED_NAMES for name in tied)
    return len(tied) == 2 and len(heads) == 1 and is_named and set(tied) <= set(plan.saved)
