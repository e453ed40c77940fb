"""The ways to train that are estimated: each makes a model ready and takes one step, while the ledger looks on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ...attach import attach
from ...errors import ArgumentError
from ...gradient import Dense, GradientOperator, RowSparse
from ...params.kinds import EMBEDDING, MATRIX, is_sharded, plan_parameters
from ...tracker import LossTracker
from .devices import DP, FSDP, SHARDS
from .ledger import GRADIENTS, STATE, WORKSPACE, MemoryTracker
from .peers import AdamW8bit, Apollo, GaLore, LowRankAdam, Peer, add_adapters

Loss = Callable[[], Tensor]


class Training:
    """One way to train at work on one model.

    Attributes:
        steps: How many steps it takes until nothing new is kept.
        state: Tensors that it keeps from step to step, by parameter.
    """

    steps = 2

    def __init__(self, model: nn.Module, ledger: MemoryTracker) -> None:
        self.model, self.ledger = model, ledger
        self._nodes = [self._watch(parameter) for parameter in model.parameters() if parameter.requires_grad]
        self._gathered: set[nn.Parameter] = set()
        if any(map(is_sharded, model.parameters())):
            for module in model.modules():
                module.register_forward_pre_hook(self._watch_gathered)

    def _watch(self, parameter: nn.Parameter) -> Any:
        # A hook on the node, not on the parameter: gradlr takes a weight with a hook of somebody's another way.
        node = get_gradient_edge(parameter).node
        node.register_prehook(lambda gradients: self.ledger.move([g for g in gradients if g is not None], GRADIENTS))
        return node

    def _watch_gathered(self, module: nn.Module, _: Any) -> None:
        # By now FSDP2 has put whole parameters in the place of its shards, the same ones in each step.
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and not is_sharded(parameter) and parameter not in self._gathered:
                self._gathered.add(parameter)
                self._nodes.append(self._watch(parameter))

    def step(self, compute: Loss) -> None:
        """Forward, backward and update."""
        self.ledger.enter("forward")
        loss = compute()
        self.ledger.enter("backward")
        self.backward(loss)
        self.ledger.enter("step")
        self.update()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        """What follows backward: here the gradients are dropped, and no weight changes."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def state_tensors(self) -> Iterable[Tensor]:
        return ()


class TorchTraining(Training):
    """An optimizer of torch."""

    def __init__(
        self, model: nn.Module, ledger: MemoryTracker, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        super().__init__(model, ledger)
        self.optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])

    def update(self) -> None:
        with self.ledger.booking(WORKSPACE):
            self.optimizer.step()
        self.ledger.move(self.state_tensors(), STATE)
        self.optimizer.zero_grad()

    def state_tensors(self) -> Iterable[Tensor]:
        return [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


class PeerTraining(Training):
    """An optimizer that works parameter by parameter: after backward, or as soon as each gradient is complete."""

    def __init__(
        self, model: nn.Module, ledger: MemoryTracker, make: Callable[[list[nn.Parameter]], Peer], *, is_layerwise: bool
    ) -> None:
        super().__init__(model, ledger)
        self.peer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
        ledger.move(self.state_tensors(), STATE)
        if is_layerwise:
            for parameter in self.peer.parameters:
                parameter.register_post_accumulate_grad_hook(self._take_and_drop)

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter) -> None:
        with self.ledger.booking(WORKSPACE):
            self.peer.update(parameter)
        self.ledger.move(self.peer.state[parameter].values(), STATE)

    def _take_and_drop(self, parameter: nn.Parameter) -> None:
        self._take(parameter)
        parameter.grad = None

    def update(self) -> None:
        for parameter in self.peer.parameters:
            if parameter.grad is not None:
                self._take(parameter)
        super().update()

    def state_tensors(self) -> Iterable[Tensor]:
        shared = vars(self.peer).get("codes", ())
        return [*shared, *(value for state in self.peer.state.values() for value in state.values())]


