"""What runs in each process of tests/integrations/test_processes.py: trainers that spread over several processes, on the CPU."""

import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import lightning
import pytest
import torch
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from accelerate_states import forget_accelerate
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from models import checkpointing_switch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import gradlr
from gradlr.integrations.accelerate import attach, clip_grad_norm_, unwrap
from gradlr.integrations.lightning import ShowLosses
from gradlr.integrations.transformers import Trainer

FOLDER = "GRADLR_TEST_FOLDER"
VOCABULARY, LENGTH = 40, 12
# At full rank processes exchange gradients as they are, and one process on the whole batch is the reference.
EXACT = {"lr": 1e-2, "rank": 1.0, "momentum_rank": 2}
LOW = {"lr": 1e-2, "rank": 4, "momentum_rank": 2}
# Sums in another order, in float32, which the polar factor enlarges up to 470-fold where singular values are small: 2.7e-5 was
# measured, of weights that move by 1e-2 a step.
CLOSE = {"rtol": 0, "atol": 5e-5}

EXPECTED = (
    ".*many workers", ".*pin_memory", ".*TypedStorage is deprecated", ".*LeafSpec.* is deprecated", ".*OMP_NUM_THREADS",
    ".*FSDP upcast", "FSDP2-wrapped module", "Detected an existing checkpoint",
)  # fmt: skip


def llama(seed=0, tied=False):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, use_cache=False, bos_token_id=None, eos_token_id=None, initializer_range=0.1,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def texts(count=64):
    """Sequences that count upwards, with labels of different lengths."""
    rows = []
    for index in range(count):
        ids = (torch.arange(LENGTH) * (1 + index % 3) + index) % VOCABULARY
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(LENGTH) < 4 + index % 9, ids, -100)})
    return rows


def launch(rank, size, *, is_gpu_like=False):
    """What torchrun sets; `is_gpu_like` lets accelerate take the way of GPUs, since it does not shard on the CPU."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    forget_accelerate()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}
    if is_gpu_like:
        as_on_gpus()


def as_on_gpus():
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def fsdp(**options):
    return FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", **options})


def whole(model):
    return [(one.full_tensor() if isinstance(one, DTensor) else one).detach().clone() for one in model.parameters()]


def assert_close(one, other, **agreement):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **(agreement or CLOSE))


def folder(name):
    return os.path.join(os.environ[FOLDER], name)


class Loop:
    """The loop of accelerate's documentation."""

    def __init__(self, *, options=LOW, batch=4, seed=0, tied=False, model=None, **arguments):
        self.accelerator = Accelerator(cpu=True, **arguments)
        self.tracker, self.plain = gradlr.LossTracker(), model or llama(seed, tied)
        self.opt = attach(self.accelerator, self.plain, self.tracker, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.opt, lambda step: 1 / (1 + step))
        loader = DataLoader(texts(), batch_size=batch)
        self.model, self.prepared, self.loader, self.scheduler = self.accelerator.prepare(self.plain, self.opt, loader, scheduler)
        self.losses = []

    def run(self, steps=3):
        for _, batch in zip(range(steps), self.loader, strict=False):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.losses.append(loss.item())
                self.accelerator.backward(self.tracker(loss))
                self.prepared.step()
                self.scheduler.step()
                self.prepared.zero_grad()
        return self


def attach_alone(model, **options):
    with warnings.catch_warnings():  # several processes run, and this model is one process' own
        warnings.filterwarnings("ignore", "[0-9]+ processes run", gradlr.GradlrWarning)
        return gradlr.attach(model, gradlr.LossTracker(), apply="step", **options)


def by_hand(size, *, steps=3, batch=4, micro=1, tied=False, **options):
    """One process, on the batches that `size` processes have seen; the loss is the mean of their means."""
    model = llama(tied=tied)
    opt = attach_alone(model, **options)
    rows = DataLoader(texts(), batch_size=batch)
    # Accelerate's scheduler takes a step for each process.
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + size * step))
    parts = iter(rows)
    for _ in range(steps):
        losses = [model(**next(parts)).loss for _ in range(size * micro)]
        opt.tracker(torch.stack(losses).mean()).backward()
        opt.step()
        scheduler.step()
    return whole(model), opt


