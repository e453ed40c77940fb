"""Run by tests/checkpoint/test_file.py: forks writers that save over one path in a loop, and kills them when it is told."""

import os
import signal
import sys
import time

import torch
from torch import nn

import gradlr


def checkpointed():
    """A model whose every number is the counter, with its optimizer."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    return model, gradlr.attach(model, gradlr.LossTracker(), rank=4)


def write_for_ever(path, start):
    torch.set_num_threads(1)
    model, opt = checkpointed()
    counter = start
    while True:
        counter += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(counter)
        gradlr.save(path, model=model, optimizer=opt, counter=counter)


def main():
    path = sys.argv[1]
    # What the first optimizer and the first save import takes seconds: not in each of the writers.
    assert checkpointed() and gradlr.save
    for line in sys.stdin:
        start, delay = line.split()
        process = os.fork()
        if process == 0:
            write_for_ever(path, int(start))
        time.sleep(float(delay))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        print("killed", flush=True)


if __name__ == "__main__":
    main()