class GradlrTraining(Training):
    """gradlr itself: the real `attach`, its hooks, rules and writes."""

    steps = 1  # its state is made by attach

    def __init__(self, model: nn.Module, ledger: MemoryTracker, options: dict[str, Any]) -> None:
        super().__init__(model, ledger)
        self._lookups: set[nn.Parameter] = set()
        with ledger.booking(WORKSPACE):
            self.tracker = LossTracker()
            self.optimizer = attach(model, self.tracker, **options)
        ledger.move(self.state_tensors(), STATE)
        self._receive, self.optimizer.receive = self.optimizer.receive, self._take
        self._write, self.optimizer._write = self.optimizer._write, self._replay_write

    def backward(self, loss: Tensor) -> None:
        with self.ledger.booking(WORKSPACE):
            shown = self.tracker(loss)
        shown.backward()

    def touched_rows(self, mask: Tensor, tokens: int) -> int:
        """At most how many rows of a table get a gradient in a step, given one byte for each row, and the step's tokens.

        Lookups touch one row a token; a head, and an embedding that is one too, touch all.
        """
        tables = [record for record in self.optimizer.records if record.plan.kind == EMBEDDING]
        starts = itertools.accumulate((record.plan.shape[0] for record in tables), initial=0)
        record = next(record for record, start in zip(tables, starts, strict=False) if start == mask.storage_offset())
        is_few = isinstance(record.pending, RowSparse) or record.plan.parameter in self._lookups
        return min(len(mask), tokens) if is_few else len(mask)

    def _take(self, parameter: nn.Parameter, gradient: GradientOperator) -> None:
        if isinstance(gradient, Dense) and self.ledger.is_lookup(gradient.matrix):
            self._lookups.add(parameter)
        with self.ledger.booking(WORKSPACE):
            if self.optimizer.apply == "backward":
                # Anew in each step: the optimizer wants to see a gradient between two losses.
                signature = ("update", self.tracker.count, *self._signature(parameter, gradient))
                self.ledger.replay(signature, lambda: self._receive(parameter, gradient))
                self.ledger.move(_tensors(self.optimizer.state[parameter]), STATE)
                return
            self._receive(parameter, gradient)
        record = self.optimizer._records[id(parameter)]
        self.ledger.move(_tensors(vars(record.pending)), GRADIENTS)

    def _signature(self, parameter: nn.Parameter, gradient: GradientOperator) -> tuple:
        record = self.optimizer._records[id(parameter)]
        known = (
            record.rule,
            record.rank,
            record.momentum_rank,
            record.capture,
            record.plan.view.pattern,
        )
        decay = self.optimizer.param_groups[record.group_index]["weight_decay"]
        is_owned = vars(gradient).get("_is_owned")
        return (*known, decay, is_owned, type(gradient), *map(_form, [parameter, *_tensors(vars(gradient))]))

    def _replay_write(self, parameter: nn.Parameter, view: Any, update: Any, **options: Any) -> None:
        forms = [(name, _form(part)) for name, part in vars(update).items() if isinstance(part, Tensor)]
        signature = ("write", view.pattern, options["weight_decay"], _form(parameter), *forms)
        if self.optimizer.apply == "backward":  # the whole update is replayed
            self._write(parameter, view, update, **options)
        else:
            self.ledger.replay(signature, lambda: self._write(parameter, view, update, **options))

    def update(self) -> None:
        with self.ledger.booking(WORKSPACE):
            self.optimizer.step()
        self.ledger.move(self.state_tensors(), STATE)

    def state_tensors(self) -> Iterable[Tensor]:
        return [value for state in self.optimizer.state.values() for value in _tensors(state)]


def _tensors(entries: dict[str, Any]) -> list[Tensor]:
    return [value for value in entries.values() if isinstance(value, Tensor)]


def _form(tensor: Tensor) -> tuple:
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype)


