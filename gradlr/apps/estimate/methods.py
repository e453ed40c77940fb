"""The ways to train that are estimated: each makes a model ready and takes steps, while the tracker looks on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ...attach import attach
from ...errors import ArgumentError
from ...gradient import GradientOperator, RowSparse
from ...optimizer import GradLR
from ...params.kinds import EMBEDDING, MATRIX, plan_parameters
from ...tensors import is_sharded
from ...tracker import LossTracker
from .devices import DP, FSDP, SHARDS
from .memory_tracker import GRADIENTS, STATE, WORKSPACE, MemoryTracker
from .peers import AdamW8bit, add_adapters
from .replay import Receive, replay_updates, tensors_of, waiting_gradient

LORA_RANK = 8  # peft's own default


@dataclass(frozen=True)
class Method:
    """A named way to train.

    Attributes:
        name: What `method=` calls it.
        label: What tables call it.
        shards: Ways to train on several devices that it has: those of `gradlr.apps.estimate.devices`.
        optimizer: Makes an optimizer of groups of parameters; None for gradlr, and where nothing is updated.
        options: Of `attach`, for gradlr: those by which this method differs; None for all others.
        has_adapters: Whether LoRA's adapters are trained in the place of the model.
        is_4bit: Whether what they are put around is in 4 bits.
    """

    name: str
    label: str
    shards: tuple[str, ...] = SHARDS
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    options: dict[str, Any] | None = None
    has_adapters: bool = False
    is_4bit: bool = False

    @property
    def is_gradlr(self) -> bool:
        """Whether it takes the options of `attach`."""
        return self.options is not None

    def adapt(self, model: nn.Module, rank: int | None) -> None:
        """Change the model before it is sharded.

        Raises:
            ArgumentError: it has no layer to put an adapter around.
        """
        if not self.has_adapters:
            return
        if not add_adapters(model, _linear_weights(model), rank or LORA_RANK, is_4bit=self.is_4bit):
            kind = type(model).__name__
            raise ArgumentError(f"method={self.name!r}: {kind} has no Linear inside, head aside, to put an adapter around")

    def prepare(self, model: nn.Module, tracker: MemoryTracker, options: dict[str, Any]) -> Training:
        """Make a model ready; `options` are those of `attach`."""
        if self.options is not None:
            return GradlrTraining(model, tracker, self.options | options)
        return Training(model, tracker, self.optimizer)


class Training:
    """One way to train at work on one model, with an optimizer of torch's kind, which updates after backward.

    Args:
        model: What is trained.
        tracker: Counts what it takes.
        make: The optimizer, given groups of parameters and a rate; where None, nothing is updated, and gradients are dropped.

    Attributes:
        steps: How many steps it takes until nothing new is kept.
    """

    steps = 2

    def __init__(
        self, model: nn.Module, tracker: MemoryTracker, make: Callable[..., torch.optim.Optimizer] | None = None
    ) -> None:
        self.model, self.memory = model, tracker
        # Parameters whose gradient comes from an embedding's lookups alone.
        self.lookups: set[nn.Parameter] = set()
        self._nodes = [self._watch(parameter) for parameter in model.parameters() if parameter.requires_grad]
        self._gathered: set[nn.Parameter] = set()
        if any(map(is_sharded, model.parameters())):
            for module in model.modules():
                module.register_forward_pre_hook(self._watch_gathered)
        # Torch's kernels over many parameters take sharded ones or whole ones, not both together.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parts = [[one for one in trained if is_sharded(one) == sharded] for sharded in (False, True)]
        self.optimizer = None if make is None else make([{"params": part} for part in parts if part], lr=1e-3)
        self._move_state()

    def _watch(self, parameter: nn.Parameter) -> Any:
        def before(gradients: tuple[Tensor | None, ...]) -> None:
            found = tensors_of(gradients)
            self.memory.move(found, GRADIENTS)
            self.lookups.update([parameter] if any(map(self.memory.is_lookup, found)) else [])

        # A hook on the node, not on the parameter: gradlr takes a weight with a hook of somebody's another way.
        node = get_gradient_edge(parameter).node
        node.register_prehook(before)
        return node

    def _watch_gathered(self, module: nn.Module, _: Any) -> None:
        # By now FSDP2 has put whole parameters in the place of its shards, the same ones in each step.
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and not is_sharded(parameter) and parameter not in self._gathered:
                self._gathered.add(parameter)
                self._nodes.append(self._watch(parameter))

    def step(self, compute_loss: Callable[[], Tensor]) -> None:
        """Forward, backward and update."""
        self.memory.enter("forward")
        loss = compute_loss()
        self.memory.enter("backward")
        self.backward(loss)
        self.memory.enter("step")
        self.update()

    def backward(self, loss: Tensor) -> None:
        """Backward, and what is done inside it."""
        loss.backward()

    def touched_rows(self, mask: Tensor, tokens: int) -> int:
        """At most how many rows of an embedding get a gradient, given a byte for each row, and the tokens of a step."""
        return len(mask)

    def update(self) -> None:
        """What follows backward."""
        if self.optimizer is not None:
            with self.memory.counting_as(WORKSPACE):
                self.optimizer.step()
        self._move_state()
        (self.model if self.optimizer is None else self.optimizer).zero_grad()

    def _move_state(self) -> None:
        states = [] if self.optimizer is None else self.optimizer.state.values()
        self.memory.move([value for state in states for value in state.values()], STATE)


class GradlrTraining(Training):
    """gradlr itself: the real `attach`, its hooks, rules and writes.

    Args:
        model, tracker: As for `Training`.
        options: Of `attach`.
    """

    steps = 1  # its state is made by attach
    optimizer: GradLR

    def __init__(self, model: nn.Module, tracker: MemoryTracker, options: dict[str, Any]) -> None:
        self.losses = LossTracker()
        with tracker.counting_as(WORKSPACE):
            super().__init__(model, tracker, lambda groups, lr: attach(model, self.losses, **options))
        replay_updates(self.optimizer, tracker, lambda receive: partial(self._receive, receive))

    def backward(self, loss: Tensor) -> None:
        with self.memory.counting_as(WORKSPACE):
            shown = cast(Tensor, self.losses(loss))
        shown.backward()

    def touched_rows(self, mask: Tensor, tokens: int) -> int:
        """Lookups touch one row a token; a head, and an embedding that is one too, touch all."""
        embeddings = [record for record in self.optimizer.records if record.plan.kind == EMBEDDING]
        starts = itertools.accumulate((record.plan.shape[0] for record in embeddings), initial=0)
        record = next(record for record, start in zip(embeddings, starts, strict=False) if start == mask.storage_offset())
        parameter = record.plan.parameter
        is_few = isinstance(waiting_gradient(self.optimizer, parameter), RowSparse) or parameter in self.lookups
        return min(len(mask), tokens) if is_few else len(mask)

    def _receive(self, receive: Receive, parameter: nn.Parameter, gradient: GradientOperator) -> None:
        with self.memory.counting_as(WORKSPACE):
            receive(parameter, gradient)
        self.memory.move(self.optimizer.state[parameter].values(), STATE)
        if (waiting := waiting_gradient(self.optimizer, parameter)) is not None:
            self.memory.move(vars(waiting).values(), GRADIENTS)


def _linear_weights(model: nn.Module) -> list[nn.Parameter]:
    # "All linear layers" of peft: no embedding, no head.
    return [plan.parameter for plan in plan_parameters(model) if plan.kind == MATRIX and plan.parameter.ndim == 2]


_FUSED, _FOREACH = partial(torch.optim.AdamW, fused=True), partial(torch.optim.AdamW, foreach=True)

# Under DDP a gradient is the devices' mean only after backward. Other people's packages know no sharded parameters.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("no_optimizer", "forward + backward, no optimizer"),
        Method("adamw", "AdamW (fused)", optimizer=_FUSED),
        Method("adamw_foreach", "AdamW (foreach)", optimizer=_FOREACH),
        Method("adamw8bit", "AdamW, 8 bits (bitsandbytes)", (DP,), optimizer=AdamW8bit),
        Method("lora", "LoRA (AdamW)", (DP, FSDP), optimizer=_FUSED, has_adapters=True),
        Method("qlora", "QLoRA (AdamW)", (DP,), optimizer=_FUSED, has_adapters=True, is_4bit=True),
        Method("gradlr", "gradlr", options={}),
        Method("gradlr_step", 'gradlr, apply="step"', options={"apply": "step"}),
        Method("gradlr_adaptor", 'gradlr, capture="adaptor"', (DP,), options={"capture": "adaptor"}),
        Method("gradlr_one_sided", 'gradlr, capture="one_sided"', (DP,), options={"capture": "one_sided"}),
    )
}
