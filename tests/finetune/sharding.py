"""What each process of test_torchrun.py's check of shards runs: place, train, save, go on, and bring the weights together."""

import sys
import warnings
from pathlib import Path

import torch
from finetune.tiny import llama

from gradlr.finetune.folder import RunFolder
from gradlr.finetune.launch import joined
from gradlr.finetune.losses import cross_entropy
from gradlr.finetune.pretrained import PretrainedModel
from gradlr.finetune.processes import Processes


def made(language, processes):
    model = processes.placed(language.load(torch.float32, 0).train())
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1))


def train(language, model, opt, scheduler, processes, steps, *, start=0):
    for step in range(start, start + steps):
        tokens = torch.randint(300, (4, 8), generator=torch.Generator().manual_seed(step))
        own = tokens.chunk(processes.size)[processes.rank]
        cross_entropy(language.logits(model, own), own).backward()
        opt.step()
        opt.zero_grad()
        scheduler.step()


def check(path, processes):
    language, folder = PretrainedModel(path / "model", None), RunFolder(path / "out", is_writer=processes.is_first)
    model, opt, scheduler = made(language, processes)
    assert all(parameter.to_local().numel() < parameter.numel() for parameter in model.parameters())
    assert processes.checkpoint(folder) is None
    for step in (1, 2):
        train(language, model, opt, scheduler, processes, 1, start=step - 1)
        processes.save(folder, model=model, optimizer=opt, scheduler=scheduler, done={"step": step})
    found = processes.checkpoint(folder)
    assert (found.name, len(list(folder.shards.iterdir()))) == ("2", 1)
    train(language, model, opt, scheduler, processes, 2, start=2)
    straight = processes.whole(model, lambda: language.skeleton(torch.float32))
    model, opt, scheduler = made(language, processes)
    train(language, model, opt, scheduler, processes, 1, start=7)  # so that there is state, and another one
    assert processes.load(found, model=model, optimizer=opt, scheduler=scheduler) == {"done": {"step": 2}}
    train(language, model, opt, scheduler, processes, 2, start=2)
    resumed = processes.whole(model, lambda: language.skeleton(torch.float32))
    if not processes.is_first:
        assert straight is resumed is None
        return
    model, opt, scheduler = made(language, Processes("cpu"))
    train(language, model, opt, scheduler, Processes("cpu"), 4)
    trained, one, other = model.state_dict(), straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in trained)
    # Sums of float32 in another order, through four steps.
    assert all(torch.allclose(one[name], value, atol=1e-5, rtol=1e-5) for name, value in trained.items())
    first = language.load(torch.float32, 0).state_dict()
    assert max((one[name] - value).abs().max() for name, value in first.items()) > 1e-3  # a hundred times that
    language.save(resumed, path / "saved")


if __name__ == "__main__":
    warnings.simplefilter("error")
    # torch's own, of its sharded state.
    warnings.filterwarnings("ignore", module="torch.distributed")
    folder = Path(sys.argv[1])
    with joined("fsdp", "cpu") as own:
        own.by_first(lambda: llama(folder / "model"))
        check(folder, own)
