import math

import pytest
import torch

from gradlr.apps.bench.pretrain import CHECKPOINT, learning_rate_factor, load_pretrained, pretrain
from gradlr.apps.bench.text import library_sources, validation_batches
from gradlr.apps.bench.transformer import ByteTransformer, evaluate, language_model_loss


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ByteTransformer(dim=32, depth=2, heads=4, context=24)


def tokens(batch=2, length=24, seed=0):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 7, 24])
def test_logits_shape(model, length):
    logits = model(tokens(length=length))
    assert logits.shape == (2, length, 256) and logits.dtype == torch.float32


def test_later_bytes_do_not_change_earlier_logits(model):
    original = tokens()
    changed = original.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    before, after = model(original), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-4)


def test_head_is_tied_to_the_token_embedding(model):
    hidden = []
    model.norm.register_forward_hook(lambda module, args, output: hidden.append(output))
    logits = model(tokens())
    torch.testing.assert_close(logits, hidden[0] @ model.token.weight.T)
    assert [name for name, p in model.named_parameters() if 256 in p.shape] == ["token.weight"]


def test_untrained_loss_is_near_uniform(model):
    loss = language_model_loss(model, tokens(8), tokens(8, seed=1))
    assert loss.dim() == 0
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


def test_every_parameter_receives_a_gradient(model):
    language_model_loss(model, tokens(), tokens(seed=1)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    block = ByteTransformer(dim=128, depth=8).blocks[3]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (block.attention.out, block.mlp[-1]):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_config_rebuilds_the_model(model):
    rebuilt = ByteTransformer(**model.config)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens()), model(tokens()))


def test_bad_sizes_are_refused(model):
    with pytest.raises(ValueError, match="context"):
        model(tokens(length=25))
    with pytest.raises(ValueError, match="multiple of heads"):
        ByteTransformer(dim=30, heads=4)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_averages_and_restores_the_mode(model, training):
    model.train(training)
    pairs = [(tokens(seed=i), tokens(seed=i + 10)) for i in range(3)]
    expected = sum(language_model_loss(model, *pair).item() for pair in pairs) / 3
    assert evaluate(model, pairs) == pytest.approx(expected, rel=1e-6)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_refuses_no_batches(model):
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(model, [])
    assert model.training


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    factors = [learning_rate_factor(step, 400) for step in range(401)]
    assert factors[0] == pytest.approx(1 / 50) and max(factors) == factors[49] == 1.0
    assert factors[50:] == sorted(factors[50:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)


def test_pretrain_round_trip_is_reproducible(tmp_path):
    settings = {"steps": 2, "batch_size": 2, "length": 16, "progress": False}
    losses = [pretrain(tmp_path / name, **settings) for name in ("a.pt", "b.pt")]
    assert losses[0] == losses[1] < math.log(256) + 0.1
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(saved) == {"config", "model", "text", "steps", "validation_loss"}
    assert all(value.dtype == torch.float16 for value in saved["model"].values())
    loaded = load_pretrained(tmp_path / "a.pt")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    held_out = validation_batches(library_sources().validation, batch_size=2, length=16, count=32)
    assert evaluate(loaded, held_out) == pytest.approx(losses[0], abs=5e-3)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m gradlr.apps.bench.pretrain"):
        load_pretrained(tmp_path / "missing.pt")
    with pytest.raises(FileNotFoundError, match="no folder"):
        pretrain(tmp_path / "missing" / "x.pt", steps=1)


def test_shipped_checkpoint_beats_half_of_uniform():
    assert CHECKPOINT.stat().st_size <= 4_000_000
    model = load_pretrained()
    held_out = validation_batches(library_sources().validation, batch_size=8, length=128, count=8)
    assert evaluate(model, held_out) < 0.5 * math.log(256)
