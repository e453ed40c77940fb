"""What each parameter is: a matrix, a table or a vector; and its view as (a batch of) m × n."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .errors import ArgumentError
from .gradient import is_transposed_linear

MATRIX, TABLE, VECTOR = "matrix", "table", "vector"
KINDS = (MATRIX, TABLE, VECTOR)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class View:
    """A parameter seen as (a batch of) matrices.

    Attributes:
        pattern: An einops expression "parameter axes -> [batch axes] m n", e.g. "o i h w -> o (i h w)"; None for as it is.
    """

    pattern: str | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The view (..., m, n); shares memory with `tensor` wherever strides allow."""
        if self.pattern is None:
            return tensor
        return rearrange(tensor, self.pattern, **self._sizes())

    def back(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `of`, for a parameter of the given shape."""
        if self.pattern is None:
            return matrix
        before, after = self.pattern.split("->")
        axes = _axis_sizes(before, shape)
        return rearrange(matrix, f"{after} -> {before}", **(axes | self._sizes()))

    def _sizes(self) -> dict[str, int]:
        return {"three": 3} if self.pattern and "three" in self.pattern.split("->")[0] else {}


def _axis_sizes(axes: str, shape: torch.Size) -> dict[str, int]:
    # Sizes of the parameter's plain axes; composed ones are found by einops from these and from the named sizes.
    names = axes.replace("(", " ( ").replace(")", " ) ").split()
    sizes, depth, index = {}, 0, 0
    for name in names:
        if name == "(":
            depth += 1
        elif name == ")":
            depth -= 1
            index += 1
        elif depth == 0:
            sizes[name] = shape[index]
            index += 1
    return sizes


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter, as gradlr sees it.

    Attributes:
        name: The first name the model knows it by.
        parameter: The parameter itself.
        kind: "matrix", "table" or "vector".
        view: How it becomes (a batch of) matrices; the identity for vectors.
    """

    name: str
    parameter: nn.Parameter
    kind: str
    view: View

    @property
    def shape(self) -> torch.Size:
        """Shape of the view."""
        return self.view.of(self.parameter.detach()).shape


def plan_parameters(model: nn.Module) -> list[ParameterPlan]:
    """What every trainable parameter of the model is, in the order of `model.named_parameters()`.

    Embeddings and a head of the same shape at the end of the model are tables; weights of norms, everything one-dimensional
    and everything with one row or one column are vectors; convolutions are folded to (o, i·h·w), transformers' Conv1D is turned
    to (fan_out, fan_in); other parameters with two axes or more are matrices, leading axes a batch.
    """
    owners = _owners(model)
    table_ids = _tables(model)
    plans = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and isinstance(parameter, UninitializedParameter):
            plans.append(ParameterPlan(name, parameter, VECTOR, View()))
        elif parameter.requires_grad:
            kind, view = _classify(parameter, *owners[id(parameter)], table_ids)
            plans.append(ParameterPlan(name, parameter, kind, view))
    return plans


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    owners: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), (module, name))
    return owners


def _tables(model: nn.Module) -> set[int]:
    embeddings = [module.weight for module in model.modules() if isinstance(module, _EMBEDDINGS)]
    tables = {id(weight) for weight in embeddings}
    # An untied head is the last Linear of the model and mirrors the embedding's shape (vocabulary, width).
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    if linears and any(linears[-1].shape == weight.shape for weight in embeddings):
        tables.add(id(linears[-1]))
    return tables


def _classify(parameter: Tensor, owner: nn.Module, name: str, table_ids: set[int]) -> tuple[str, View]:
    if id(parameter) in table_ids:
        return TABLE, View()
    if parameter.ndim < 2 or parameter.numel() == 0 or isinstance(owner, _NORMS):
        return VECTOR, View()
    view = _natural_view(parameter, owner, name)
    if min(view.of(parameter.detach()).shape[-2:]) == 1:
        return VECTOR, View()
    return MATRIX, view


def _natural_view(parameter: Tensor, owner: nn.Module, name: str) -> View:
    if name == "weight" and is_transposed_linear(owner):
        return View("i o -> o i")
    if isinstance(owner, _CONVOLUTIONS):
        axes = " ".join("hwd"[: parameter.ndim - 2])
        return View(f"o i {axes} -> o (i {axes})")
    if isinstance(owner, nn.MultiheadAttention) and name == "in_proj_weight":
        return View("(three o) i -> three o i")
    if parameter.ndim > 3:
        axes = " ".join(f"b{index}" for index in range(parameter.ndim - 2))
        return View(f"{axes} m n -> ({axes}) m n")
    return View()


def with_kind(plan: ParameterPlan, kind: str) -> ParameterPlan:
    """The plan with another kind.

    Raises:
        ArgumentError: a parameter with fewer than two axes should be a matrix or a table, or the kind is unknown.
    """
    if kind not in KINDS:
        raise ArgumentError(f"kind={kind!r}: use one of {', '.join(KINDS)}")
    if kind != VECTOR and (plan.parameter.ndim < 2 or plan.parameter.numel() == 0):
        shape = tuple(plan.parameter.shape)
        raise ArgumentError(f"parameter {plan.name!r} has shape {shape}; it cannot be a {kind}: leave kind out")
    view = View() if kind == VECTOR else plan.view
    return ParameterPlan(plan.name, plan.parameter, kind, view)
