"""What each parameter is: a matrix, an embedding or a vector, and its view as (a batch of) m × n. One table says what follows."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from ..errors import ArgumentError
from ..layers import AS_IT_IS, View, layer_type_of, natural_view
from ..layers.registry import is_registered, leading_batch
from ..linalg import UNSHARDED, Layout
from ..tensors import is_sharded, local


@dataclass(frozen=True)
class Kind:
    """A row of the table: what a kind of parameter means for its update, unless the user says otherwise.

    Attributes:
        name: What `kind=` and `kinds=` call it.
        rule: Name of its default rule.
        lr_share: Its learning rate, as a share of `lr`.
        options: Those of a group that do something for it: "weight_decay" where that applies; "rank" and "momentum_rank" where
            its gradients may be compressed, so that its rule may be one that works on matrices.
    """

    name: str
    rule: str
    lr_share: float
    options: tuple[str, ...]

    @property
    def is_vector(self) -> bool:
        """Whether it is taken entry by entry, so that its axes say nothing."""
        return "rank" not in self.options


MATRIX, EMBEDDING, VECTOR = "matrix", "embedding", "vector"
_COMPRESSED = ("lr", "beta", "weight_decay", "rank", "momentum_rank")

# One learning rate is tuned, AdamW's; the others follow it. Embeddings at a fraction of it: that is where most of the forgetting
# comes from (docs/study.md).
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(MATRIX, "low_rank_polar", lr_share=1.0, options=(*_COMPRESSED, "rule")),
        Kind(EMBEDDING, "rowwise_rmsprop", lr_share=1 / 8, options=_COMPRESSED),
        Kind(VECTOR, "adam", lr_share=1.0, options=("lr", "beta")),
    )
}
_OTHER_WORDS = {"table": EMBEDDING}

_ODD_WORDS = ("emb", "pos", "table", "log")


def kind_named(name: str) -> str:
    """The kind that a user's word means; "table" is another word for "embedding".

    Raises:
        ArgumentError: there is none of that name.
    """
    known = _OTHER_WORDS.get(name, name) if isinstance(name, str) else name
    if not isinstance(known, str) or known not in KINDS:
        raise ArgumentError(f"kind={name!r}: use one of {', '.join(KINDS)}")
    return known


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter, as gradlr sees it.

    Attributes:
        name: The first name the model knows it by.
        parameter: The parameter itself.
        kind: "matrix", "embedding" or "vector".
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
    natural: View = AS_IT_IS
    layout: Layout = UNSHARDED

    @cached_property
    def shape(self) -> torch.Size:
        """Shape of the view, of the whole parameter where it is sharded."""
        return self.view.of(outline(self.parameter)).shape

    @property
    def shape_here(self) -> torch.Size:
        """Shape of the view of what lies in this process."""
        return self.view.of(self.here).shape

    @property
    def here(self) -> Tensor:
        """The parameter's entries in this process, detached: all of them, or its shard's."""
        return local(self.parameter.detach())


def outline(tensor: Tensor) -> Tensor:
    """A detached tensor of the same shape, for asking what a view makes of it: without values where it is sharded."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if is_sharded(tensor) else tensor.detach()


def plan_parameters(model: nn.Module) -> list[ParameterPlan]:
    """What every trainable parameter of the model is, in the order of `model.named_parameters()`.

    Embeddings and a head of the same shape at the end of the model are embeddings; weights of norms, biases, everything
    one-dimensional and everything with one row or one column are vectors. Convolutions are folded to (o, i·h·w) and transposed
    ones to (o·h·w, i), a batch of them where grouped; transformers' Conv1D is turned to (fan_out, fan_in); other parameters with
    two axes or more are matrices, leading axes a batch. A parametrized weight (weight_norm, orthogonal) is what its layer's is.
    """
    uses = _uses(model)
    # The first layer with a parameter owns it; a parametrized layer comes before its parametrizations.
    owners = {id(parameter): (layer, name) for parameter, layer, name in reversed(uses)}
    embeddings = _embeddings(uses)
    plans = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, UninitializedParameter):  # of a lazy module: without a shape, there is nothing to see
            plans.append(ParameterPlan(name, parameter, VECTOR, AS_IT_IS))
            continue
        owner, own_name = owners[id(parameter)]
        natural = natural_view(owner, own_name, parameter) if parameter.ndim > 1 else AS_IT_IS
        kind = EMBEDDING if id(parameter) in embeddings else _matrix_or_vector(parameter, owner, own_name, natural)
        is_guess = kind == MATRIX and _is_guess(parameter, owner, own_name)
        view = natural if kind == MATRIX else AS_IT_IS
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
            for name, parametrizations in module.get_submodule("parametrizations").named_children():
                uses += [(parameter, module, name) for parameter in parametrizations.parameters(recurse=False)]
    return uses


