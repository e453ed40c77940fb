"""Export as a LoRA adapter: what real peft loads reproduces the fine-tuned model, and what cannot be exported is said."""

import copy
import json
import os
import sys

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import gradlr
from gradlr.apps.lora.export import factorize

# peft 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
MIXED_KINDS = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(**options):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, **SIZES}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, loss_type="ForCausalLM", **options))


def decoder(kind=LlamaForCausalLM, config=LlamaConfig, **options):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, **SIZES}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 16}
    return kind(config(**sizes, **options))


MODELS = {
    "gpt2": gpt2,  # Conv1D with biases, tied head
    "gpt2 untied": lambda: gpt2(tie_word_embeddings=False),  # Conv1D with biases and a Linear without
    "llama": lambda: decoder(tie_word_embeddings=False),  # Linears without biases
    "llama tied": lambda: decoder(tie_word_embeddings=True),
    "qwen2": lambda: decoder(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=False),  # some Linears with biases
}


def tokens(seed):
    return torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(seed))


def fine_tune(model, steps=3, **options):
    """The optimizer, still attached."""
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, rank=4, momentum_rank=2, lr=1e-2, **options)
    for step in range(steps):
        tracker(model(input_ids=tokens(step), labels=tokens(step)).loss).backward()
        opt.step()
    return opt


def tuned(name="llama", **options):
    """(base model, fine-tuned model)."""
    base = MODELS[name]()
    model = copy.deepcopy(base)
    fine_tune(model, **options).detach()
    return base, model


@torch.no_grad()
def outputs(model, x=None):
    model.eval()
    return model(input_ids=tokens(99)).logits if x is None else model(x)


def loaded(base, path, **options):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), path, **options)


def nudged(base, *names, size=0.1):
    """A copy of the model with some parameters changed, all of them where none is named."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not names or name in names:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


class Net(nn.Module):
    """One parameter of the model itself, a convolution with a norm, and two Linears whose names end alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shift = nn.Parameter(torch.zeros(6))
        self.conv, self.norm = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)
        self.block = nn.Sequential()
        self.block.proj, self.proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.norm(self.conv(x)).mT + self.shift
        return self.proj(torch.tanh(self.block(x)))


def pictures():
    return torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(7))


@MIXED_KINDS
@pytest.mark.parametrize("name", list(MODELS))
def test_full_rank_reproduces_the_fine_tuned_outputs(name, tmp_path):
    base, model = tuned(name)
    wanted = outputs(model)
    assert (outputs(base) - wanted).abs().max() > 0.1
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0)
    assert not report.left_out
    # float32: W + B A is W_base + ΔW up to the rounding of products of 32 terms, through two layers.
    adapted = loaded(base, tmp_path)
    torch.testing.assert_close(outputs(adapted), wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(outputs(adapted.merge_and_unload()), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_low_rank_is_off_by_what_the_report_says(name, tmp_path):
    base, model = tuned(name)
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=4)
    adapted, x = loaded(base, tmp_path), torch.randn(7, 128, generator=torch.Generator().manual_seed(5))
    for layer in report.layers:
        assert layer.rank == 4 and 0.2 < layer.energy < 0.99
        assert layer.error == pytest.approx((1 - layer.energy) ** 0.5 * layer.difference, rel=1e-6)
        rows = x[:, : layer.shape[1]]
        with torch.no_grad():
            difference = adapted.get_submodule(f"base_model.model.{layer.name}")(rows) - model.get_submodule(layer.name)(rows)
        # ‖(ΔW − B A) x‖ ≤ ‖ΔW − B A‖ ‖x‖, and rounding of float32.
        assert (difference.norm(dim=1) <= layer.error * rows.norm(dim=1) + 1e-5).all()
    merged = adapted.merge_and_unload()
    for layer in report.layers:
        rest = merged.get_submodule(layer.name).weight - model.get_submodule(layer.name).weight
        assert float(rest.detach().norm()) == pytest.approx(layer.error, rel=1e-4)  # W_base + B A rounds in float32


def test_the_approximation_is_the_best_of_its_rank(tmp_path):
    base, model = tuned()
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=0.25)
    for layer in report.layers:
        delta = model.get_submodule(layer.name).weight - base.get_submodule(layer.name).weight
        spectrum = torch.linalg.svdvals(delta.detach().double())
        assert layer.rank == round(0.25 * min(layer.shape))
        # Differences of float32 weights of size 0.1 and their factors: 1e-7 of each entry.
        assert layer.error == pytest.approx(float(spectrum[layer.rank :].norm()), rel=1e-4)
        assert layer.difference == pytest.approx(float(spectrum.norm()), rel=1e-4)


