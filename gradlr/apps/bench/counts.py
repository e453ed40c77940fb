"""What one update asks of a GPU: launches, bytes, waits and workspace, counted on tensors without values.

Counts are the same on every machine, so that tests can hold them; they are no times. An operation that writes counts as one
launch, a view as none; its bytes are those of the tensors that it reads and writes, each counted once. CPU tensors take the ways
of a GPU's meanwhile. Counted is what one parameter more asks for in a model that has two of its form already, beyond what
forward and backward ask for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ... import attach, rules
from ...tracker import LossTracker
from ..estimate.memory_tracker import MemoryTracker
from ..estimate.stubs import like_a_gpu
from .environment import environment, markdown
from .memory import MIB

# What makes no kernel run: memory without numbers in it, and constants that the host keeps.
_SILENT = {
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    *("lift_fresh", "scalar_tensor", "resize_", "set_"),
}
_FEW = 2  # layers that are there already


@dataclass
class Counts:
    """What was asked of the device.

    Attributes:
        launches: Operations that write.
        bytes: What they read and write.
        waits: Numbers that the host has asked the device for.
        workspace: The most bytes that an update holds beyond what was there when its gradient came; None where nobody looked.
        calls: Name of an operation → how often it was launched.
    """

    launches: int = 0
    bytes: int = 0
    waits: int = 0
    workspace: int | None = 0
    calls: dict[str, int] = field(default_factory=dict)

    def less(self, other: Counts) -> Counts:
        """The difference, but for the workspace, which stays."""
        calls = {name: count - other.calls.get(name, 0) for name, count in self.calls.items()}
        return Counts(
            self.launches - other.launches,
            self.bytes - other.bytes,
            self.waits - other.waits,
            self.workspace,
            {name: count for name, count in sorted(calls.items(), key=lambda item: -item[1]) if count},
        )


class Counter(TorchDispatchMode):
    """Counts the operations that run under it.

    Attributes:
        counts: So far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name, counts = function._schema.name.partition("::")[2], self.counts
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name == "_local_scalar_dense":
            counts.waits += not _is_step_count(given[0])
        elif (made or given) and all(_is_step_count(one) for one in (*given, *made)):
            pass  # the number of a step, which the host keeps
        elif name not in _SILENT and (written := _written(function, args, made, given)):
            counts.launches += 1
            counts.calls[name] = counts.calls.get(name, 0) + 1
            counts.bytes += sum(one.nbytes for one in (*{id(one): one for one in given}.values(), *written))
        return result


def _is_step_count(tensor: Tensor) -> bool:
    return tensor.ndim == 0 and tensor.dtype == torch.int64


def _written(function: Any, args: tuple, made: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    """The tensors that an operation writes; none where it makes views."""
    schema = function._schema
    if schema.is_mutable:
        places = [place for place, one in enumerate(schema.arguments) if one.alias_info and one.alias_info.is_write]
        changed = tree_leaves([args[place] for place in places if place < len(args)])
        return [leaf for leaf in changed if isinstance(leaf, Tensor)] or made
    known = {one.untyped_storage()._cdata for one in given}
    return [one for one in made if one.untyped_storage()._cdata not in known]


@dataclass(frozen=True)
class Form:
    """A way to train a parameter.

    Attributes:
        name, label: For arguments and tables.
        options: Of `attach`.
        peer: Makes torch's own optimizer instead.
        forms_gradient: Whether backward makes the weight's gradient.
    """

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    peer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    forms_gradient: bool = True


_NO_RESIDUAL = {"rule": rules.LowRankPolar(residual=0)}
FORMS = {
    form.name: form
    for form in (
        Form("hook", "gradlr"),
        Form("hook_no_residual", "gradlr, no residual", _NO_RESIDUAL),
        Form("adaptor", 'gradlr, capture="adaptor"', {"capture": "adaptor"}, forms_gradient=False),
        Form("adaptor_no_residual", "the same, no residual", {"capture": "adaptor", **_NO_RESIDUAL}, forms_gradient=False),
        Form("step", 'gradlr, apply="step"', {"apply": "step"}),
        Form("adamw_foreach", "AdamW (foreach)", peer=lambda given: torch.optim.AdamW(given, lr=1e-3, foreach=True)),
        Form("adamw", "AdamW (fused)", peer=lambda given: torch.optim.AdamW(given, lr=1e-3, fused=True)),
        *([Form("muon", "Muon", peer=lambda given: torch.optim.Muon(given, lr=1e-3))] if hasattr(torch.optim, "Muon") else []),
    )
}


class _Side(nn.Module):
    """Layers side by side, on one input."""

    def __init__(self, make: Callable[[], nn.Module], count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).float().sum() for layer in self.layers]).sum()


