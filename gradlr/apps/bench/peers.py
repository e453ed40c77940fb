"""The real packages of the field, each as its own documentation tells to use it: `pip install 'gradlr[bench]'`."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from .train_steps import Baseline, Loss, TrainStep, ordinary, split_by_axes, split_parameters

UPDATE_GAP = 200  # the packages' own default; 50 was worse for GaLore and the same for APOLLO
LORA_RANK = 32


def low_rank_share(matrices: list[nn.Parameter]) -> int:
    """A quarter of the usual matrix's shorter side, the share that GaLore's and APOLLO's papers train at."""
    return max(1, statistics.mode(min(p.shape) for p in matrices) // 4)


def galore(model: nn.Module, lr: float) -> TrainStep:
    """galore-torch's AdamW: 2-D matrices projected by the SVD of a gradient, scale 0.25; everything else in plain AdamW.

    At a quarter of the rate, as with APOLLO below: at one rate for all, both packages end 0.06 nats higher.
    """
    from galore_torch import GaLoreAdamW

    return _projected(GaLoreAdamW, model, lr, {"scale": 0.25}, no_deprecation_warning=True)


def apollo(model: nn.Module, lr: float, **options: Any) -> TrainStep:
    """apollo-torch's AdamW: random projections, one factor per channel."""
    from apollo_torch import APOLLOAdamW

    return _projected(APOLLOAdamW, model, lr, {"proj": "random", "scale": 1.0, "scale_type": "channel", **options})


def apollo_mini(model: nn.Module, lr: float) -> TrainStep:
    """APOLLO-Mini: rank 1, one factor per matrix, scale 128."""
    return apollo(model, lr, rank=1, scale=128.0, scale_type="tensor")


def _projected(make: Callable[..., Any], model: nn.Module, lr: float, options: dict[str, Any], **more: Any) -> TrainStep:
    matrices, embeddings, vectors = split_parameters(model)
    flat, folded = split_by_axes(matrices)
    shared = {"rank": low_rank_share(flat), "update_proj_gap": UPDATE_GAP, "proj_type": "std"}
    groups = [{"params": flat, **shared, **options}, {"params": folded + embeddings + vectors, "lr": lr / 4}]
    optimizer = make(groups, lr=lr, weight_decay=0.0, **more)

    def projection(parameter: nn.Parameter) -> list[Tensor]:
        # Held by an object that is no tensor; None where it is drawn anew from a seed.
        matrix = getattr(optimizer.state.get(parameter, {}).get("projector"), "ortho_matrix", None)
        return [matrix] if torch.is_tensor(matrix) else []

    return ordinary(optimizer, more_state=projection)


def sinkgd(model: nn.Module, lr: float) -> TrainStep:
    """adv-optm's SinkGD: rows and columns of every gradient normalized in turn, no state at all; vectors by their length."""
    from adv_optm import SinkSGD_adv

    return ordinary(SinkSGD_adv(model.parameters(), lr=lr))


def sinkgd_adamw(model: nn.Module, lr: float) -> TrainStep:
    """The same for matrices only, AdamW for the rest, as in its paper (arXiv 2502.06742)."""
    from adv_optm import SinkSGD_adv

    matrices, embeddings, vectors = split_parameters(model)
    rest = embeddings + vectors  # none in a stack of Linears, which AdamW would refuse
    others = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.0)] if rest else []
    return ordinary(SinkSGD_adv(matrices, lr=lr), *others)


def mlorc(model: nn.Module, lr: float) -> TrainStep:
    """mlorc-optim's AdamW with both moments kept at rank 4."""
    folder = Path(next(iter(importlib.util.find_spec("MLorc_optim").submodule_search_locations)))  # type: ignore
    with mock.patch.dict(sys.modules):
        # As published (0.1.8) it asks for `MLorc_optim.utilName` where it means `MLorc_optim.util.Name`.
        for path in (folder / "util").glob("*.py"):
            spec = importlib.util.spec_from_file_location(f"MLorc_optim.util{path.stem}", path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # type: ignore
            spec.loader.exec_module(module)  # type: ignore
        from MLorc_optim import MLorc_AdamW

    return ordinary(MLorc_AdamW(model.parameters(), lr=lr, weight_decay=0.0, use_bias_correction=True))


def adamw_8bit(model: nn.Module, lr: float) -> TrainStep:
    """bitsandbytes' AdamW with moments in 8 bits, of tensors with 4,096 numbers and more."""
    import bitsandbytes

    return ordinary(bitsandbytes.optim.AdamW8bit(model.parameters(), lr=lr, weight_decay=0.0))


def gradient_release(model: nn.Module, lr: float) -> TrainStep:
    """torch-optimi's AdamW with gradient release: each parameter's step inside backward, as gradlr does it."""
    from optimi import AdamW, prepare_for_gradient_release

    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.0, gradient_release=True)
    prepare_for_gradient_release(model, optimizer)
    return TrainStep(ordinary().step, [optimizer])  # backward does it all