@dataclass(frozen=True)
class Method:
    """A named way to train.

    Attributes:
        name: What `method=` calls it.
        label: What tables call it.
        rank: The rank where none is given: its package's own default; None where it has none, or attach knows it.
        prepare: Makes a model ready, given model, ledger, rank and the options of `attach`.
        shards: Ways to train on several devices that it has: those of `gradlr.apps.estimate.devices`.
        adapt: Changes the model before it is sharded, given model and rank.
    """

    name: str
    label: str
    rank: int | None
    prepare: Callable[[nn.Module, MemoryTracker, Any, dict[str, Any]], Training]
    shards: tuple[str, ...] = SHARDS
    adapt: Callable[[nn.Module, Any], None] = lambda model, rank: None

    @property
    def is_gradlr(self) -> bool:
        """Whether it takes the options of `attach`."""
        return self.name.startswith("gradlr")


def _torch(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[..., Training]:
    def prepare(model: nn.Module, ledger: MemoryTracker, rank: Any, _: dict[str, Any]) -> Training:
        return TorchTraining(model, ledger, lambda parameters: make(_alike(parameters), lr=1e-3, **options))

    return prepare


def _alike(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    # Torch's kernels over many parameters take sharded ones or whole ones, not both together.
    parts = [[one for one in parameters if is_sharded(one) == sharded] for sharded in (False, True)]
    return [{"params": part} for part in parts if part]


def _adamw_8bit(model: nn.Module, ledger: MemoryTracker, rank: Any, _: dict[str, Any]) -> Training:
    return PeerTraining(model, ledger, AdamW8bit, is_layerwise=False)


def _low_rank(kind: type[LowRankAdam], *, is_layerwise: bool = False) -> Callable[..., Training]:
    def prepare(model: nn.Module, ledger: MemoryTracker, rank: Any, _: dict[str, Any]) -> Training:
        projected = _matrices(model)
        return PeerTraining(model, ledger, lambda all_: kind(all_, projected, rank), is_layerwise=is_layerwise)

    return prepare


def _with_adapters(model: nn.Module, rank: Any) -> None:
    if not add_adapters(model, _matrices(model), rank):
        raise ArgumentError(f"method='lora': {type(model).__name__} has no Linear inside, head aside, to put an adapter around")


def _gradlr(**own: Any) -> Callable[..., Training]:
    def prepare(model: nn.Module, ledger: MemoryTracker, rank: Any, options: dict[str, Any]) -> Training:
        given = {} if rank is None else {"rank": rank}
        return GradlrTraining(model, ledger, {**own, **given, **options})

    return prepare


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    # "All linear layers" of peft, GaLore and APOLLO: no embedding, no head.
    return [plan.parameter for plan in plan_parameters(model) if plan.kind == MATRIX and plan.parameter.ndim == 2]


_ADAMW = _torch(torch.optim.AdamW, fused=True)

# Under DDP a gradient is the devices' mean only after backward, too late for layer by layer. Torch's fused SGD and other people's
# packages know no sharded parameters.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("no_optimizer", "forward + backward, no optimizer", None, lambda model, ledger, *_: Training(model, ledger)),
        Method("sgd", "SGD", None, _torch(torch.optim.SGD, fused=True), (DP,)),
        Method("adamw", "AdamW (fused)", None, _ADAMW),
        Method("adamw_foreach", "AdamW (foreach)", None, _torch(torch.optim.AdamW, foreach=True)),
        Method("adamw8bit", "AdamW, 8 bits (bitsandbytes)", None, _adamw_8bit, (DP,)),
        Method("galore", "GaLore", 128, _low_rank(GaLore), (DP,)),
        Method("galore_layerwise", "GaLore, layer by layer", 128, _low_rank(GaLore, is_layerwise=True), ()),
        Method("apollo", "APOLLO", 256, _low_rank(Apollo), (DP,)),
        Method("lora", "LoRA (AdamW)", 8, _ADAMW, (DP, FSDP), _with_adapters),
        Method("gradlr", "gradlr", None, _gradlr()),
        Method("gradlr_step", 'gradlr, apply="step"', None, _gradlr(apply="step")),
        Method("gradlr_adaptor", 'gradlr, capture="adaptor"', None, _gradlr(capture="adaptor"), (DP,)),
        Method("gradlr_one_sided", 'gradlr, capture="one_sided"', None, _gradlr(capture="one_sided"), (DP,)),
    )
}
