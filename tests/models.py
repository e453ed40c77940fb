"""Small models and data that many tests share."""

import warnings

import torch
from torch import nn

import gradlr


class Mixed(nn.Module):
    """One parameter of every kind: embedding, norm, linears with bias, convolution, head of the embedding's shape."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 12, kernel_size=3, padding=1)
        self.mix = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens)).mT
        return self.head(torch.tanh(self.mix(self.conv(x).mT)))


def mlp(width: int = 16, depth: int = 3, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """`depth` Linears with tanh between, seeded."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())][:-1]
    return nn.Sequential(*layers).to(dtype)


def regression(width: int = 16, *, count: int = 64, dtype: torch.dtype = torch.float32):
    """Inputs and targets of a fixed random teacher."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, width, generator=generator, dtype=dtype)
    teacher = torch.randn(width, width, generator=generator, dtype=dtype) / width**0.5
    return x, torch.tanh(x @ teacher)


def train(model, opt, tracker, steps, *, x=None, y=None, start=0):
    """Train on rotating batches of the regression; returns the losses."""
    if x is None:
        x, y = regression(model[0].in_features, dtype=model[0].weight.dtype)
    losses = []
    for step in range(start, start + steps):
        rows = slice(16 * (step % 4), 16 * (step % 4) + 16)
        loss = torch.nn.functional.mse_loss(model(x[rows]), y[rows])
        tracker(loss).backward()
        opt.step()
        losses.append(loss.item())
    return losses


def attached(model=None, **options):
    """(model, tracker, optimizer) with a small rank."""
    model = mlp() if model is None else model
    tracker = gradlr.LossTracker()
    options = {"lr": 1e-2, "rank": 4, "momentum_rank": 2} | options
    return model, tracker, gradlr.attach(model, tracker, **options)


def loss_of(model):
    """A regression loss of an `mlp()`, of any dtype."""
    x, y = regression(16, count=16, dtype=next(model.parameters()).dtype)
    return nn.functional.mse_loss(model(x), y)


def weights(model):
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def is_unchanged(model, before):
    """Whether all parameters are bit for bit those of `weights(model)` then."""
    return all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def gpt2():
    """transformers' GPT-2, of one block."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def llama_like():
    """transformers' Llama, of one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))


def checkpointing_switch(model):
    """What turns a transformers model's own checkpointing on: it has another name since transformers 5.23."""
    return getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable


def lora_gpt2():
    """The same under peft's LoRA, whose factors alone are trained."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        return peft.get_peft_model(gpt2(), config)
