"""A tiny Llama with a tokenizer of its own, and data, for the tests of finetune; runs commands in forked processes."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

WORDS = ["the", "cat", "sat", "on", "mat", "and", "looked", "at", "another", "dog", "while", "it", "rained", "over", "hills"]


def tokenizer(**options):
    """Byte-level BPE of 300 tokens, trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **{"eos_token": "<eos>", **options})


def llama(folder, *, dropout=0.0, positions=64, tokens=None, tied=False, width=32):
    """Write a tiny Llama with its tokenizer into the folder."""
    import torch
    import transformers

    own = tokenizer() if tokens is None else tokens
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=positions, attention_dropout=dropout, bos_token_id=None, eos_token_id=own.eos_token_id,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def texts(count=40, length=24):
    """Documents of a few words."""
    draw = random.Random(0)
    return [" ".join(draw.choice(WORDS) for _ in range(length)) for _ in range(count)]


def text_file(path, **sizes):
    """A .txt with such documents."""
    path.write_text("\n\n".join(texts(**sizes)))
    return path


def jsonl_file(path, records):
    """A .jsonl with a record a line; strings are written as they are."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def main():
    """Serve: run each command that comes on stdin in a forked process, kill it where asked to, answer with its exit status."""
    import torch

    import gradlr.apps.finetune.finetune_cli  # noqa: F401 (once, before the forks)
    from gradlr.apps.cli import main as command
    from gradlr.apps.estimate import estimate

    torch.set_num_threads(1)
    if torch.version.cuda is None:
        # Once, too: what it imports takes longer than a short run. Not where autograd has threads, which no fork inherits.
        estimate(torch.nn.Linear(2, 2), inputs=(torch.empty(1, 2),))
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            _become(command, request)
        _kill_when(process, Path(request["out"]), **request.get("kill", {}))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _become(command, request):
    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 99
    try:
        status = command(request["arguments"])
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def _kill_when(process, out, *, seen=None, by=signal.SIGKILL):
    """Kill it as soon as a file of the run is there."""
    if seen is None:
        return
    end = time.monotonic() + 60
    while time.monotonic() < end and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if any(out.glob(seen)):
            break
        time.sleep(0.001)
    os.kill(process, by)


if __name__ == "__main__":
    main()