def adalomo(model: nn.Module, lr: float) -> TrainStep:
    """lomo-optim's AdaLomo: factored second moments, no momentum, fused into backward. For parameters of two axes at most."""
    from lomo_optim import AdaLomo

    # AdaLomo makes its state with `.cuda()`; without a GPU it stays where it is.
    is_on_cpu = not torch.cuda.is_available()
    with mock.patch.object(Tensor, "cuda", lambda tensor: tensor) if is_on_cpu else nullcontext():
        optimizer = AdaLomo(model, lr=lr, loss_scale=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = (optimizer.exp_avg_sq, optimizer.exp_avg_sq_row, optimizer.exp_avg_sq_col)

    def step(compute: Loss) -> Tensor:
        loss = compute()
        optimizer.fused_backward(loss, optimizer.param_groups[0]["lr"])
        return loss

    def factors(parameter: nn.Parameter) -> list[Tensor]:
        return [kept[names[id(parameter)]] for kept in moments if names[id(parameter)] in kept]

    return TrainStep(step, [optimizer], more_state=factors)


def lora(model: nn.Module, lr: float) -> TrainStep:
    """peft's LoRA on every Linear; a new classifier is trained whole."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    classifier = layers.pop("classifier", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's: the model is no transformers model
        inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(layers)), model)
    if classifier is not None:
        classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    # A weight's adapters, and an adapter itself: memory beside the model's, with its moments.
    beside: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer, _, rest = name.partition(".lora_")
        if rest:
            beside[id(parameter)] = [parameter]
            beside.setdefault(id(layers[layer].weight), []).append(parameter)

    def adapter_state(parameter: nn.Parameter) -> list[Tensor]:
        adapters = beside.get(id(parameter), [])
        return [*adapters, *(value for p in adapters for value in optimizer.state[p].values() if value.ndim > 0)]

    return ordinary(optimizer, more_state=adapter_state)


@dataclass(frozen=True)
class Peer(Baseline):
    """A baseline that needs a package beside torch.

    Attributes:
        package: Its name on PyPI.
        module: The module that it installs.
        takes_folded: It takes parameters of more than two axes.
        is_adapter: The weights themselves stay as they are.
    """

    package: str = ""
    module: str = ""
    takes_folded: bool = True
    is_adapter: bool = False

    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.module) is not None


_ADAMW, _SCALED = (1e-3, 2e-3, 4e-3), (4e-3, 8e-3, 1.6e-2)

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("adamw_8bit", "AdamW, 8 bits (bitsandbytes)", adamw_8bit, _ADAMW, "bitsandbytes", "bitsandbytes"),
        Peer("galore", "GaLore, a quarter of full rank", galore, _SCALED, "galore-torch", "galore_torch"),
        Peer("apollo", "APOLLO, a quarter of full rank", apollo, _SCALED, "apollo-torch", "apollo_torch"),
        Peer("apollo_mini", "APOLLO-Mini", apollo_mini, _SCALED, "apollo-torch", "apollo_torch"),
        Peer("adalomo", "AdaLomo", adalomo, (1e-2, 2e-2, 4e-2), "lomo-optim", "lomo_optim", takes_folded=False),
        Peer("optimi", "AdamW, gradient release (optimi)", gradient_release, _ADAMW, "torch-optimi", "optimi"),
        Peer("sinkgd", "SinkGD (adv-optm)", sinkgd, _ADAMW, "adv-optm", "adv_optm"),
        Peer("sinkgd_adamw", "SinkGD, AdamW for the rest", sinkgd_adamw, _ADAMW, "adv-optm", "adv_optm"),
        Peer("mlorc", "MLorc, moments of rank 4", mlorc, _ADAMW, "mlorc-optim", "MLorc_optim"),
        Peer("lora", "LoRA r32", lora, _SCALED, "peft", "peft", is_adapter=True),
    )
}


def installed_peers() -> list[str]:
    """Names of the peers whose package is installed."""
    return [name for name, peer in PEERS.items() if peer.is_installed()]