class _Scale(nn.Module):
    """A layer whose only parameter is a vector."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@dataclass(frozen=True)
class Subject:
    """What is counted: a parameter of some shape and dtype, in a layer, with some tokens a step.

    Attributes:
        kind: "matrix" of a Linear, "vector", or "embedding", whose gradient autograd makes as large as the table.
        shape: Of the parameter.
        dtype: Of the parameter and the activations.
        rank: r.
        tokens: A step.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    rank: int = 64
    tokens: int = 2048

    @property
    def numel(self) -> int:
        """Numbers in the parameter."""
        return torch.Size(self.shape).numel()

    def layer(self) -> nn.Module:
        """A new layer with one such parameter."""
        m, n = self.shape[0], self.shape[-1]
        if self.kind == "vector":
            return _Scale(n, self.dtype)
        return nn.Embedding(m, n, dtype=self.dtype) if self.kind == "embedding" else nn.Linear(n, m, bias=False, dtype=self.dtype)

    def inputs(self) -> Tensor:
        """What the layer is called with."""
        if self.kind == "embedding":
            return torch.zeros(self.tokens, dtype=torch.int64)
        return torch.ones(self.tokens, self.shape[-1], dtype=self.dtype, requires_grad=True)


SUBJECTS = (
    Subject("matrix", (512, 512)),
    Subject("matrix", (4096, 4096)),
    Subject("matrix", (4096, 11008)),
    Subject("embedding", (128_000, 4096)),
    Subject("vector", (4096,)),
)


def measure(*, rank: int = 64, tokens: int = 2048, dtype: str = "bfloat16", shapes: Sequence[str] = ()) -> dict[str, Any]:
    """What one update asks for, of each form and subject.

    Args:
        rank, tokens, dtype: Of the subjects.
        shapes: Matrices as "512x512"; the usual subjects where none are given.
    """
    own = [Subject("matrix", tuple(map(int, shape.split("x")))) for shape in shapes]
    results = []
    for subject in own or SUBJECTS:
        subject = replace(subject, rank=rank, tokens=tokens, dtype=getattr(torch, dtype))
        for form in FORMS.values():
            if subject.kind == "matrix" or form.name in ("hook", "step", "adamw", "adamw_foreach"):
                found = asdict(count(form, subject))
                described = {"kind": subject.kind, "shape": list(subject.shape), "name": form.name, "label": form.label}
                results.append({**described, "bytes_per_number": round(found["bytes"] / subject.numel, 2), **found})
    workload = {"rank": rank, "tokens": tokens, "dtype": dtype}
    return {"environment": environment("cpu"), "workload": workload, "results": results}


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    head = ["parameter", "trained by", "launches", "bytes a number", "waits", "workspace, MiB"]
    return markdown(
        head,
        (
            [
                f"{row['kind']} {' × '.join(map(str, row['shape']))}",
                row["label"],
                str(row["launches"]),
                f"{row['bytes_per_number']:.1f}",
                str(row["waits"]),
                "" if row["workspace"] is None else f"{row['workspace'] / MIB:.1f}",
            ]
            for row in report["results"]
        ),
    )


def count(form: Form, subject: Subject) -> Counts:
    """What one parameter more asks for. The workspace is that of gradlr's own update of one; of others it is not told."""
    with FakeTensorMode(), like_a_gpu():
        return difference(form, subject)


def difference(form: Form, subject: Subject, count_in: Callable[[], Any] | None = None, device: str = "cpu") -> Counts:
    """The same without a mode around it: of what a device really does, where `count_in()` is a context that counts it.

    Its attribute `counts` is set before. Without `count_in`, for tensors that hold no values, operations and memory are counted.
    """
    with torch.device(device):
        few, many = (_step(form, subject, layers, count_in) for layers in (_FEW, _FEW + 1))
        plain_few, plain_many = (_step(None, subject, layers, count_in, form.forms_gradient) for layers in (_FEW, _FEW + 1))
    return many.less(few).less(plain_many.less(plain_few))


def _step(
    form: Form | None, subject: Subject, layers: int, count_in: Callable[[], Any] | None, forms_gradient: bool = True
) -> Counts:
    """The backward and the step of the second step, when all state is there."""
    model, x, counter = _Side(subject.layer, layers), subject.inputs(), (count_in or Counter)()
    memory = MemoryTracker() if count_in is None else None  # which answers for numbers that are not there
    weights = list(model.parameters())
    is_ours = form is not None and form.peer is None
    tracker: Any = LossTracker() if is_ours else lambda loss: loss
    optimizer: Any = None
    if form is None:
        for weight in weights:
            weight.requires_grad_(forms_gradient)
    elif form.peer is not None:
        optimizer = form.peer(weights)
    else:
        optimizer = attach(model, tracker, lr=1e-3, **{"rank": subject.rank, **form.options})
        if memory is not None:
            optimizer.receive = _watched(optimizer.receive, memory, counter)
            optimizer.step = _watched(optimizer.step, memory, counter)
    with memory or nullcontext():
        for _ in range(2):
            loss, x.grad, counter.counts = tracker(model(x)), None, Counts(workspace=0 if is_ours else None)
            with counter:
                loss.backward()
                if optimizer is not None:
                    optimizer.step()
            for weight in weights:
                weight.grad = None
    if is_ours:
        optimizer.detach()
    return counter.counts


def _watched(work: Callable[..., Any], memory: MemoryTracker, counter: Counter) -> Callable[..., Any]:
    """The same, and the most that it holds beyond what was held before it is counted as workspace."""

    def watched(*given: Any) -> Any:
        before = sum(memory.held.values())
        memory.restart(keep_peak=False)
        result = work(*given)
        memory.restart(keep_peak=True)
        counter.counts.workspace = max(counter.counts.workspace or 0, memory.peak - before)
        return result

    return watched
