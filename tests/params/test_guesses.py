"""What a parameter is taken for where layers and shapes do not tell, and that it is told with the way to overrule it."""

import pytest
import torch
from models import attached, gpt2, lora_gpt2
from torch import nn
from torch.nn.utils import parametrizations

from gradlr import GradlrWarning


def plans(model, **options):
    return {record.plan.name: record.plan for record in attached(model, **options)[2].records}


def test_a_vector_of_many_axes_becomes_one_batch_of_matrices_where_a_group_says_so():
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    assert plans(depthwise)["weight"].kind == "vector"
    found = plans(depthwise, groups=[{"match": "weight", "kind": "matrix"}])["weight"]
    assert tuple(found.shape) == (6, 1, 9)  # its layer's own view: a filter per group


class Odd(nn.Module):
    def __init__(self, *shape, name="weight"):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class RotaryEmbedding(Odd):
    """Not torch's, and maybe a table."""


GUESSES = {
    "four axes": (
        lambda: Odd(2, 3, 4, 5),
        r"'weight' \(2, 3, 4, 5\).*taken as 6 matrices of 4 x 5.*\"kind\": \"embedding\".*views=",
    ),
    "one in front": (lambda: Odd(1, 6, 8, name="extra"), r"'extra' \(1, 6, 8\).*taken as a 6 x 8 matrix"),
    "name": (lambda: Odd(6, 8, name="position_weight"), "taken as a 6 x 8 matrix"),
    "class": (lambda: RotaryEmbedding(6, 8), "'weight'"),
    "several": (lambda: nn.Sequential(Odd(2, 3, 4, 5), Odd(1, 3, 4)), r"'0.weight' \(2, 3, 4, 5\) \(and 1 more\)"),
    "list": (lambda: nn.ParameterList([torch.randn(2, 2, 3, 3)]), "'0'"),
}


@pytest.mark.parametrize("name", list(GUESSES))
def test_what_could_be_anything_is_told_once_with_the_way_to_overrule_it(name):
    make, message = GUESSES[name]
    model = make()
    with pytest.warns(GradlrWarning, match=message) as told:
        attached(model)[2].detach()
    assert len(told) == 1 and told[0].filename.endswith("models.py")  # where attach is called
    for kind in ("matrix", "embedding", "vector"):
        attached(model, groups=[{"match": "*", "kind": kind}])[2].detach()


def test_a_view_is_no_guess_and_the_advice_holds():
    with pytest.warns(GradlrWarning) as told:
        attached(Odd(2, 3, 4, 5))[2].detach()
    view = str(told[0].message).split("views={'weight': '")[1].split("'")[0]
    assert tuple(plans(Odd(2, 3, 4, 5), views={"weight": view})["weight"].shape) == (2, 60)


def vision_transformer():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8))


def test_the_positions_of_a_vision_transformer_are_a_guess():
    with pytest.warns(GradlrWarning, match=r"'embeddings.position_embeddings' \(1, 5, 16\) belongs"):
        attached(vision_transformer())


def mixture(name):
    import transformers

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    extra = {
        "Mixtral": {"num_local_experts": 2},
        "Qwen2Moe": {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        "GptOss": {"num_local_experts": 2, "head_dim": 8, "layer_types": ["full_attention"]},
    }[name]
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes, **extra, vocab_size=20))


KNOWN = {
    "transformer": lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
    "recurrent": lambda: nn.ModuleList([nn.RNNCell(3, 4), nn.LSTMCell(3, 4), nn.GRU(3, 4, 2, bidirectional=True)]),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "experts": lambda: Odd(3, 4, 5),
    "plain": lambda: Odd(4, 5),
    "norm of one's own": lambda: Odd(4),
    "gpt2": gpt2,
    "lora": lora_gpt2,
    "Mixtral": lambda: mixture("Mixtral"),
    "Qwen2Moe": lambda: mixture("Qwen2Moe"),
    "GptOss": lambda: mixture("GptOss"),
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_what_layers_and_shapes_tell_is_no_guess(name):
    model = KNOWN[name]()
    found = plans(model)  # warnings are errors
    assert all(plan.kind == "vector" for name, plan in found.items() if name.endswith("bias"))
    assert all(plan.kind == "matrix" for plan in found.values() if "experts" in plan.name and not plan.name.endswith("bias"))


def test_attaching_does_not_run_a_parametrization():
    model = nn.Sequential(nn.Embedding(9, 6), parametrizations.spectral_norm(nn.Linear(6, 6)))
    before = model[1].parametrizations.weight[0]._u.clone()
    found = plans(model, capture="auto")
    assert torch.equal(before, model[1].parametrizations.weight[0]._u)
    assert found["1.parametrizations.weight.original"].kind == "matrix"