def assert_same_everywhere(model):
    own = torch.cat([parameter.flatten() for parameter in whole(model)])
    everything = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everything, own)
    assert all(torch.equal(one, own) for one in everything)


def compare(loop, size, **options):
    expected, opt = by_hand(size, **options)
    assert_close(whole(loop.plain), expected)
    assert loop.opt.grad_norm == pytest.approx(opt.grad_norm, rel=1e-4)
    assert not torch.equal(expected[0], whole(llama())[0])


def accelerate_trains_replicas(rank, size):
    launch(rank, size)
    loop = Loop(options={**EXACT, "max_grad_norm": 0.5}, seed=rank).run()
    assert loop.model is loop.plain and f"processes={size}" in repr(loop.opt)  # no DistributedDataParallel
    assert_same_everywhere(loop.plain)
    compare(loop, size, **EXACT, max_grad_norm=0.5)


def the_documented_loop_trains_replicas(rank, size):
    launch(rank, size)
    text = (Path(gradlr.__file__).parents[1] / "docs" / "loops.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "Accelerator(" in block]
    names = {}
    exec(code, names)
    assert names["accelerator"].num_processes == size and f"processes={size}" in repr(names["opt"])
    assert_same_everywhere(names["model"])


def accelerate_accumulates_in_replicas(rank, size):
    launch(rank, size)
    loop = Loop(options=EXACT, gradient_accumulation_steps=2).run(steps=4)
    # Micro-batches go to the processes in turn, so that a step sees the same rows.
    compare(loop, size, micro=2, steps=2, **EXACT)


def accelerate_resumes_replicas(rank, size):
    launch(rank, size)
    first = Loop(mixed_precision="bf16").run()
    first.accelerator.save_state(folder("replicas"))
    first.run()
    launch(rank, size)
    second = Loop(seed=5, mixed_precision="bf16")
    second.accelerator.load_state(folder("replicas"))
    second.run()
    assert_close(whole(first.plain), whole(second.plain), rtol=0, atol=0)
    assert first.losses[3:] == second.losses and first.tracker.ratio == second.tracker.ratio


def accelerate_shards(rank, size):
    for apply, tied in (("step", False), ("backward", False), ("step", True)):
        launch(rank, size, is_gpu_like=True)
        limit = {"max_grad_norm": 0.5} if apply == "step" else {}
        loop = Loop(options={**EXACT, **limit, "apply": apply}, fsdp_plugin=fsdp(), tied=tied).run()
        assert isinstance(loop.plain.model.layers[0], FSDPModule) and loop.accelerator.is_fsdp2
        expected, opt = by_hand(size, tied=tied, **EXACT, **limit)
        assert_close(whole(loop.plain), expected)
        if apply == "step":
            assert loop.opt.grad_norm == pytest.approx(opt.grad_norm, rel=1e-4)


def accelerate_accumulates_under_fsdp(rank, size):
    launch(rank, size, is_gpu_like=True)
    loop = Loop(options=EXACT, fsdp_plugin=fsdp(), gradient_accumulation_steps=2).run(steps=4)
    compare(loop, size, micro=2, steps=2, **EXACT)
    launch(rank, size, is_gpu_like=True)
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    loop = Loop(options=EXACT, fsdp_plugin=fsdp(), gradient_accumulation_plugin=plugin).run(steps=4)
    compare(loop, size, micro=2, steps=2, **EXACT)


LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip


def accelerate_shards_by_environment(rank, size):
    """What `accelerate launch` sets by itself; and the model's own checkpointing."""
    launch(rank, size, is_gpu_like=True)
    model = llama(seed=rank)  # rank 0's weights are those that count
    checkpointing_switch(model)()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in LAUNCHED.items():
            patch.setenv(key, value)
        loop = Loop(options=EXACT, model=model).run()
    assert loop.accelerator.is_fsdp2 and loop.plain.is_activation_checkpointing
    compare(loop, size, **EXACT)


def _resumes_under_fsdp(rank, size, kind):
    launch(rank, size, is_gpu_like=True)
    arguments = {"mixed_precision": "bf16", "fsdp_plugin": fsdp(state_dict_type=kind)}
    first = Loop(**arguments).run()
    first.accelerator.save_state(folder(kind))
    first.run()
    launch(rank, size, is_gpu_like=True)
    second = Loop(seed=5, mixed_precision="bf16", fsdp_plugin=fsdp(state_dict_type=kind))
    second.accelerator.load_state(folder(kind))
    second.run()
    assert_close(whole(first.plain), whole(second.plain), rtol=0, atol=0)
    assert first.losses[3:] == second.losses and first.tracker.ratio == second.tracker.ratio
    assert {parameter.dtype for parameter in first.plain.parameters()} == {torch.float32}


def accelerate_resumes_under_fsdp_from_shards(rank, size):
    _resumes_under_fsdp(rank, size, "SHARDED_STATE_DICT")


def accelerate_resumes_under_fsdp_from_whole_files(rank, size):
    _resumes_under_fsdp(rank, size, "FULL_STATE_DICT")


class Thin(nn.Module):
    """More than one parameter of which the second process has no entry."""

    def __init__(self):
        super().__init__()
        self.up, self.out, self.scale = nn.Linear(8, 8), nn.Linear(8, 1), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.out(torch.tanh(self.up(x))) * self.scale


def parameters_without_entries_stay_apart(rank, size):
    launch(rank, size, is_gpu_like=True)
    accelerator, model = Accelerator(cpu=True, fsdp_plugin=fsdp(auto_wrap_policy="no_wrap")), Thin()
    opt = attach(accelerator, model, gradlr.LossTracker())
    accelerator.prepare(model, opt)
    held = [parameter for group in opt.param_groups for parameter in group["params"]]
    assert all(one is record.plan.parameter for one, record in zip(held, opt.records, strict=True))


def clipping_by_hand_is_refused(rank, size):
    for is_gpu_like, arguments in ((False, {}), (True, {"fsdp_plugin": fsdp()})):
        launch(rank, size, is_gpu_like=is_gpu_like)
        loop = Loop(**arguments)
        loop.accelerator.backward(loop.tracker(loop.model(**next(iter(loop.loader))).loss))
        for clip in (loop.accelerator.clip_grad_norm_, loop.accelerator.clip_grad_value_):
            with pytest.raises(gradlr.ArgumentError, match="clip nothing: .* Give max_grad_norm= to attach"):
                clip(loop.model.parameters(), 1.0)
        with pytest.raises(gradlr.ArgumentError, match="max_grad_norm="):
            clip_grad_norm_(loop.accelerator, loop.prepared, 1.0)
        other = nn.Linear(2, 1)
        other(torch.ones(2)).backward()
        assert loop.accelerator.clip_grad_norm_(other.parameters(), 1.0) > 1  # another model's gradients are its own
        loop.prepared.zero_grad()


@contextmanager
def refused(message):
    with pytest.raises(gradlr.AttachError, match=message):
        yield


def ways_of_accelerate_that_do_not_work_are_told(rank, size):
    def try_it(**arguments):
        attach(Accelerator(cpu=True, **arguments), llama(), gradlr.LossTracker(), **LOW)

    launch(rank, size)
    with refused("accelerate ignores FSDP on the CPU"):
        try_it(fsdp_plugin=fsdp())
    launch(rank, size, is_gpu_like=True)
    with warnings.catch_warnings(), refused("FSDP1 makes flat parameters.*fsdp_version=2"):
        warnings.simplefilter("ignore")
        try_it(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=1))
    launch(rank, size, is_gpu_like=True)
    with refused("activation_checkpointing rebuilds the model"):
        try_it(fsdp_plugin=fsdp(activation_checkpointing=True))
    launch(rank, size)
    with refused("dynamo_backend compiles"):
        try_it(dynamo_backend="eager")
    launch(rank, size)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    with refused("GradScaler scales each process.*bf16"):
        attach(accelerator, llama(), gradlr.LossTracker())
    launch(rank, size)
    accelerator = Accelerator()
    assert accelerator.distributed_type == DistributedType.NO  # of accelerate's own: the reason for the refusal
    with refused(f"{size} processes run, and the accelerator knows of one"):
        attach(accelerator, llama(), gradlr.LossTracker())


def attaching_before_accelerate_shards_is_an_error(rank, size):
    launch(rank, size, is_gpu_like=True)
    for apply in ("backward", "step"):
        accelerator, model, tracker = Accelerator(cpu=True, fsdp_plugin=fsdp()), llama(), gradlr.LossTracker()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "[0-9]+ processes run", gradlr.GradlrWarning)
            opt = gradlr.attach(model, tracker, apply=apply)
        model, opt = accelerator.prepare(model, opt)
        batch = next(iter(DataLoader(texts(), batch_size=4)))
        with refused("fully_shard.* before attaching"):
            tracker(model(**batch).loss)