def test_more_rank_is_nearer(tmp_path):
    base, model = tuned()
    errors, energies = [], []
    for rank in (2, 8, 24):
        report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=rank)
        errors.append(float((outputs(loaded(base, tmp_path)) - outputs(model)).norm()))
        energies.append(report.energy)
    assert errors == sorted(errors, reverse=True) and energies == sorted(energies)
    assert errors[0] < float((outputs(base) - outputs(model)).norm())


def test_a_large_difference_is_factorized_at_random_and_nearly_as_well():
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(400, 300)).Q, torch.linalg.qr(torch.randn(300, 300)).Q
    spectrum = 1 / torch.arange(1, 301) ** 0.5  # a slow decay
    delta = (u * spectrum) @ v.mT
    a, b = factorize(delta, 16)
    error = float((delta - b @ a).norm())
    # Four power steps and ten spare columns: within a thousandth of the best error, which exact arithmetic bounds from below.
    assert float(spectrum[16:].norm()) * (1 - 1e-5) <= error <= float(spectrum[16:].norm()) * 1.001


def test_unchanged_layers_are_left_out(tmp_path):
    base, name = MODELS["llama"](), "model.layers.1.mlp.up_proj"
    model = copy.deepcopy(base)
    for other, parameter in model.named_parameters():
        parameter.requires_grad_(other == f"{name}.weight")
    fine_tune(model).detach()
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0)
    assert [layer.name for layer in report.layers] == [name] and not report.saved and not report.left_out
    assert report.unchanged == len(model.state_dict()) - 1
    torch.testing.assert_close(outputs(loaded(base, tmp_path)), outputs(model), rtol=0, atol=2e-6)


def test_ranks_are_cut_layer_by_layer(tmp_path):
    base, model = tuned()
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=40)
    assert {layer.rank for layer in report.layers} == {16, 32} and all(x.rank == min(x.shape) for x in report.layers)
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert config.r == config.lora_alpha == 32 and set(config.rank_pattern.values()) == {16}
    assert config.alpha_pattern == config.rank_pattern


def test_save_tells_what_may_be_stored_whole(tmp_path):
    base, model = tuned("llama tied")
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, save="*norm*", rank=1.0)
    assert set(report.left_out) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name.rpartition(".")[2] for name in report.saved} >= {"norm", "input_layernorm"}
    # The same as a model whose table never moved.
    with torch.no_grad():
        model.lm_head.weight.copy_(base.lm_head.weight)
    torch.testing.assert_close(outputs(loaded(base, tmp_path)), outputs(model), rtol=0, atol=2e-6)


def test_either_name_of_a_tied_weight_is_enough(tmp_path):
    base, model = tuned("llama tied")
    state = base.state_dict()
    del state["lm_head.weight"]  # as safetensors stores a tied model
    report = gradlr.export_lora(model, state, tmp_path, save=["lm_head.*"], rank=1.0)
    assert report.saved.keys() == {"lm_head", "model.embed_tokens"}
    adapted = loaded(base, tmp_path)
    merged = adapted.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["gpt2", "llama tied"])
