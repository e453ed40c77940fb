"""What is estimated: a model without values, what it is fed, and how its loss comes about."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import ArgumentError
from ...integrations.chunked_head import chunk_head_
from ...layers.quantize import quantize_
from ...linalg.int8 import Int8Weight

# Names that stand for a config.json of this package.
_LLAMAS = ("llama-7b", "llama-13b", "llama-70b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b")
_NAMES = (*_LLAMAS, "qwen3-14b", "qwen3-32b", "gpt2", "minilm")
CONFIGS = {name: Path(__file__).with_name("configs") / f"{name}.json" for name in _NAMES}
# Tokens of a sequence where none are given and the model's context allows.
DEFAULT_TOKENS = 2048
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Subject:
    """A model and its way to a loss.

    Attributes:
        name: For tables.
        model: On any device; only shapes are looked at.
        dtype: To which floating parameters are cast; None for their own.
        tokens: Tokens of one sequence; None where the inputs were given.
        feed: Makes the inputs, on the CPU.
        loss: From a copy of the model and the inputs.
        packed: Whether the model is to see several sequences in a row.
        weights: "int8" or None, as for `estimate`.
        chunked_head: As for `estimate`.
    """

    name: str
    model: nn.Module
    dtype: torch.dtype | None
    tokens: int | None
    feed: Callable[[], tuple[Any, ...]]
    loss: Callable[..., Tensor]
    packed: bool = False
    weights: str | None = None
    chunked_head: bool = False

    def prepare(self, model: nn.Module) -> None:
        """What is done to a copy of the model before it is trained, in place.

        Raises:
            ArgumentError: it cannot be done to this model.
        """
        if self.chunked_head:
            chunk_head_(model)
        if self.weights is not None:
            quantize_(model, self.weights)


def subject_of(
    model: Any,
    *,
    dtype: torch.dtype | None,
    batch_size: int,
    tokens: int | None,
    inputs: Sequence[Tensor] | None,
    loss: Callable[..., Tensor] | None,
    packed: bool = False,
    **prepared: Any,
) -> Subject:
    """Whatever was given, as a subject; the arguments are those of `estimate`.

    Raises:
        ArgumentError: it is nothing known, or cannot be fed.
    """
    _check(dtype, batch_size, tokens)
    name = type(model).__name__
    if isinstance(model, str | Path):
        name, model = Path(model).name, _config_at(model)
    if not isinstance(model, nn.Module):
        model = _model_of(model)
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    loss = loss or _natural_loss(model, is_packed=packed and inputs is None)
    if inputs is not None:
        return Subject(name, model, dtype, None, lambda: tuple(map(_blank, inputs)), loss, packed, **prepared)
    if tokens is not None and limit is not None and tokens > limit:
        raise ArgumentError(f"tokens={tokens}: {name} takes {limit} at most in a sequence; for more, raise batch_size")
    tokens = tokens or min(DEFAULT_TOKENS, limit or DEFAULT_TOKENS)
    sizes = (1, batch_size * tokens) if packed else (batch_size, tokens)
    return Subject(name, model, dtype, tokens, _feed(model, *sizes), loss, packed, **prepared)


def fake_copy(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """A copy whose parameters and buffers are fake tensors on the CPU.

    Args:
        model: On any device, the meta device included; not changed.
        mode: Whose tensors they are.
        dtype: Of all floating parameters and saved buffers; their own where None.
    """
    saved = {id(value) for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)}
    blanks: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        kept = tensor.dtype if dtype is None or id(tensor) not in saved or not tensor.is_floating_point() else dtype
        with mode:
            blank = _without_values(tensor, kept)
            is_parameter = isinstance(tensor, nn.Parameter)
            blanks[id(tensor)] = nn.Parameter(blank, requires_grad=tensor.requires_grad) if is_parameter else blank
    return copy.deepcopy(model, blanks)


def _without_values(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(tensor, Int8Weight):
        return tensor.changed(lambda part: _without_values(part, dtype if part.is_floating_point() else part.dtype))
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")


def _check(dtype: Any, batch_size: Any, tokens: Any) -> None:
    if dtype is not None and dtype not in _FLOATS:
        raise ArgumentError(f"dtype={dtype!r}: use one of {', '.join(map(str, _FLOATS))}, or None for the model's own")
    for name, value in (("batch_size", batch_size), ("tokens", tokens)):
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (is_count or (name == "tokens" and value is None)):
            raise ArgumentError(f"{name}={value!r}: it must be an int of at least 1")


def _transformers(what: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ArgumentError(f"{what} needs transformers: pip install 'gradlr[transformers]'") from None


def _config_at(path: str | Path) -> Any:
    place = CONFIGS.get(str(path), Path(path))
    place = place / "config.json" if place.is_dir() else place
    if not place.is_file():
        known = ", ".join(CONFIGS)
        raise ArgumentError(f"{str(path)!r} is no model that is known ({known}), and no config.json or folder with one")
    try:
        return _transformers(str(path)).AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"{place} cannot be read as a transformers config: {str(error).splitlines()[0]}") from error


def _model_of(config: Any) -> nn.Module:
    if not hasattr(config, "architectures") or not hasattr(config, "model_type"):
        raise ArgumentError(
            f"{config!r}: give a torch.nn.Module, a transformers config, a path to a config.json, or one of {', '.join(CONFIGS)}"
        )
    library = _transformers("a config")
    names = config.architectures or []
    kind = next((getattr(library, name) for name in names if hasattr(library, name)), None)
    is_causal = type(config) in library.AutoModelForCausalLM._model_mapping and not names
    dtype = getattr(config, "dtype", None)
    with torch.device("meta"):
        if kind is not None:
            model = kind(config)
        else:
            model = (library.AutoModelForCausalLM if is_causal else library.AutoModel).from_config(config)
    # Transformers goes by the class's name, which tells it nothing for GPT-2, and warns that it takes this very loss.
    model.loss_type = getattr(config, "loss_type", None) or getattr(model, "loss_type", None)
    return model if dtype is None else model.to(dtype)


def _blank(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _without_values(value, value.dtype).requires_grad_(value.requires_grad)


def _feed(model: nn.Module, batch_size: int, tokens: int) -> Callable[[], tuple[Tensor, ...]]:
    """Token ids where the first layer with weights is an embedding, vectors where it is a Linear."""
    first = next((module for module in model.modules() if next(module.parameters(recurse=False), None) is not None), None)
    if isinstance(first, nn.Embedding):
        return lambda: (torch.zeros(batch_size, tokens, dtype=torch.int64),)
    if isinstance(first, nn.Linear):
        return lambda: (torch.zeros(batch_size, tokens, first.in_features),)
    raise ArgumentError(
        f"{type(model).__name__} begins with {type(first).__name__}, neither an embedding nor a Linear: give inputs=(tensor, "
        "...), of which only shapes and dtypes are looked at"
    )


def _natural_loss(model: nn.Module, *, is_packed: bool = False) -> Callable[..., Tensor]:
    parameters = inspect.signature(model.forward).parameters
    if is_packed and "position_ids" not in parameters:
        raise ArgumentError(
            f"packed=True: {type(model).__name__} takes no position_ids, by which it would know sequences in a row"
        )
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    # Other heads (classification, ...) want labels of other shapes.
    has_token_labels = "labels" in parameters and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM"))

    def loss(net: nn.Module, *inputs: Tensor) -> Tensor:
        if is_packed:
            options["position_ids"] = torch.zeros_like(inputs[0])
        output = net(*inputs, **options, **({"labels": inputs[0]} if has_token_labels else {}))
        if has_token_labels:
            return output.loss
        return _first_tensor(output).sum()

    return loss


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        values = list(output.values()) if hasattr(output, "values") else output
        if not isinstance(values, list | tuple) or not values:
            kind = type(output).__name__
            raise ArgumentError(f"the model returns a {kind}: give loss=, a function of the model and its inputs")
        output = values[0]
    return output
