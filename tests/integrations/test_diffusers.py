"""diffusers' models in the loop of its training scripts, on the CPU. The example of docs/trainers.md runs in tests/docs."""

import pytest
import torch
from accelerate import Accelerator
from accelerate_states import forget_accelerate, fresh_accelerate

pytest.importorskip("diffusers")

import diffusers
from diffusers.training_utils import EMAModel

import gradlr
from gradlr.integrations.accelerate import attach

pytestmark = pytest.mark.usefixtures(fresh_accelerate.__name__)


def dit(seed=0):
    """A transformer on patches, conditioned on classes and times."""
    torch.manual_seed(seed)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    # Its last layers begin at zero, behind which nothing else would have a gradient in the first step.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


class Script:
    """What `train_unconditional.py` and its kin do: accumulation, clipping, a moving average, checkpoints of everything."""

    def __init__(self, seed=0, **options):
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        self.tracker, self.plain = gradlr.LossTracker(), dit(seed)
        self.opt = attach(self.accelerator, self.plain, self.tracker, lr=1e-3, rank=4, momentum_rank=2, **options)
        self.ema = EMAModel(self.plain.parameters(), model_cls=type(self.plain), model_config=self.plain.config)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.opt, lambda step: 1 / (1 + step))
        self.model, self.prepared, self.schedule = self.accelerator.prepare(self.plain, self.opt, schedule)
        self.noise = diffusers.DDPMScheduler(num_train_timesteps=10)

    def run(self, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            clean, noise = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
            times, labels = torch.arange(4), torch.arange(4)
            with self.accelerator.accumulate(self.model):
                predicted = self.model(self.noise.add_noise(clean, noise, times), times, labels).sample
                self.accelerator.backward(self.tracker(torch.nn.functional.mse_loss(predicted.float(), noise)))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.prepared.step()
                self.schedule.step()
                self.prepared.zero_grad()
            if self.accelerator.sync_gradients:
                self.ema.step(self.plain.parameters())
        return self


def test_a_transformer_trains_whole_and_resumes_bit_for_bit(tmp_path):
    whole = Script()
    before = [parameter.detach().clone() for parameter in whole.plain.parameters()]
    whole.run(range(4))
    whole.accelerator.save_state(str(tmp_path))
    torch.save(whole.ema.state_dict(), tmp_path / "ema.pt")
    whole.run(range(4, 8))
    assert not any(torch.equal(a, b) for a, b in zip(before, whole.plain.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole.ema.shadow_params, whole.plain.parameters(), strict=True))
    forget_accelerate()
    resumed = Script(seed=3)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.ema.load_state_dict(torch.load(tmp_path / "ema.pt"))
    resumed.run(range(4, 8))
    pairs = [*zip(whole.plain.parameters(), resumed.plain.parameters(), strict=True)]
    pairs += zip(whole.ema.shadow_params, resumed.ema.shadow_params, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert whole.tracker.history == resumed.tracker.history and len(whole.tracker.history) == 8