def test_the_adapter_can_be_disabled(name, tmp_path):
    base, model = tuned(name)
    gradlr.export_lora(model, base.state_dict(), tmp_path)
    adapted = loaded(base, tmp_path)
    with adapted.disable_adapter():
        assert torch.equal(outputs(adapted), outputs(base))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peft_may_load_without_initializing(name, tmp_path):
    base, model = tuned(name)
    gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0)
    adapted = loaded(base, tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(outputs(adapted), outputs(model), rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_that_is_still_attached_exports_the_same(name, tmp_path):
    base = MODELS[name]()
    model = copy.deepcopy(base)
    opt = fine_tune(model, capture="adaptor")
    attached = gradlr.export_lora(model, base.state_dict(), tmp_path / "attached")
    opt.detach()
    detached = gradlr.export_lora(model, base.state_dict(), tmp_path / "detached")
    assert attached.layers and attached.layers == detached.layers and attached.saved == detached.saved
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "attached" / file).read_bytes() == (tmp_path / "detached" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_subtracted_in_float32(dtype, tmp_path):
    base = MODELS["llama"]().to(dtype)
    model = nudged(base, size=0.01)
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0)
    assert min(layer.energy for layer in report.layers) > 1 - 1e-10
    merged = loaded(base, tmp_path).merge_and_unload()
    for layer in report.layers:  # W_base + B A rounds back to W, or to its neighbour where B A is short by an ulp of float32
        wanted, found = (x.get_submodule(layer.name).weight for x in (model, merged))
        torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert (found == wanted).float().mean() > 0.99


def test_narrow_factors_are_half_the_size_and_their_rounding_is_in_the_error(tmp_path):
    base, model = tuned()
    wide = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0, save=())
    narrow = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0, save=(), dtype=torch.bfloat16)
    assert sum(x.bytes for x in narrow.layers) * 2 == sum(x.bytes for x in wide.layers)
    # Two factors, each rounded to 8 bits: relative error of some 2^-9 √(2/3), squared.
    assert 1e-6 < 1 - narrow.energy < 2e-5


def test_a_float64_model_is_reproduced_in_float64(tmp_path):
    base = MODELS["llama"]().double()
    model = nudged(base, size=0.01)
    gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0)
    # Rotary angles and the norms' own arithmetic are float32, and the same in both.
    torch.testing.assert_close(outputs(loaded(base, tmp_path)), outputs(model), rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 32


def test_layers_that_no_lora_takes_are_stored_whole_with_their_buffers(tmp_path):
    base = Net().eval()
    model = nudged(base, "conv.weight", "norm.weight", "proj.weight", "proj.bias")
    model.norm.running_mean += 0.5
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0)
    assert list(report.saved) == ["conv", "norm"]
    assert report.saved["norm"] == 4 * 6 * 4 + 8  # weight, bias, mean and variance of six channels, and a count
    # `proj` is no target of `block.proj`, although peft matches ends of names.
    assert [layer.name for layer in report.layers] == ["proj"]
    adapted = loaded(base, tmp_path)
    torch.testing.assert_close(outputs(adapted, pictures()), outputs(model, pictures()), rtol=0, atol=1e-6)
    assert not hasattr(adapted.base_model.model.block.proj, "lora_A")


def test_what_belongs_to_the_model_itself_is_left_out_and_said(tmp_path):
    base = Net().eval()
    model = nudged(base)
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0)
    assert list(report.left_out) == ["shift"] and "left out: shift: it belongs to the model itself" in str(report)
    model.shift = base.shift
    torch.testing.assert_close(outputs(loaded(base, tmp_path), pictures()), outputs(model, pictures()), rtol=0, atol=1e-6)


def test_only_a_bias_or_a_norm_may_have_changed(tmp_path):
    base = Net().eval()
    model = nudged(base, "proj.bias")
    report = gradlr.export_lora(model, base.state_dict(), tmp_path / "bias")
    assert [(layer.name, layer.rank, layer.error) for layer in report.layers] == [("proj", 1, 0)] and not report.saved
    # Difference and sum round once each.
    found = outputs(loaded(base, tmp_path / "bias"), pictures())
    torch.testing.assert_close(found, outputs(model, pictures()), rtol=0, atol=1e-6)
    model = nudged(base, "norm.bias")
    report = gradlr.export_lora(model, base.state_dict(), tmp_path / "norm")
    assert not report.layers and list(report.saved) == ["norm"]
    found = outputs(loaded(base, tmp_path / "norm"), pictures())
    torch.testing.assert_close(found, outputs(model, pictures()), rtol=0, atol=1e-6)


def shared():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(6, 6), layer, nn.Tanh(), layer)


