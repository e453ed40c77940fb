"""What each parameter is: a matrix, a table or a vector; and its view as (a batch of) m × n."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from ..errors import ArgumentError
from ..layers.linear_maps import is_transposed_linear
from ..linalg import UNSHARDED, Layout
from .views import View, checked_view, given_view

MATRIX, TABLE, VECTOR = "matrix", "table", "vector"
EMBEDDING = TABLE
KINDS = (MATRIX, TABLE, VECTOR)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_ODD_WORDS = ("emb", "pos", "table", "log")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter, as gradlr sees it.

    Attributes:
        name: The first name the model knows it by.
        parameter: The parameter itself.
        kind: "matrix", "table" or "vector".
        view: How it becomes (a batch of) matrices; the identity for vectors.
        is_guess: Whether neither a layer, nor its shape, nor the user says what it is.
        natural: The view that its layer suggests, which a vector does without.
        layout: How the view is spread over processes, where the parameter is sharded.
    """

    name: str
    parameter: nn.Parameter
    kind: str
    view: View
    is_guess: bool = False
    natural: View = field(default_factory=View)
    layout: Layout = UNSHARDED

    @property
    def shape(self) -> torch.Size:
        """Shape of the view, of the whole parameter where it is sharded."""
        return self.view.of(outline(self.parameter)).shape

    @property
    def shape_here(self) -> torch.Size:
        """Shape of the view of what lies in this process."""
        return self.matrix_here.shape

    @property
    def here(self) -> Tensor:
        """The parameter's entries in this process, detached: all of them, or its shard's."""
        return local(self.parameter.detach())

    @property
    def matrix_here(self) -> Tensor:
        """Their view."""
        return self.view.of(self.here)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, spread over the processes of a device mesh."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor


