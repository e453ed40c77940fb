"""The estimate: what it counts, against what a run really holds; and what there is."""

import pytest
import torch
from finetune.tiny import llama

import gradlr
from gradlr import ArgumentError
from gradlr.bench.memory import peak_bytes
from gradlr.finetune import fits
from gradlr.finetune.builtin import BuiltinModel
from gradlr.finetune.losses import cross_entropy
from gradlr.finetune.pretrained import PretrainedModel

OPTIONS = {"apply": "backward", "capture": "hook"}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return PretrainedModel(llama(tmp_path_factory.mktemp("model")), None)


def need(language, *, batch_size=2, length=32, dtype=torch.float32, is_checkpointed=False, **options):
    sizes = {"batch_size": batch_size, "length": length, "dtype": dtype, "is_checkpointed": is_checkpointed}
    return fits.required_bytes(language, **sizes, options={**OPTIONS, **options})


def test_weights_and_state_are_what_the_run_will_hold(language):
    for kind in (language, BuiltinModel()):
        found = need(kind)
        model = kind.load(torch.float32, 0)
        opt = gradlr.attach(model, gradlr.LossTracker())
        # Buffers that no checkpoint holds (rotary frequencies) count too.
        weights = sum(parameter.nbytes for parameter in model.parameters()) + sum(buffer.nbytes for buffer in model.buffers())
        assert (found.weights, found.state) == (weights, opt.state_bytes())
        opt.detach()


def saved_in_forward(language):
    """Bytes that a real forward keeps for backward, weights left out."""
    model = language.load(torch.float32, 0).train()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        alive.append(tensor)
        if tensor.data_ptr() not in own:
            memory = tensor.untyped_storage()
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy(language.logits(model, tokens), tokens)
    assert loss.requires_grad
    return sum(kept.values())


def test_activations_are_those_of_a_real_forward(language):
    for kind in (language, BuiltinModel()):
        kept = saved_in_forward(kind)
        # Without values, attention gives its output in another memory layout, and each layer keeps a copy of it: 4 % more here.
        assert kept <= need(kind).activations < 1.06 * kept


def test_what_is_advised_needs_less(language):
    plain = need(language)
    assert need(language, batch_size=1).activations < plain.activations
    assert need(language, length=16).activations < plain.activations
    assert need(language, is_checkpointed=True).activations < plain.activations
    assert need(language, capture="one_sided", rank=2).activations < plain.activations
    half = need(language, dtype=torch.bfloat16)
    assert half.weights < plain.weights and half.activations < plain.activations
    assert need(language, apply="step").total > plain.total


@pytest.mark.parametrize(
    ("options", "is_checkpointed"),
    [({}, False), ({}, True), ({"capture": "one_sided", "rank": 4}, False), ({"apply": "step"}, False)],
)
def test_the_whole_is_no_less_than_the_measured_peak_and_not_far_above(language, options, is_checkpointed):
    sizes = {"batch_size": 8, "length": 64}
    found = need(language, **sizes, is_checkpointed=is_checkpointed, **options)
    model = language.load(torch.float32, 0).train()
    if is_checkpointed:
        language.enable_checkpointing(model)
    tokens = torch.zeros(8, 64, dtype=torch.int64)

    def work():
        tracker = gradlr.LossTracker()
        opt = gradlr.attach(model, tracker, **{**OPTIONS, **options})
        for _ in range(2):
            tracker(cross_entropy(language.logits(model, tokens), tokens)).backward()
            opt.step()
        return opt

    peak = peak_bytes(work)
    # Small things (norms, masks, buffers of kernels) against the largest ones only: a tenth below, a third above.
    assert 0.9 * peak < found.total - found.weights < 1.33 * peak


def test_a_model_that_needs_values_is_counted_without_its_activations(language, monkeypatch):
    monkeypatch.setattr(language, "logits", lambda model, inputs: model(input_ids=inputs).logits * float(inputs.sum()))
    found = need(language)
    assert found.activations is None and "activations not counted" in str(found)
    assert found.total == found.weights + found.state + found.work


def test_a_run_that_does_not_fit_is_refused_with_the_numbers():
    size = fits.Need(weights=2**30, state=2**20, activations=2**20, work=0)
    fits.require_fit(size, size.total, "there is", [])
    fits.require_fit(size, None, "there is", [])
    numbers = r"about 1\.0 GiB: 1\.0 GiB weights, 1\.0 MiB state.*; cpu has 1\.0 GiB\. .* less: --bf16"
    with pytest.raises(ArgumentError, match=numbers):
        fits.require_fit(size, size.total - 1, "cpu has", ["--bf16"])


def test_free_memory_is_no_more_than_the_machine_has():
    room = fits.available_bytes("cpu")
    assert room is None or 0 < room < 2**50


def test_a_control_group_limits_what_is_free(tmp_path):
    for name, content in (("max", "1000"), ("current", "700"), ("stat", "anon 600\ninactive_file 50\n")):
        (tmp_path / name).write_text(content)
    paths = [tmp_path / name for name in ("max", "current", "stat")]
    assert fits._room(*paths) == 350
    (tmp_path / "max").write_text("max")
    assert fits._room(*paths) is None
