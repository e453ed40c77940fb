"""The estimate of `gradlr.estimate` against the measured peak: every method on four models, with and without checkpointing."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import checkpoint_blocks
from ..estimate import METHODS
from ..estimate import estimate as estimated
from .environment import environment, markdown, require_modules
from .memory import MIB, peak_of_steps
from .pretrain import load_pretrained
from .train_steps import Baseline, adamw, forward_backward, fused_adamw, gradlr
from .transformer import language_model_loss

# Enough for state that is made late, and for whatever a step leaves behind.
_STEPS = 3
_LORA_RANK = 8


@dataclass(frozen=True)
class Case:
    """A model that is trained for the comparison.

    Attributes:
        name, label: For arguments and tables.
        make: The model, with values.
        inputs: What it is called with, at random.
        loss: Function of model and inputs; None for that which `estimate` finds itself.
        adapted: What peft is to adapt: "all-linear" for transformers' models, else the names' last parts.
    """

    name: str
    label: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    adapted: str | tuple[str, ...] = "all-linear"


def _tokens(vocabulary: int, batch_size: int, length: int) -> Tensor:
    return torch.randint(vocabulary, (batch_size, length))


def _transformers(config: str, model: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        require_modules("transformers")
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**sizes))

    return make


_LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 2000}
_BERT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("bytes", "byte transformer, 8 x 128 tokens", load_pretrained,
             lambda: (_tokens(256, 8, 128), _tokens(256, 8, 128)), language_model_loss, ("qkv", "out", "mlp.0", "mlp.2")),
        Case("llama", "Llama of width 256 (transformers), 4 x 128 tokens",
             _transformers("LlamaConfig", "LlamaForCausalLM", **_LLAMA), lambda: (_tokens(2000, 4, 128),),
             lambda model, ids: model(ids, labels=ids, use_cache=False).loss),
        Case("bert", "BERT of MiniLM's shape (transformers), 4 x 128 tokens", _transformers("BertConfig", "BertModel", **_BERT),
             lambda: (_tokens(30_522, 4, 128),), lambda model, ids: model(ids)[0].sum()),
        Case("llama_bfloat16", "the same Llama in bfloat16", lambda: CASES["llama"].make().to(torch.bfloat16),
             lambda: (_tokens(2000, 4, 128),), lambda model, ids: model(ids, labels=ids, use_cache=False).loss),
    )
}  # fmt: skip


BASELINES: dict[str, Baseline] = {
    name: Baseline(name, METHODS[name].label, make, ())
    for name, make in {
        "no_optimizer": forward_backward,
        "adamw": fused_adamw,
        "adamw_foreach": lambda model, lr: adamw(model, lr, foreach=True),
        "lora": fused_adamw,  # of the adapters
        "gradlr": gradlr(),
        "gradlr_step": gradlr(apply="step"),
        "gradlr_adaptor": gradlr(capture="adaptor"),
        "gradlr_one_sided": gradlr(capture="one_sided"),
    }.items()
}


def measured_peak(case: Case, baseline: Baseline, *, checkpointing: bool) -> tuple[int, int]:
    """(bytes of weights and inputs, most bytes held beyond them in three steps), on the CPU."""
    torch.manual_seed(0)
    model = case.make().train()
    if checkpointing:
        checkpoint_blocks(model)
    if baseline.name == "lora":
        model = _with_lora(model, case)
    inputs = case.inputs()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
                for tensor in (*model.parameters(), *model.buffers(), *inputs)}  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler|.*costs more than hooks")
        make, loss = (lambda: baseline.make(model, 1e-3)), (lambda: case.loss(model, *inputs))
        return sum(storages.values()), peak_of_steps(make, loss, steps=_STEPS)[0]


def _with_lora(model: nn.Module, case: Case) -> nn.Module:
    require_modules("peft")
    library = importlib.import_module("peft")
    targets = case.adapted if isinstance(case.adapted, str) else list(case.adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers under an old name
        return library.get_peft_model(model, library.LoraConfig(r=_LORA_RANK, target_modules=targets))


def compare(case: Case, name: str, *, checkpointing: bool) -> dict[str, Any]:
    """One row: the estimate and the measurement of one method on one model."""
    held, beyond = measured_peak(case, BASELINES[name], checkpointing=checkpointing)
    guess = estimated(
        case.make(), method=name, inputs=case.inputs(), loss=case.loss, checkpointing=checkpointing,
        rank=_LORA_RANK if name == "lora" else None,
    )  # fmt: skip
    return {
        "model": case.name, "method": name, "checkpointing": checkpointing, "estimate": guess.peak, "measured": held + beyond,
        "ratio": round(guess.peak / (held + beyond), 4), "ratio_beyond_weights": round((guess.peak - held) / beyond, 4),
    }  # fmt: skip


def measure(cases: Sequence[str] = tuple(CASES), methods: Sequence[str] = tuple(BASELINES)) -> dict[str, Any]:
    """Every method on every model, without and with checkpointing, as a JSON-able report."""
    rows = [
        compare(CASES[case], name, checkpointing=checkpointing)
        for case in cases for checkpointing in (False, True) for name in methods
    ]  # fmt: skip
    return {"environment": environment(), "models": {name: CASES[name].label for name in cases}, "results": rows}


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table: estimate / measurement in MiB, a column for each model."""
    places = list(dict.fromkeys((row["model"], row["checkpointing"]) for row in report["results"]))
    names = [report["models"][model] + (", checkpointing" if is_recomputed else "") for model, is_recomputed in places]
    rows = []
    for name in dict.fromkeys(row["method"] for row in report["results"]):
        by_place = {(row["model"], row["checkpointing"]): row for row in report["results"] if row["method"] == name}
        cells = [f"{by_place[place]['estimate'] / MIB:.2f} / {by_place[place]['measured'] / MIB:.2f}" for place in places]
        rows.append((METHODS[name].label, *cells))
    return markdown(("method", *names), rows)