def parametrized():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), parametrizations.weight_norm(nn.Linear(6, 6)))


def attending():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True))


@pytest.mark.parametrize("make", [shared, parametrized, attending])
def test_modules_that_are_shared_or_more_than_a_linear_are_stored_whole(make, tmp_path):
    base = make().eval()
    model = nudged(base)
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0)
    assert "0" in [layer.name for layer in report.layers] and report.saved and not report.left_out
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2))
    adapted = loaded(base, tmp_path)
    if make is attending:  # its fast path would read weights past the wrappers
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.testing.assert_close(outputs(adapted, x), outputs(model, x), rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs(adapted.merge_and_unload(), x), outputs(model, x), rtol=0, atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def t5():
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0, decoder_start_token_id=0))


def vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))


OTHERS = {  # a weight under four names; a module with parameters of its own around others; batched experts
    "t5": (t5, {"input_ids": tokens(99), "decoder_input_ids": tokens(98)}, "shared"),
    "vit": (vit, {"pixel_values": torch.ones(2, 3, 8, 8)}, "vit.embeddings"),
    "mixtral": (lambda: decoder(MixtralForCausalLM, MixtralConfig), {"input_ids": tokens(99)}, "model.layers.1.mlp.experts"),
}


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings", "ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_architectures_are_reproduced(name, tmp_path):
    make, inputs, whole = OTHERS[name]
    torch.manual_seed(0)
    base = make().eval()
    model = nudged(base, size=0.02)
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=1.0)
    assert whole in report.saved and not report.left_out
    adapted = loaded(base, tmp_path).eval()
    with torch.no_grad():
        wanted = model(**inputs).logits
        # float32, logits of size 10 at most, two or three layers deep.
        torch.testing.assert_close(adapted(**inputs).logits, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, wanted, rtol=0, atol=1e-5)


def test_a_name_that_peft_would_mistake_is_refused(tmp_path):
    base = nn.ModuleDict({"norm": nn.LayerNorm(4), "prenorm": nn.ModuleList([nn.Linear(4, 4)])})
    with pytest.raises(gradlr.ArgumentError, match="'norm' would be stored whole, and peft takes 'prenorm', a ModuleList"):
        gradlr.export_lora(nudged(base), base.state_dict(), tmp_path / "adapter")
    report = gradlr.export_lora(nudged(base), base.state_dict(), tmp_path / "adapter", save=())
    assert set(report.left_out) == {"norm.weight", "norm.bias"}


def test_the_report_reads_as_a_table(tmp_path):
    base, model = tuned("gpt2")
    report = gradlr.export_lora(model, base.state_dict(), tmp_path, rank=4, save=["*.ln_*"])
    lines = str(report).splitlines()
    assert repr(report) == str(report) and str(tmp_path) in lines[0]
    assert lines[1].split() == ["layer", "shape", "rank", "energy", "size"]
    assert any(line.split()[:6] == ["transformer.h.0.attn.c_attn", "96", "x", "32", "4", f"{report.layers[0].energy:.2%}"]
               for line in lines)  # fmt: skip
    assert "left out: lm_head.weight" in str(report)
    assert "8 low-rank layers" in lines[-1] and "5 modules whole, 3 parameters left out" in lines[-1]
    assert report.bytes == os.path.getsize(tmp_path / "adapter_model.safetensors")


def test_the_configuration_names_model_and_task(tmp_path):
    base, model = tuned()
    base.config.name_or_path = model.config.name_or_path = "some/model"
    gradlr.export_lora(model, base.state_dict(), tmp_path, task_type="CAUSAL_LM")
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert config.base_model_name_or_path == "some/model" and config.task_type == "CAUSAL_LM"
    gradlr.export_lora(model, base.state_dict(), tmp_path, base_model_name="another/model")
    assert peft.LoraConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == "another/model"


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