def _embeddings(uses: list[Use]) -> set[int]:
    """Ids of the weights of embeddings, and of a head that mirrors one."""
    weights = [(weight, layer) for weight, layer, name in uses if name == "weight" and weight.ndim == 2 and weight.numel()]
    lookups = [(weight, layer) for weight, layer in weights if layer_type_of(layer).is_lookup]
    tables = [weight for weight, layer in lookups if weight.shape[1] == layer.embedding_dim]
    # An untied head is the last Linear of the model and has the embedding's shape (vocabulary, width).
    heads = [weight for weight, layer in weights if isinstance(layer, nn.Linear)][-1:]
    mirrors = [head for head in heads if any(head.shape == table.shape for table in tables)]
    return {id(weight) for weight in (*tables, *mirrors)}


def _matrix_or_vector(parameter: Tensor, owner: nn.Module, name: str, natural: View) -> str:
    is_bias = name == "bias" or name.endswith("_bias")
    if parameter.ndim < 2 or parameter.numel() == 0 or is_bias or layer_type_of(owner).is_norm:
        return VECTOR
    # One row or one column has one direction: there is nothing to compress.
    return VECTOR if min(natural.of(outline(parameter)).shape[-2:]) == 1 else MATRIX


def _is_guess(parameter: Tensor, owner: nn.Module, name: str) -> bool:
    # Two axes are a matrix and three are experts, unless there is one expert only, or the name speaks of a table or of logarithms
    # (Mamba's A_log: rates of decay, entry by entry).
    is_odd = parameter.ndim > 3 or (parameter.ndim == 3 and parameter.shape[0] == 1)
    # Words of "PatchEmbedding.pos_embed": patch, embedding, pos, embed.
    words = re.findall(r"[A-Z]?[a-z]+", f"{type(owner).__name__}.{name}")
    is_named_so = any(word.lower().startswith(_ODD_WORDS) for word in words)
    return not _is_known(owner) and (is_odd or is_named_so)


def _is_known(module: nn.Module) -> bool:
    """Whether the layer is torch's own, or stands in the registry."""
    homes = (base.__module__ for base in type(module).__mro__)
    home = next(home for home in homes if home.startswith("torch.nn.modules."))
    return home not in ("torch.nn.modules.module", "torch.nn.modules.container") or is_registered(module)


def with_kind(plan: ParameterPlan, kind: str) -> ParameterPlan:
    """The plan with another kind, by a user's word for it.

    Raises:
        ArgumentError: a parameter with fewer than two axes should be a matrix or an embedding, or the kind is unknown.
    """
    kind = kind_named(kind)
    is_vector = KINDS[kind].is_vector
    if not is_vector and (len(plan.shape) < 2 or plan.parameter.numel() == 0):
        shape = tuple(plan.parameter.shape)
        raise ArgumentError(f"parameter {plan.name!r} has shape {shape}; it cannot be a {kind}: leave kind out")
    view = AS_IT_IS if is_vector else plan.natural if KINDS[plan.kind].is_vector else plan.view
    if not is_vector and view.pattern is None:
        view = leading_batch(plan.parameter.ndim)
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
        f'as {what}. Overrule it with groups=[{{"match": {first.name!r}, "kind": "embedding"}}] (rows that are looked up, as '
        f'positions are) or "vector", or with views={{{first.name!r}: {view!r}}}; kind "matrix" confirms it'
    )