def outline(tensor: Tensor) -> Tensor:
    """A detached tensor of the same shape, for asking what a view makes of it: without values where it is sharded."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if is_sharded(tensor) else tensor.detach()


def plan_parameters(model: nn.Module) -> list[ParameterPlan]:
    """What every trainable parameter of the model is, in the order of `model.named_parameters()`.

    Embeddings and a head of the same shape at the end of the model are tables; weights of norms, biases, everything
    one-dimensional and everything with one row or one column are vectors. Convolutions are folded to (o, i·h·w) and transposed
    ones to (o·h·w, i), a batch of them where grouped; transformers' Conv1D is turned to (fan_out, fan_in); other parameters with
    two axes or more are matrices, leading axes a batch. A parametrized weight (weight_norm, orthogonal) is what its layer's is.
    """
    uses = _uses(model)
    # The first layer with a parameter owns it; a parametrized layer comes before its parametrizations.
    owners = {id(parameter): (layer, name) for parameter, layer, name in reversed(uses)}
    table_ids = _tables(uses)
    plans = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and isinstance(parameter, UninitializedParameter):
            plans.append(ParameterPlan(name, parameter, VECTOR, View()))
        elif parameter.requires_grad:
            owner, own_name = owners[id(parameter)]
            kind, view = _classify(parameter, owner, own_name, table_ids)
            is_guess = kind == MATRIX and _is_guess(parameter, owner, own_name)
            natural = _natural_view(parameter, owner, own_name) if parameter.ndim > 1 else View()
            plans.append(ParameterPlan(name, parameter, kind, view, is_guess, natural))
    return plans


Use = tuple[Tensor, nn.Module, str]


def _uses(model: nn.Module) -> list[Use]:
    """Each parameter with each layer that it belongs to and its name there, in the order of the modules."""
    uses: list[Use] = []
    for module in model.modules():
        uses += [(parameter, module, name) for name, parameter in module.named_parameters(recurse=False)]
        if is_parametrized(module):
            # Asking for module.weight would run the parametrization, and spectral_norm iterates at each run.
            for name, parametrizations in module.parametrizations.items():
                uses += [(parameter, module, name) for parameter in parametrizations.parameters(recurse=False)]
    return uses


def _tables(uses: list[Use]) -> set[int]:
    weights = [(weight, layer) for weight, layer, name in uses if name == "weight" and weight.ndim == 2]
    lookups = [(weight, layer) for weight, layer in weights if isinstance(layer, _EMBEDDINGS)]
    embeddings = [weight for weight, layer in lookups if weight.shape[1] == layer.embedding_dim]
    tables = {id(weight) for weight in embeddings}
    # An untied head is the last Linear of the model and mirrors the embedding's shape (vocabulary, width).
    linears = [weight for weight, layer in weights if isinstance(layer, nn.Linear)]
    if linears and any(linears[-1].shape == weight.shape for weight in embeddings):
        tables.add(id(linears[-1]))
    return tables


def _classify(parameter: Tensor, owner: nn.Module, name: str, table_ids: set[int]) -> tuple[str, View]:
    if id(parameter) in table_ids:
        return TABLE, View()
    if parameter.ndim < 2 or parameter.numel() == 0 or isinstance(owner, _NORMS) or name == "bias" or name.endswith("_bias"):
        return VECTOR, View()
    view = _natural_view(parameter, owner, name)
    if min(view.of(outline(parameter)).shape[-2:]) == 1:
        return VECTOR, View()
    return MATRIX, view


def _natural_view(parameter: Tensor, owner: nn.Module, name: str) -> View:
    if name == "weight" and is_transposed_linear(owner):
        return View("i o -> o i")
    if isinstance(owner, _CONVOLUTIONS) and _are_filters(parameter, owner):
        return _convolution_view(owner)
    if isinstance(owner, nn.MultiheadAttention) and name == "in_proj_weight" and parameter.shape[0] == 3 * owner.embed_dim:
        return View("(three o) i -> three o i")
    return _leading_batch(parameter.ndim)


def _leading_batch(ndim: int) -> View:
    axes = " ".join(f"b{index}" for index in range(ndim - 2))
    return View(f"{axes} m n -> ({axes}) m n") if ndim > 3 else View()


def _are_filters(parameter: Tensor, layer: nn.Module) -> bool:
    # What a parametrization is made of may have any shape: weight_norm's lengths have one row, or one column.
    return parameter.ndim == len(layer.kernel_size) + 2 and parameter.shape[0] % layer.groups == 0


def _convolution_view(layer: nn.Module) -> View:
    # The gradient is a sum of outer products: at each output of a convolution, output gradient times a patch of the input; at
    # each input of a transposed one, its adjoint, a patch of the output gradient times the input. Groups do not mix.
    axes = " ".join("hwd"[: len(layer.kernel_size)])
    is_grouped = layer.groups > 1
    sizes = (("g", layer.groups),) if is_grouped else ()
    if isinstance(layer, _TRANSPOSED):
        return View(f"(g i) o {axes} -> g (o {axes}) i" if is_grouped else f"i o {axes} -> (o {axes}) i", sizes)
    return View(f"(g o) i {axes} -> g o (i {axes})" if is_grouped else f"o i {axes} -> o (i {axes})", sizes)


def _is_guess(parameter: Tensor, owner: nn.Module, name: str) -> bool:
    # Two axes are a matrix and three are experts, unless there is one expert only, or the name speaks of a table or of logarithms
    # (Mamba's A_log: rates of decay, entry by entry).
    is_odd = parameter.ndim > 3 or (parameter.ndim == 3 and parameter.shape[0] == 1)
    # Words of "PatchEmbedding.pos_embed": patch, embedding, pos, embed.
    words = re.findall(r"[A-Z]?[a-z]+", f"{type(owner).__name__}.{name}")
    is_named_so = any(word.lower().startswith(_ODD_WORDS) for word in words)
    return not _is_layer_of_torch(owner) and (is_odd or is_named_so)


def _is_layer_of_torch(module: nn.Module) -> bool:
    homes = (base.__module__ for base in type(module).__mro__)
    home = next(home for home in homes if home.startswith("torch.nn.modules."))
    return home not in ("torch.nn.modules.module", "torch.nn.modules.container") or is_transposed_linear(module)


def with_views(plans: list[ParameterPlan], views: Mapping[str, Any]) -> list[ParameterPlan]:
    """The plans with the user's views; what a view matches becomes a matrix.

    Args:
        plans: Of all trainable parameters.
        views: Glob on parameter names → expression, or pair of expression and sizes. The first match wins.

    Raises:
        ArgumentError: a view cannot be read, does not fit a parameter that it matches, or matches none.
    """
    if not isinstance(views, Mapping) or not all(isinstance(glob, str) for glob in views):
        raise ArgumentError(f'views={views!r}: give a dict such as {{"*.qkv.weight": "(three o) i -> three o i"}}')
    rest, viewed = list(plans), {}
    for glob, value in views.items():
        expression, sizes = given_view(glob, value)
        members = [plan for plan in rest if fnmatchcase(plan.name, glob)]
        if not members:
            raise ArgumentError(
                f"views: {glob!r} matches no trainable parameter that an earlier view left; names look like {plans[0].name!r}"
            )
        rest = [plan for plan in rest if plan not in members]
        for plan in members:
            view = checked_view(expression, sizes, plan.name, plan.parameter.shape)
            viewed[plan.name] = replace(plan, kind=MATRIX, view=view, is_guess=False)
    return [viewed.get(plan.name, plan) for plan in plans]


def with_kind(plan: ParameterPlan, kind: str) -> ParameterPlan:
    """The plan with another kind.

    Raises:
        ArgumentError: a parameter with fewer than two axes should be a matrix or a table, or the kind is unknown.
    """
    if kind not in KINDS:
        raise ArgumentError(f"kind={kind!r}: use one of {', '.join(KINDS)}")
    if kind != VECTOR and (len(plan.shape) < 2 or plan.parameter.numel() == 0):
        shape = tuple(plan.parameter.shape)
        raise ArgumentError(f"parameter {plan.name!r} has shape {shape}; it cannot be a {kind}: leave kind out")
    view = View() if kind == VECTOR else plan.natural if plan.kind == VECTOR else plan.view
    if kind != VECTOR and view.pattern is None:
        view = _leading_batch(plan.parameter.ndim)
    return replace(plan, kind=kind, view=view, is_guess=False)


def guesses_message(plans: list[ParameterPlan]) -> str:
    """What was assumed of parameters that could be anything, and how to overrule it."""
    first = plans[0]
    *batch, m, n = first.shape
    what = f"a {m} x {n} matrix" if batch in ([], [1]) else f"{' x '.join(map(str, batch))} matrices of {m} x {n}"
    others = f" (and {len(plans) - 1} more)" if len(plans) > 1 else ""
    axes = " ".join("abcdefgh"[: first.parameter.ndim])
    view = f"{axes} -> {axes[0]} ({axes[2:]})"
    return (
        f"parameter {first.name!r} {tuple(first.parameter.shape)}{others} belongs to no layer that gradlr knows, and was taken "
        f'as {what}. Overrule it with groups=[{{"match": {first.name!r}, "kind": "table"}}] (rows that are looked up, such as '
        f'positions) or "vector", or with views={{{first.name!r}: {view!r}}}; kind "matrix" confirms it'
    )
