"""The estimate against real training: the same optimizers on the same model, with values."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from models import Mixed, mlp
from torch import nn

import gradlr
from gradlr import ArgumentError, estimate, estimate_all
from gradlr.apps.estimate import CONFIGS, METHODS
from gradlr.apps.estimate.subject import subject_of

GRADLR = [name for name, method in METHODS.items() if method.is_gradlr]
ATTACH = {
    "gradlr": {},
    "gradlr_step": {"apply": "step"},
    "gradlr_adaptor": {"capture": "adaptor"},
    "gradlr_one_sided": {"capture": "one_sided"},
}
TOKENS = (torch.zeros(4, 9, dtype=torch.int64),)


def mixed_loss(model, tokens):
    return model(tokens).square().mean()


def held(tensors):
    """Bytes of the storages of tensors, each once."""
    return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}.values())


def entries(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", GRADLR)
def test_the_state_of_gradlr_is_that_of_the_attached_optimizer(name):
    model, tracker = Mixed(), gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, **ATTACH[name], rank=2, momentum_rank=2)
    tracker(mixed_loss(model, *TOKENS)).backward()
    opt.step()
    found = estimate(Mixed(), method=name, inputs=TOKENS, loss=mixed_loss, rank=2, momentum_rank=2)
    assert found.state == held(entries(opt))
    assert held(entries(opt)) == opt.state_bytes() + 8 * len(opt.records)  # a step count each


@pytest.mark.parametrize("name", ["adamw", "adamw_foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_torchs_optimizers_is_theirs(name, dtype):
    model = Mixed().to(dtype)
    options = {"adamw": {"fused": True}, "adamw_foreach": {"foreach": True}}[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    mixed_loss(model, *TOKENS).backward()
    optimizer.step()
    found = estimate(Mixed(), method=name, dtype=dtype, inputs=TOKENS, loss=mixed_loss)
    assert found.state == held(entries(optimizer))
    assert found.weights == held(model.parameters())
    assert found.gradients == held([parameter.grad for parameter in model.parameters()])


def test_eight_bits_are_two_bytes_a_number_and_a_scale_for_each_256():
    model = nn.Linear(100, 100)
    # 10,000 weights in 40 blocks with two float32 scales each; the bias is smaller than 4,096 and keeps two float32 a number;
    # the two tables of codes are shared.
    assert estimate(model, method="adamw8bit", tokens=3).state == 2 * 10_000 + 2 * 4 * 40 + 2 * 4 * 100 + 2 * 4 * 256


def test_lora_keeps_two_float32_moments_of_its_adapters():
    model = nn.Sequential(nn.Linear(64, 96, bias=False)).to(torch.bfloat16)
    r, m, n = 4, 64, 96
    assert estimate(model, method="lora", rank=r, tokens=3).state == 4 * 2 * r * (m + n) + 2 * 4


def test_bitsandbytes_agrees():
    package = pytest.importorskip("bitsandbytes")
    model = mlp(80)
    optimizer = package.optim.AdamW8bit(model.parameters(), lr=1e-3)
    model(torch.randn(5, 80)).sum().backward()
    optimizer.step()
    assert estimate(model, method="adamw8bit", tokens=5).state == held(entries(optimizer))


def test_its_kinds_add_up_to_the_peak():
    for one in estimate_all(Mixed(), inputs=TOKENS, loss=mixed_loss, rank=4):
        assert sum(one.at_peak.values()) == one.peak
        assert all(one.at_peak[kind] <= getattr(one, kind) for kind in one.at_peak), one
        assert one.weights + one.state < one.peak <= sum(getattr(one, kind) for kind in one.at_peak)


class Deep(nn.Module):
    """Four blocks between an embedding and a head of its shape."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(16, 50, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("name", ["adamw", "lora", "gradlr", "gradlr_step", "gradlr_adaptor"])
def test_activations_grow_with_tokens_and_shrink_by_checkpointing(name):
    few, many = (estimate(Deep(), method=name, rank=None, tokens=tokens) for tokens in (64, 256))
    recomputed = estimate(Deep(), method=name, tokens=256, checkpointing=True)
    assert 3 * few.activations < many.activations < 5 * few.activations
    assert recomputed.activations < 0.7 * many.activations
    assert few.state == many.state == recomputed.state
    assert few.weights == many.weights == recomputed.weights
    assert recomputed.peak <= many.peak