def trainer_of(path, seed=0, *, cls=Trainer, options=LOW, chosen=None, **arguments):
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "seed": 1, "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False, "ddp_backend": "gloo", **arguments,
    }  # fmt: skip
    return cls(
        model=llama(seed), args=transformers.TrainingArguments(output_dir=str(path), **arguments), train_dataset=texts(),
        **(chosen or {"gradlr": options}),
    )  # fmt: skip


class AsOnGPUs(Trainer):
    def create_accelerator_and_postprocess(self):
        as_on_gpus()
        super().create_accelerator_and_postprocess()


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trainer_by_hand(size, steps=3, batch=4, micro=1, **options):
    """One process on the whole batch: the mean over all of its tokens, as Trainer weighs them."""
    model, norms, losses = llama(), [], []
    opt = attach_alone(model, **options)
    for rows in list(DataLoader(texts(), batch_size=size * batch * micro))[:steps]:
        loss = model(**rows).loss
        losses.append(loss.item())
        opt.tracker(loss).backward()
        opt.step()
        norms.append(opt.grad_norm)
    return whole(model), norms, losses


def _check_trainer(trainer, size, micro=1):
    trainer.train()
    expected, norms, losses = trainer_by_hand(size, micro=micro, max_grad_norm=1.0, **EXACT)
    assert_close(whole(trainer.model), expected)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4) and max(norms) > 1.0  # so that the default clips
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-4)
    return losses


