"""The difference to the base as a peft adapter: loaded by peft itself, it gives back what was trained."""

import builtins
import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import gradlr
from gradlr import ArgumentError, CheckpointError

# peft 0.21 asks transformers 5 by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def gpt2():
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))  # tied head


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16, tie_word_embeddings=False))


MODELS = {"gpt2": gpt2, "llama": llama}
OVER_MODELS = pytest.mark.parametrize("name", list(MODELS))
TOKENS = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))


def trained(name, *, steps=6, freeze=(), dtype=torch.float32):
    """(base, fine-tuned model)."""
    torch.manual_seed(0)
    base = MODELS[name]().to(dtype).eval()
    model = copy.deepcopy(base)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in parameter_name for part in freeze))
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, capture="auto", rank=4)
    for _ in range(steps):
        tracker(model(input_ids=TOKENS, labels=TOKENS).loss).backward()
    opt.detach()
    return base, model


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@OVER_MODELS
def test_at_full_rank_peft_reproduces_the_outputs(name, tmp_path):
    base, model = trained(name)
    report = gradlr.export_lora(model, base.state_dict(), tmp_path / "adapter", rank=1.0)
    assert all(layer.energy == pytest.approx(1, abs=1e-6) for layer in report.layers)
    moved = (logits(model) - logits(base)).abs().max()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    # float32 factors: some hundred roundings of 6e-8 on logits of size 1.
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=0, atol=1e-5)
    assert moved > 0.1


@OVER_MODELS
def test_at_low_rank_the_error_of_each_change_is_what_its_energy_says(name, tmp_path):
    base, model = trained(name)
    report = gradlr.export_lora(model, base.state_dict(), tmp_path / "adapter", rank=5)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).merge_and_unload()
    known, found, wanted = base.state_dict(), merged.state_dict(), model.state_dict()
    assert len(report.layers) == (8 if name == "gpt2" else 15)
    for layer in report.layers:
        key = f"{layer.name}.weight"
        change, missed = wanted[key] - known[key], wanted[key] - found[key]
        assert torch.linalg.matrix_rank(found[key] - known[key], rtol=1e-3) == layer.rank == 5
        # The squared relative error of the best approximation is what it has left of the squared singular values.
        assert float((missed.norm() / change.norm()).square()) == pytest.approx(1 - layer.energy, abs=1e-5)
        best = torch.linalg.svdvals(change)[:5].square().sum() / change.square().sum()
        assert layer.energy == pytest.approx(best.item(), abs=1e-5)
    errors = (logits(merged) - logits(model)).norm() / (logits(base) - logits(model)).norm()
    assert errors < 0.5  # most of what training has done is there


def test_more_rank_is_closer(tmp_path):
    base, model = trained("llama")
    distances = []
    for rank in (1, 4, 16, 32):
        gradlr.export_lora(model, base.state_dict(), tmp_path / "adapter", rank=rank)  # over an earlier adapter
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
        distances.append((logits(loaded) - logits(model)).norm().item())
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-4


def test_unchanged_layers_are_left_out_and_other_parameters_are_whole_or_not_there(tmp_path):
    base, model = trained("gpt2", freeze=("mlp", "wte", "wpe"))
    report = gradlr.export_lora(model, base.state_dict(), tmp_path / "one", rank=4)
    assert {layer.name.split(".")[3] for layer in report.layers} == {"attn"}
    assert report.whole and all("ln_" in name or name.endswith("bias") for name in report.whole)
    less = gradlr.export_lora(model, base.state_dict(), tmp_path / "two", rank=4, others="leave")
    assert less.left_out == report.whole and not less.whole and less.adapter_bytes < report.adapter_bytes
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True and config["r"] == config["lora_alpha"] == 4
    PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "two"))
    assert "attn.c_attn: rank 4" in str(report) and "left out: transformer" in str(less)


def test_a_tied_head_is_no_layer_of_its_own(tmp_path):
    base, model = trained("gpt2")
    report = gradlr.export_lora(model, base.state_dict(), tmp_path / "adapter", rank=1.0)
    assert "lm_head" not in {layer.name for layer in report.layers}
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    assert torch.equal(loaded.base_model.model.lm_head.weight, model.transformer.wte.weight)


def test_ranks_are_cut_layer_by_layer(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    report = gradlr.export_lora(model, base.state_dict(), tmp_path / "adapter", rank=10)
    assert [layer.rank for layer in report.layers] == [10, 3]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    assert report.layers[1].energy == pytest.approx(1)
    torch.testing.assert_close(loaded.merge_and_unload()[2].weight, model[2].weight, rtol=0, atol=1e-5)


def test_large_layers_are_decomposed_by_random_projections(tmp_path, monkeypatch):
    monkeypatch.setattr("gradlr.lora._EXACT_SIZE", 0)
    base, model = trained("llama")
    report = gradlr.export_lora(model, base.state_dict(), tmp_path / "adapter", rank=8)
    known, wanted = base.state_dict(), model.state_dict()
    for layer in report.layers:
        values = torch.linalg.svdvals(wanted[f"{layer.name}.weight"] - known[f"{layer.name}.weight"]).square()
        assert layer.energy == pytest.approx((values[:8].sum() / values.sum()).item(), abs=5e-3)  # four power steps


def test_an_attached_model_and_narrow_weights_export_as_well(tmp_path):
    base, model = trained("llama", dtype=torch.bfloat16)
    tracker = gradlr.LossTracker()
    opt = gradlr.attach(model, tracker, capture="auto", rank=4)
    report = gradlr.export_lora(model, base.state_dict(), tmp_path / "adapter", rank=1.0)
    assert len(report.layers) == 15 and len(opt.slots) > 15
    change = model.lm_head.weight.float() - base.lm_head.weight.float()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base).float(), str(tmp_path / "adapter")).merge_and_unload()
    torch.testing.assert_close(loaded.lm_head.weight - base.lm_head.weight.float(), change, rtol=0, atol=1e-5)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_another_base_is_named_before_anything_is_written(tmp_path):
    base, model = trained("llama", steps=1)
    state = base.state_dict()
    missing = {key: value for key, value in state.items() if key != "model.norm.weight"}
    with pytest.raises(CheckpointError, match="lacks 'model.norm.weight'"):
        gradlr.export_lora(model, missing, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has shape \(3,\), the trained model's \(32,\)"):
        gradlr.export_lora(model, {**state, "model.norm.weight": torch.ones(3)}, tmp_path / "adapter")
    for options in ({"rank": 0}, {"rank": 1.5}, {"others": "half"}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            gradlr.export_lora(model, state, tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


def test_a_state_dict_that_was_trained_along_is_refused(tmp_path):
    _, model = trained("llama", steps=1)
    with pytest.raises(ArgumentError, match="shares its memory with the model.*deepcopy"):
        gradlr.export_lora(model, model.state_dict(), tmp_path / "adapter")
    with pytest.raises(ArgumentError, match="base_state is a LlamaForCausalLM"):
        gradlr.export_lora(model, model, tmp_path / "adapter")


def test_a_folder_with_other_files_is_refused(tmp_path):
    base, model = trained("llama", steps=1)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ArgumentError, match="holds 'model.safetensors'"):
        gradlr.export_lora(model, base.state_dict(), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_safetensors(name, *arguments, **options):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", no_safetensors)
    with pytest.raises(ArgumentError, match=r"pip install 'gradlr\[lora\]'"):
        gradlr.export_lora(nn.Linear(2, 2), {}, tmp_path)