UP = "model.layers.0.mlp.up_proj.weight"
REFUSED_BASES = {
    "missing": (lambda s: without(s, UP), gradlr.CheckpointError, f"lacks '{UP}' \\(48, 32\\)"),
    "unknown": (lambda s: s | {"other.weight": torch.zeros(2)}, gradlr.CheckpointError, "'other.weight', which"),
    "shape": (lambda s: s | {UP: torch.zeros(32, 48)}, gradlr.CheckpointError, f"'{UP}' has shape \\(32, 48\\) in base_state"),
    "no tensor": (lambda s: s | {UP: [1.0]}, gradlr.CheckpointError, f"a list for '{UP}'"),
    "no dict": (list, gradlr.ArgumentError, "base_state is a list"),
    "not finite": (lambda s: s | {UP: s[UP] * torch.nan}, gradlr.NonFiniteError, f"'{UP}' of base_state"),
}


@pytest.mark.parametrize("case", list(REFUSED_BASES))
def test_a_base_that_does_not_fit_is_named_before_anything_is_written(case, tmp_path):
    change, error, message = REFUSED_BASES[case]
    base, model = tuned()
    with pytest.raises(error, match=message):
        gradlr.export_lora(model, change(base.state_dict()), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_base_state_that_was_trained_along_is_refused(tmp_path):
    model = MODELS["llama"]()
    state = model.state_dict()
    fine_tune(model).detach()
    with pytest.raises(gradlr.ArgumentError, match="is the model's own memory.*clone"):
        gradlr.export_lora(model, state, tmp_path / "adapter")


def test_nothing_to_export_is_an_error(tmp_path):
    base = Net()
    with pytest.raises(gradlr.ArgumentError, match="no parameter differs"):
        gradlr.export_lora(copy.deepcopy(base), base.state_dict(), tmp_path / "adapter")
    with pytest.raises(gradlr.ArgumentError, match="'shift': it belongs to the model itself"):
        gradlr.export_lora(nudged(base, "shift"), base.state_dict(), tmp_path / "adapter")


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 1.5}, {"rank": True}, {"dtype": torch.int8}])
def test_arguments_out_of_range_are_refused(options, tmp_path):
    base = Net()
    with pytest.raises(gradlr.ArgumentError, match=next(iter(options))):
        gradlr.export_lora(nudged(base), base.state_dict(), tmp_path / "adapter", **options)


def test_other_models_are_refused(tmp_path):
    base = Net()
    with pytest.raises(gradlr.ArgumentError, match="model is a OrderedDict"):
        gradlr.export_lora(base.state_dict(), base.state_dict(), tmp_path)
    with pytest.raises(gradlr.ArgumentError, match="meta"):
        gradlr.export_lora(copy.deepcopy(base).to("meta"), base.state_dict(), tmp_path)
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["proj"]))
    with pytest.raises(gradlr.ArgumentError, match="merge_and_unload"):
        gradlr.export_lora(wrapped, base.state_dict(), tmp_path)


def test_a_folder_with_other_things_is_refused(tmp_path):
    base = Net()
    model = nudged(base)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(gradlr.ArgumentError, match="'notes.txt'"):
        gradlr.export_lora(model, base.state_dict(), tmp_path)
    with pytest.raises(gradlr.ArgumentError, match="is a file"):
        gradlr.export_lora(model, base.state_dict(), tmp_path / "notes.txt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_an_earlier_adapter_is_replaced_whole(tmp_path):
    base, path = Net(), tmp_path / "new" / "adapter"
    gradlr.export_lora(nudged(base), base.state_dict(), path, rank=2)
    gradlr.export_lora(nudged(base), base.state_dict(), path, rank=3)
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 3
    assert {entry.name for entry in path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert [entry.name for entry in path.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
def test_a_failure_leaves_what_stood_there(failing_call, tmp_path, monkeypatch):
    base, path = Net(), tmp_path / "adapter"
    gradlr.export_lora(nudged(base), base.state_dict(), path, rank=2)
    earlier = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    calls, replace = [], os.replace

    def fail_once(source, target):
        calls.append(target)
        if len(calls) == failing_call:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="no space left"):
        gradlr.export_lora(nudged(base), base.state_dict(), path, rank=3)
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == earlier
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    base = Net()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(gradlr.ArgumentError, match=r"pip install 'gradlr\[lora\]'"):
        gradlr.export_lora(nudged(base), base.state_dict(), tmp_path / "adapter")