def _means_of_histories(trainer):
    own = torch.tensor(unwrap(trainer.optimizer).tracker.history)
    distributed.all_reduce(own)
    return own / distributed.get_world_size()


FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def trainer_trains_replicas(rank, size):
    launch(rank, size)
    trainer = trainer_of(folder("unused"), seed=rank, options=EXACT)
    losses = _check_trainer(trainer, size)
    assert trainer.model_wrapped is trainer.model and f"processes={size}" in repr(unwrap(trainer.optimizer))
    assert _means_of_histories(trainer).tolist() == pytest.approx(losses, rel=1e-4)
    launch(rank, size)
    _check_trainer(trainer_of(folder("unused"), options=EXACT, gradient_accumulation_steps=2), size, micro=2)


class Headed(transformers.Trainer):
    """Trains a head that is none of the model's, made differently in each process."""

    def create_optimizer(self):
        torch.manual_seed(5 + int(os.environ["RANK"]))
        self.head = torch.nn.Linear(VOCABULARY, VOCABULARY)
        self.optimizer = torch.optim.SGD([*self.model.parameters(), *self.head.parameters()], lr=self.args.learning_rate)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = self.head(model(**inputs).logits[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


class GradlrHeaded(Trainer, Headed):
    pass


class GradlrHeadedAsOnGPUs(AsOnGPUs, Headed):
    pass


def trainer_trains_more_than_its_model_in_replicas(rank, size):
    launch(rank, size)
    trainer = trainer_of(folder("unused"), cls=GradlrHeaded)
    trainer.train()
    torch.manual_seed(5)
    moved = trainer.head.weight - torch.nn.Linear(VOCABULARY, VOCABULARY).weight  # from rank 0's
    assert 0.01 < moved.square().mean().sqrt() <= 3 * 2 * 1.01e-2  # three steps; two heads differ by 0.13
    assert_same_everywhere(trainer.head)
    assert_same_everywhere(trainer.model)
    launch(rank, size, is_gpu_like=True)
    with refused("FSDP2 shards the model alone, and more than the model is trained"):
        trainer_of(folder("unused"), cls=GradlrHeadedAsOnGPUs, **FSDP2).train()


def trainer_shards(rank, size):
    launch(rank, size)
    trainer = trainer_of(folder("unused"), cls=AsOnGPUs, options=EXACT, **FSDP2)
    losses = _check_trainer(trainer, size)
    assert isinstance(trainer.model.model.layers[0], FSDPModule)
    assert _means_of_histories(trainer).tolist() == pytest.approx(losses, rel=1e-4)
    launch(rank, size)
    trainer = trainer_of(folder("unused"), cls=AsOnGPUs, options=EXACT, gradient_accumulation_steps=2, **FSDP2)
    _check_trainer(trainer, size, micro=2)


def _trainer_resumes(rank, size, name, **arguments):
    launch(rank, size)
    arguments |= {"save_strategy": "steps", "save_steps": 2, "bf16": True, "lr_scheduler_type": "linear"}
    first = trainer_of(folder(name), **arguments)
    first.train()
    launch(rank, size)
    second = trainer_of(folder(name), seed=5, **arguments)
    second.train(resume_from_checkpoint=folder(f"{name}/checkpoint-2"))
    assert_close(whole(first.model), whole(second.model), rtol=0, atol=0)
    assert logged(first, "grad_norm") == logged(second, "grad_norm") and len(logged(first, "grad_norm")) == 3
    assert [unwrap(one.optimizer).tracker.count for one in (first, second)] == [3, 3]


def trainer_resumes_replicas(rank, size):
    _trainer_resumes(rank, size, "trainer-replicas")


def trainer_resumes_under_fsdp(rank, size):
    _trainer_resumes(rank, size, "trainer-whole", cls=AsOnGPUs, **FSDP2)


def trainer_resumes_under_fsdp_from_shards(rank, size):
    config = {**FSDP2["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}
    _trainer_resumes(rank, size, "trainer-shards", cls=AsOnGPUs, fsdp=True, fsdp_config=config)


def ways_of_trainer_that_do_not_work_are_told(rank, size):
    launch(rank, size)
    with refused("accelerate ignores FSDP on the CPU"):
        trainer_of(folder("unused"), **FSDP2).train()
    launch(rank, size)
    model = llama()
    opt = attach_alone(model, **LOW)
    with pytest.raises(gradlr.ArgumentError, match="in place of an optimizer"):
        trainer_of(folder("unused"), chosen={"optimizers": (opt, None)})


class Module(lightning.LightningModule):
    def __init__(self, mode):
        super().__init__()
        self.net, self.mode = llama(), mode

    def configure_model(self):
        if self.mode == "fsdp2" and not isinstance(self.net, FSDPModule):
            torch.distributed.fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return attach_alone(self, **LOW) if self.mode == "ddp" else gradlr.attach(self, gradlr.LossTracker(), **LOW)

    def training_step(self, batch, index):
        raise RuntimeError("trained")


def lightning_in_several_processes_is_refused(rank, size):
    launch(rank, size)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    sharded = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    for mode, strategy in (("ddp", DDPStrategy()), ("fsdp2", sharded)):
        trainer = lightning.Trainer(
            accelerator="cpu", devices=size, strategy=strategy, callbacks=[ShowLosses()], max_epochs=1,
            default_root_dir=folder("unused"), **quiet,
        )  # fmt: skip
        with refused(f"{type(strategy).__name__} .*devices=1.*docs/devices.md"):
            trainer.fit(Module(mode), DataLoader(texts(), batch_size=4))
