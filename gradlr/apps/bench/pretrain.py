"""Pretrain the byte transformer on library source code, and load the checkpoint that ships with the package."""

from __future__ import annotations

import argparse
import math
import tempfile
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from .environment import cache_folder
from .text import batches, library_sources, validation_batches
from .transformer import ByteTransformer, evaluate, language_model_loss

CHECKPOINT = Path(__file__).with_name("byte-transformer.pt")
WARMUP_STEPS = 50
FINAL_LR_FRACTION = 0.1
MAX_GRADIENT_NORM = 1.0
VALIDATION_BATCHES = 32
BRIEF_STEPS = 600  # of models that no checkpoint ships for


def pretrain(
    path: str | PathLike[str],
    *,
    steps: int = 1500,
    batch_size: int = 8,
    length: int = 128,
    width: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> float:
    """Train a ByteTransformer on library_sources() with AdamW, save it, and return the validation loss in nats per byte.

    Args:
        path: Of the file; it holds config, model (float16 state dict), text, steps and validation_loss, and loads with
            weights_only=True.
        steps, batch_size, length: Of windows of `length` bytes; position embeddings from there on stay untrained.
        width: Of the model, in heads of 32.
        lr: The highest, see `learning_rate_factor`.
        seed, device, progress: Of weights and data; where; whether a bar shows it.

    Raises:
        FileNotFoundError: the folder of path does not exist.
    """
    from tqdm import tqdm  # an extra: loading the checkpoint does without it

    path = Path(path)
    # Before the minutes of training, not after them.
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {path.absolute().parent} to write the checkpoint to")
    text = library_sources()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteTransformer(dim=width, depth=4, heads=width // 32, context=256).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    data = batches(text.train, batch_size=batch_size, length=length, steps=steps, seed=seed)
    for inputs, targets in tqdm(data, total=steps, desc="pretraining", disable=not progress):
        optimizer.zero_grad()
        language_model_loss(model, inputs.to(device), targets.to(device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
    held_out = validation_batches(text.validation, batch_size=batch_size, length=length, count=VALIDATION_BATCHES)
    loss = evaluate(model, held_out)
    weights = {name: value.to("cpu", torch.float16) for name, value in model.state_dict().items()}
    facts = {"text": text.name, "steps": steps, "validation_loss": loss}
    torch.save({"config": model.config, "model": weights, **facts}, path)
    return loss


def load_pretrained(path: str | PathLike[str] | None = None, device: str | torch.device = "cpu") -> ByteTransformer:
    """Rebuild a pretrained ByteTransformer in float32 on device; the default path is the shipped checkpoint.

    The shipped model saw windows of up to 128 bytes: its position embeddings from 128 on are untrained.

    Raises:
        FileNotFoundError: there is no checkpoint.
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


def pretrained_of_width(width: int) -> Path:
    """A checkpoint of so wide a model, pretrained for `BRIEF_STEPS` when it is first asked for, and kept in the user's cache."""
    path = cache_folder() / f"byte-transformer-{width}.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as made:
            pretrain(made_path := Path(made) / path.name, steps=BRIEF_STEPS, width=width, lr=3e-3 * 128 / width, progress=False)
            made_path.replace(path)
    return path


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
    print(f"{path}: validation loss {pretrain(path):.4f} nats per byte")


if __name__ == "__main__":
    main()
