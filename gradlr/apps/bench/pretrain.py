"""Pretrain the byte transformer on library source code, and load the checkpoint that ships with the package."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from .text import batches, library_sources, validation_batches
from .transformer import ByteTransformer, evaluate, language_model_loss

CHECKPOINT = Path(__file__).with_name("byte-transformer.pt")
WARMUP_STEPS = 50
FINAL_LR_FRACTION = 0.1
MAX_GRADIENT_NORM = 1.0
VALIDATION_BATCHES = 32


def pretrain(
    path: str | PathLike[str],
    *,
    steps: int = 1500,
    batch_size: int = 8,
    length: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> float:
    """Train a ByteTransformer on library_sources() with AdamW, save it to path, return the validation loss.

    batch_size windows of length bytes a step; the loss is in nats per byte. Position embeddings at or beyond
    length stay untrained. The file holds config, model (float16 state dict), text, steps and validation_loss,
    and loads with weights_only=True. Raises FileNotFoundError when the folder of path does not exist.
    """
    from tqdm import tqdm  # an extra: loading the checkpoint does without it

    path = _checked_target(path)
    text = library_sources()
    model = _new_model(seed).to(device)
    data = batches(text.train, batch_size=batch_size, length=length, steps=steps, seed=seed)
    _train(model, tqdm(data, total=steps, desc="pretraining", disable=not progress), steps=steps, lr=lr)
    held_out = validation_batches(text.validation, batch_size=batch_size, length=length, count=VALIDATION_BATCHES)
    loss = evaluate(model, held_out)
    torch.save(_checkpoint(model, text=text.name, steps=steps, validation_loss=loss), path)
    return loss


def load_pretrained(path: str | PathLike[str] | None = None, device: str | torch.device = "cpu") -> ByteTransformer:
    """Rebuild a pretrained ByteTransformer in float32 on device; the default path is the shipped checkpoint.

    The shipped model saw windows of up to 128 bytes: its position embeddings from 128 on are untrained.
    Raises FileNotFoundError when there is no checkpoint.
    """
    path = CHECKPOINT if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; make one with: python -m gradlr.apps.bench.pretrain {path}")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    with torch.random.fork_rng(devices=[]):
        model = ByteTransformer(**saved["config"])
    # Copying into the float32 parameters converts the stored float16.
    model.load_state_dict(saved["model"])
    return model.to(device)


def learning_rate_factor(step: int, steps: int) -> float:
    """Multiple of the peak learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(steps - WARMUP_STEPS, 1)
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def main() -> None:
    """Command line: python -m gradlr.apps.bench.pretrain [PATH]."""
    parser = argparse.ArgumentParser(description="Pretrain the byte transformer on library source code.")
    parser.add_argument("path", nargs="?", type=Path, default=CHECKPOINT, help="checkpoint to write")
    path = parser.parse_args().path
    loss = pretrain(path)
    print(f"{path}: validation loss {loss:.4f} nats per byte")


def _new_model(seed: int) -> ByteTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ByteTransformer(dim=128, depth=4, heads=4, context=256)


def _train(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], *, steps: int, lr: float) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    for inputs, targets in data:
        optimizer.zero_grad()
        language_model_loss(model, inputs.to(device), targets.to(device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()


def _checkpoint(model: ByteTransformer, **facts: str | float) -> dict[str, object]:
    weights = {name: value.to("cpu", torch.float16) for name, value in model.state_dict().items()}
    return {"config": model.config, "model": weights, **facts}


def _checked_target(path: str | PathLike[str]) -> Path:
    path = Path(path)
    # Before the minutes of training, not after them.
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {path.absolute().parent} to write the checkpoint to")
    return path


if __name__ == "__main__":
    main()
