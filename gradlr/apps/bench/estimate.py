"""The estimate of `gradlr.estimate` against the measured peak: every method, with and without checkpointing."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.chunked_head import chunk_head_
from ...layers.quantize import quantize_
from ...linalg.int8 import stored_parts
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
        options: Of `estimate`: weights, chunked_head, packed.
    """

    name: str
    label: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    adapted: str | tuple[str, ...] = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)

    def methods(self, names: Sequence[str]) -> list[str]:
        """Those that can train it."""
        return [name for name in names if METHODS[name].is_gradlr or "weights" not in self.options]

    def trained(self) -> nn.Module:
        """The model, and what its options say."""
        model = self.make().train()
        if self.options.get("chunked_head"):
            chunk_head_(model)
        return quantize_(model) if "weights" in self.options else model


def _tokens(vocabulary: int, batch_size: int, length: int) -> Tensor:
    return torch.randint(vocabulary, (batch_size, length))


def _transformers(config: str, model: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        require_modules("transformers")
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**sizes))

    return make


def _language_loss(model: Any, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    return model(ids, labels=ids, position_ids=positions, use_cache=False).loss


def _llama(vocabulary: int = 2000, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    make = _transformers("LlamaConfig", "LlamaForCausalLM", **_LLAMA, vocab_size=vocabulary)
    return lambda: make().to(dtype)


# A vocabulary of several blocks of logits.
_VOCABULARY = 16_000
_LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
_BERT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("bytes", "byte transformer, 8 x 128 tokens", load_pretrained,
             lambda: (_tokens(256, 8, 128), _tokens(256, 8, 128)), language_model_loss, ("qkv", "out", "mlp.0", "mlp.2")),
        Case("llama", "Llama of width 256 (transformers), 4 x 128 tokens", _llama(), lambda: (_tokens(2000, 4, 128),),
             _language_loss),
        Case("bert", "BERT of MiniLM's shape (transformers), 4 x 128 tokens", _transformers("BertConfig", "BertModel", **_BERT),
             lambda: (_tokens(30_522, 4, 128),), lambda model, ids: model(ids)[0].sum()),
        Case("llama_bfloat16", "the same Llama in bfloat16", _llama(2000, torch.bfloat16), lambda: (_tokens(2000, 4, 128),),
             _language_loss),
        *(Case(f"llama_{name}", f"the same in bfloat16, {_VOCABULARY:,} tokens in the vocabulary, {told}",
               _llama(_VOCABULARY, torch.bfloat16), lambda: (_tokens(_VOCABULARY, 4, 128),), _language_loss, options=options)
          for name, told, options in (
              ("chunked", "chunked head", {"chunked_head": True}),
              ("int8", "int8 weights", {"weights": "int8"}),
              ("int8_chunked", "int8 weights, chunked head", {"weights": "int8", "chunked_head": True}),
          )),
        Case("llama_packed", "the same Llama in bfloat16, 4 documents of 128 tokens in a row", _llama(2000, torch.bfloat16),
             lambda: (_tokens(2000, 1, 512), torch.arange(128).repeat(1, 4)), _language_loss, options={"packed": True}),
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
    model = case.trained()
    if checkpointing:
        checkpoint_blocks(model)
    if baseline.name == "lora":
        model = _with_lora(model, case)
    inputs = case.inputs()
    parts = [part for one in (*model.parameters(), *model.buffers(), *inputs) for part in stored_parts(one)]
    storages = {part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in parts}
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
        rank=_LORA_RANK if name == "lora" else None, **case.options,
    )  # fmt: skip
    return {
        "model": case.name, "method": name, "checkpointing": checkpointing, "estimate": guess.peak, "measured": held + beyond,
        "ratio": round(guess.peak / (held + beyond), 4), "ratio_beyond_weights": round((guess.peak - held) / beyond, 4),
    }  # fmt: skip


def measure(cases: Sequence[str] = tuple(CASES), methods: Sequence[str] = tuple(BASELINES)) -> dict[str, Any]:
    """Every method on every model, without and with checkpointing, as a JSON-able report."""
    rows = [
        compare(CASES[case], name, checkpointing=checkpointing)
        for case in cases for checkpointing in (False, True) for name in CASES[case].methods(methods)
    ]  # fmt: skip
    return {"environment": environment(), "models": {name: CASES[name].label for name in cases}, "results": rows}


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table: estimate / measurement in MiB, a column for each method."""
    places = list(dict.fromkeys((row["model"], row["checkpointing"]) for row in report["results"]))
    names = list(dict.fromkeys(row["method"] for row in report["results"]))
    found = {(row["model"], row["checkpointing"], row["method"]): row for row in report["results"]}
    rows = []
    for model, is_recomputed in places:
        here = [found.get((model, is_recomputed, name)) for name in names]
        cells = ["" if row is None else f"{row['estimate'] / MIB:.2f} / {row['measured'] / MIB:.2f}" for row in here]
        rows.append((report["models"][model] + (", checkpointing" if is_recomputed else ""), *cells))
    return markdown(("model", *(METHODS[name].label for name in names)), rows)
