"""The real packages do under the bench what they do on their own, and their state is counted whole."""

import argparse
import copy

import pytest
import torch
from torch import nn

from gradlr.apps.bench import bench_cli, peers
from gradlr.apps.bench.baselines import OWN_BASELINES, require_baselines
from gradlr.apps.bench.language import FineTuning
from gradlr.apps.bench.peers import PEERS
from gradlr.errors import ArgumentError

WIDTH = 64


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, WIDTH, generator=generator), torch.randn(16, WIDTH, generator=generator)


def train(net, train_step, steps=3):
    for seed in range(steps):
        x, y = batch(seed)
        train_step.step(lambda x=x, y=y: nn.functional.mse_loss(net(x), y))


WEIGHTS, BIASES = 2 * WIDTH * WIDTH, 2 * WIDTH
QUARTER = WIDTH // 4


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("adamw_8bit", 2 * WEIGHTS / 4 + 2 * BIASES + 2 * (WEIGHTS // 256) + 2 * 256),  # 8 bits; a scale per 256; two tables
        ("galore", 2 * (2 * QUARTER * WIDTH) + 2 * QUARTER * WIDTH + 2 * BIASES),  # two moments r x n, the basis r x m
        ("apollo", 2 * (2 * QUARTER * WIDTH) + 2 * QUARTER * WIDTH + 2 * BIASES),
        ("apollo_mini", 2 * (2 * WIDTH) + 2 * WIDTH + 2 * BIASES),
        ("adalomo", 2 * (WIDTH + WIDTH) + BIASES),
        ("optimi", 2 * (WEIGHTS + BIASES)),
        ("lora", 3 * 2 * 2 * peers.LORA_RANK * WIDTH),  # the adapters and their two moments
    ],
)
def test_state_is_what_the_packages_papers_say(name, numbers):
    net = model()
    train_step = PEERS[name].make(net, 1e-3)
    train(net, train_step)
    assert train_step.state_bytes() == pytest.approx(4 * numbers, rel=1e-9)


def weights(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


def test_gradient_release_is_optimis_own_step():
    from optimi import AdamW

    net, reference = model(), model()
    train_step = PEERS["optimi"].make(net, 1e-3)
    optimizer = AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    train(net, train_step)
    for seed in range(3):
        x, y = batch(seed)
        nn.functional.mse_loss(reference(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    # The same arithmetic, one tensor at a time instead of in a list.
    for ours, theirs in zip(weights(net), weights(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_lora_trains_adapters_only():
    net = model()
    before = weights(net)
    train_step = PEERS["lora"].make(net, 1e-2)
    train(net, train_step)
    named = dict(net.named_parameters())
    assert all(torch.equal(named[f"{i}.base_layer.weight"], before[k]) for i, k in ((0, 0), (2, 2)))
    assert all(named[f"{i}.lora_B.default.weight"].abs().sum() > 0 for i in (0, 2))


def test_a_new_classifier_is_trained_whole_beside_lora():
    net = nn.Sequential()
    net.add_module("body", nn.Linear(WIDTH, WIDTH))
    net.add_module("classifier", nn.Linear(WIDTH, 4))
    before = copy.deepcopy(net.classifier.weight)
    train_step = PEERS["lora"].make(net, 1e-2)
    x = batch(0)[0]
    train_step.step(lambda: net(x).square().mean())
    assert not torch.equal(net.classifier.weight, before)


@pytest.mark.parametrize("name", list(PEERS))
def test_the_rate_of_a_schedule_reaches_the_package(name):
    net = model()
    train_step = PEERS[name].make(net, 1e-2)
    train(net, train_step, steps=1)
    before = weights(net)
    train_step.set_rate(0.0)
    train(net, train_step, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


def test_the_share_of_full_rank_follows_the_usual_matrix():
    parameters = [nn.Parameter(torch.empty(shape)) for shape in ((128, 384), (128, 128), (512, 128), (20, 128))]
    assert peers.low_rank_share(parameters) == 32


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(peers.Peer, "is_installed", lambda peer: peer.package != "lomo-optim")
    require_baselines(["adamw", "galore", "k4_r64"])
    with pytest.raises(ArgumentError, match=r"lomo-optim not installed: pip install 'gradlr\[bench\]'"):
        require_baselines(["adamw", "adalomo"])


def test_losses_of_a_step_are_those_of_the_workload():
    workload = FineTuning(steps=1, batch_size=1)
    net = workload.model(0, "cpu")
    (compute,) = workload.losses(net, 0)
    expected = compute().item()
    train_step = PEERS["adalomo"].make(net, 1e-3)
    assert train_step.step(compute).item() == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--baselines", "adamw", "k4_r8"], {"adamw", "k4_r8"}),
        (["--baselines", "adamw", "lora", "--peers", "lora"], {"adamw", "lora"}),
        (["--peers", "lora", "galore"], {*OWN_BASELINES, "lora", "galore"}),
        (["--peers"], set(OWN_BASELINES)),
        ([], {*OWN_BASELINES, *PEERS}),
    ],
)
def test_the_command_compares_who_is_named_or_everybody(options, expected):
    parser = argparse.ArgumentParser()
    bench_cli.add_arguments(parser)
    found = bench_cli.chosen(parser.parse_args(["quality", *options]))
    assert set(found) == expected and len(found) == len(expected)
