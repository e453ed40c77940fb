"""What runs in each of two real processes: a small Llama trained under FSDP2 while the allocator is watched."""

import json
import os
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import gradlr
from gradlr.apps.bench.memory import peak_bytes

CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4, vocab_size=500,
    max_position_embeddings=256,
)  # fmt: skip
TOKENS, OPTIONS = 64, {"rank": 16, "momentum_rank": 4}


def loss_of(model, ids):
    return model(ids, labels=ids, use_cache=False).loss


def sharded(**options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def trained(make, **options):
    model = sharded(**options)
    tokens = torch.randint(CONFIG.vocab_size, (1, TOKENS))
    held = sum(parameter.to_local().nbytes for parameter in model.parameters()) + tokens.nbytes
    held += sum(buffer.nbytes for buffer in model.buffers())

    def work():
        step = make(model)
        for _ in range(3):
            step(lambda: loss_of(model, tokens))
        return step

    return held + peak_bytes(work)


def adamw(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(loss):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_gradlr():
    def make(model):
        tracker = gradlr.LossTracker()
        optimizer = gradlr.attach(model, tracker, **OPTIONS)

        def step(loss):
            tracker(loss()).backward()
            optimizer.step()

        return step

    return make


METHODS = {"adamw": adamw, "gradlr": of_gradlr()}


def measured_peaks(rank, size):
    peaks = {name: trained(make) for name, make in METHODS.items()}
    if rank == 0:
        Path(os.environ["GRADLR_TEST_FOLDER"], "peaks.json").write_text(json.dumps(peaks))