def test_dtype_halves_the_weights():
    wide, narrow = (estimate(Deep(), method="gradlr", tokens=32, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert narrow.weights == wide.weights / 2
    assert narrow.state == wide.state  # float32, whatever the weights are


def test_a_batch_is_so_many_sequences():
    one, four = (estimate(Deep(), method="no_optimizer", tokens=32, batch_size=count) for count in (1, 4))
    assert four.activations > 3 * one.activations


def test_billions_of_weights_take_no_memory():
    # Seconds on an idle machine: no test of time, which others share. Two of its 80 blocks are run.
    config = pytest.importorskip("transformers").AutoConfig.from_pretrained(CONFIGS["llama-70b"], num_hidden_layers=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = estimate(config, method="gradlr", tokens=2048)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert found.weights > 4 * 2**30
    assert found.state < 0.01 * found.weights
    # KiB (bytes on macOS): the code that torch loads for the first tensor without values takes some 100 MiB.
    assert grown / (1024 if sys.platform == "darwin" else 1) < 512 * 1024


# Parameters as published, MiniLM's with the pooler.
PUBLISHED = {
    "llama-7b": 6_738_415_616, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248, "gpt2": 124_439_808,
    "minilm": 22_713_216,
}  # fmt: skip
PUBLISHED_LARGE = {
    "llama-13b": 13_015_864_320, "llama-70b": 68_976_648_192, "llama-3.2-3b": 3_212_749_824, "llama-3.1-70b": 70_553_706_496,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
}  # fmt: skip


@pytest.mark.parametrize("name", [*PUBLISHED, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED_LARGE)])
def test_names_stand_for_configs_of_the_published_models(name):
    pytest.importorskip("transformers")
    subject = subject_of(name, dtype=None, batch_size=1, tokens=None, inputs=None, loss=None)
    assert sum(parameter.numel() for parameter in subject.model.parameters()) == (PUBLISHED | PUBLISHED_LARGE)[name]
    assert subject.tokens == {"gpt2": 1024, "minilm": 512}.get(name, 2048)
    assert not any(module.p for module in subject.model.modules() if isinstance(module, nn.Dropout))


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArgumentError, match=r"minilm needs transformers: pip install 'gradlr\[transformers\]'"):
        estimate("minilm")


def test_importing_the_package_leaves_the_function_in_its_place():
    code = (
        "import gradlr, gradlr.apps.estimate, gradlr.apps.estimate.estimation;"
        "from gradlr import estimate;"
        "assert callable(gradlr.estimate) and estimate is gradlr.estimate is gradlr.apps.estimate.estimate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_leaves_the_model_alone():
    model = Mixed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimate(model, inputs=TOKENS, loss=mixed_loss, checkpointing=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(model, tracker)
    tracker(mixed_loss(model, *TOKENS)).backward()
    assert opt.interrupted == ()


def test_it_reads_well():
    found = estimate("minilm", tokens=32)
    assert str(found).splitlines()[0] == "minilm, 22,713,216 parameters, gradlr, 1 x 32 tokens"
    assert "86.7 MiB" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["peak"] == found.peak


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-8b",), "known \\(llama-7b, .*, llama-3.1-8b, .*, qwen3-32b, gpt2, minilm\\)"),
        ((7,), "give a torch.nn.Module, a transformers config, a path"),
        (("minilm", {"method": "lion"}), "use one of no_optimizer, adamw"),
        (("minilm", {"tokens": 513}), "takes 512 at most"),
        (("minilm", {"tokens": 0}), "at least 1"),
        (("minilm", {"batch_size": True}), "at least 1"),
        (("minilm", {"dtype": torch.int8}), "float32"),
        (("minilm", {"method": "adamw", "rank": 4}), "has no rank"),
        (("minilm", {"method": "lora", "rank": 0.5}), "int of at least 1"),
        (("minilm", {"method": "adamw", "momentum_rank": 4}), "option of gradlr.attach"),
        (("minilm", {"momentum_rank": -1}), "momentum_rank"),
        ((nn.Conv1d(3, 4, 1),), "give inputs="),
        ((nn.Linear(3, 4), {"checkpointing": True}), "no nn.ModuleList or nn.Sequential"),
        ((nn.Linear(3, 4), {"method": "lora"}), "no Linear inside"),
    ],
)
def test_errors_say_what_to_do(arguments, message):
    model, options = (*arguments, {})[:2]
    with pytest.raises(ArgumentError, match=message):
        estimate(model, **options)


def test_on_a_gpu_half_precision_stays_so():
    """A gradient that waits is not widened there, and the write of a weight needs no copy of a part of it."""
    make = {
        "method": "gradlr_step",
        "dtype": torch.bfloat16,
        "inputs": (torch.zeros(64, 512, dtype=torch.bfloat16),),
        "rank": 200,
    }
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    cpu, cuda = (estimate(model, device=device, **make) for device in ("cpu", "cuda"))
    one = 2 * 512 * 512  # as backward makes it
    assert cuda.gradients == 2 * one and cpu.gradients == 2 * (2 * one) + one
    assert cuda.peak < cpu.peak and cuda.weights == cpu.weights
    with pytest.raises(ArgumentError, match="device='tpu': use 'cpu' or 'cuda'"):
        estimate(model, device="tpu", **make)


def small_llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=24_000, max_position_embeddings=512)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize("capture", ["hook", "adaptor"])
def test_int8_weights_are_those_of_quantize(capture):
    quantized = gradlr.quantize_(Deep())
    weights = list(quantized.parameters())
    parts = [part for weight in weights for part in (weight.parts() if hasattr(weight, "codes") else (weight,))]
    one, other = (
        estimate(model, tokens=64, capture=capture, **options)
        for model, options in ((quantized, {}), (Deep(), {"weights": "int8"}))
    )
    assert one.weights == held(parts) == other.weights
    assert (one.peak, one.at_peak, one.parameters) == (other.peak, other.at_peak, other.parameters)
    assert other.label == "gradlr, int8"
    assert all(weight.codes.any() for weight in weights if hasattr(weight, "codes"))  # the model itself is left alone


def test_a_chunked_head_makes_no_logits():
    # Six blocks of logits.
    ordinary, chunked = (estimate(small_llama(), tokens=512, capture="adaptor", chunked_head=on) for on in (False, True))
    logits = 4 * 512 * 24_000
    assert ordinary.activations > 2 * logits > 4 * chunked.activations
    assert chunked.weights == ordinary.weights and chunked.state == ordinary.state
    known = estimate(gradlr.chunk_head_(small_llama()), tokens=512, capture="adaptor")
    assert known.at_peak == chunked.at_peak
    with pytest.raises(ArgumentError, match="chunk_head_: Deep is no causal language model"):
        estimate(Deep(), chunked_head=True)


def test_packed_sequences_are_one_row_and_a_mask():
    apart, packed = (estimate(small_llama(), method="no_optimizer", tokens=128, batch_size=4, packed=on) for on in (False, True))
    # Each of two layers keeps a mask of every token with every token, in bfloat16; and there are the row's positions.
    assert packed.activations == pytest.approx(apart.activations + 2 * 2 * 512**2, abs=2**16)
    assert "4 x 128 tokens, packed" in str(packed)
    with pytest.raises(ArgumentError, match="packed=True: Deep takes no position_ids"):
        estimate(Deep(), packed=True)


def test_four_bits_are_those_of_bitsandbytes():
    package = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(512, 384, bias=False).to(torch.bfloat16)
    layer = package.nn.Linear4bit(512, 384, bias=False, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict(linear.state_dict())
    state = layer.to("cpu").weight.quant_state
    parts = [layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    found = estimate(nn.Sequential(linear), method="qlora", rank=4, tokens=3)
    adapters = 4 * (512 + 384)
    assert found.weights == held(parts) + 2 * adapters
    assert found.state == 2 * 2 * adapters + 2 * 4
    assert found.parameters == 512 * 384 + adapters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int4"}, "they can be 'int8'"),
        ({"weights": "int8", "method": "lora"}, "method='lora' cannot train int8 weights"),
        ({"weights": "int8", "dtype": torch.int8}, "float32"),
    ],
)
def test_what_cannot_be_int8_is_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        estimate(Deep(), **options)
