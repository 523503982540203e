"""examples/ltx_trainer_strategy.py in the trainer's step, against the loss in plain PyTorch.

With Lightricks' own base classes where ltx-trainer is installed, else with a stand-in that has
their call signatures.
"""

import sys
from importlib.util import find_spec

import ltx_trainer_standin
import pytest
import torch
from from_examples import load
from torch.nn.functional import logsigmoid

from syncdpo import ops

peft = pytest.importorskip("peft")
ROWS, FRAMES, HEIGHT, WIDTH, HEARD = 3, 16, 2, 3, 126


@pytest.fixture
def example(monkeypatch):
    if not (find_spec("ltx_trainer") and find_spec("ltx_core")):
        for name, module in ltx_trainer_standin.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    return load("ltx_trainer_strategy")


class Transformer(torch.nn.Module):
    """Called as the trainer calls it; each stream sees the mean of the other, σ and its text."""

    def __init__(self):
        super().__init__()
        self.video, self.audio = torch.nn.Linear(4, 4), torch.nn.Linear(6, 6)
        self.calls = 0

    def forward(self, video, audio, perturbations):
        assert perturbations is None
        self.calls += 1
        across = [x.latent.mean((1, 2)) + x.context.mean((1, 2)) for x in (audio, video)]
        return tuple(
            layer(x.latent) * (1 + x.timesteps[..., None]) + other[:, None, None]
            for layer, x, other in zip(
                (self.video, self.audio), (video, audio), across, strict=True
            )
        )


class Sampler:
    """The trainer's: one σ per row of the latents it is shown."""

    def sample_for(self, batch):
        assert batch.ndim == 3
        return torch.rand(len(batch))


def batch(silent=()):
    torch.manual_seed(0)
    audio = torch.randn(ROWS, 2, HEARD, 3)
    audio[list(silent)] = 0
    whole = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 24}
    return {
        "latents": {"latents": torch.randn(ROWS, 4, FRAMES, HEIGHT, WIDTH)}
        | {name: torch.full((ROWS,), value) for name, value in whole.items()},
        "audio_latents": {"latents": audio},
        "conditions": {
            "video_prompt_embeds": torch.randn(ROWS, 5, 8),
            "audio_prompt_embeds": torch.randn(ROWS, 5, 7),
            "prompt_attention_mask": torch.ones(ROWS, 5, dtype=torch.int64),
        },
    }


def strategy_of(example, **settings):
    """The strategy, and the model that the trainer's LoRA training hands to it."""
    strategy = example.SyncDPOStrategy(example.SyncDPOConfig(**settings))
    lora = peft.LoraConfig(r=2, target_modules=["video", "audio"], init_lora_weights=False)
    strategy.model = peft.get_peft_model(Transformer(), lora)
    return strategy


def step(strategy, data):
    """As in the trainer's `_training_step`."""
    inputs = strategy.prepare_training_inputs(data, Sampler())
    policy = strategy.model(video=inputs.video, audio=inputs.audio, perturbations=None)
    return inputs, policy, strategy.compute_loss(*policy, inputs)


def plain_loss(policy, reference, targets, beta):
    margin = 0.0
    for p, r, y in zip(policy, reference, targets, strict=True):
        own, other = ((x.double() - y.double()).square().mean((1, 2)) for x in (p, r))
        gap_win, gap_lose = (own - other).chunk(2)
        margin = margin - 0.5 * beta * (gap_win - gap_lose) / sum(other.chunk(2)) * 2
    return -logsigmoid(margin)


def test_the_step_s_loss_and_gradient_are_the_plain_formula_s(example):
    strategy = strategy_of(example, beta=3.0, difficulty=0.0)
    inputs, policy, loss = step(strategy, batch())
    assert inputs.video_loss_mask.all()
    with torch.no_grad(), strategy.model.disable_adapter():
        reference = strategy.model(video=inputs.video, audio=inputs.audio, perturbations=None)
    targets = []
    for stream, target in enumerate((inputs.video_targets, inputs.audio_targets)):
        epsilon = ops.noise(target.clean[:ROWS].shape, target.seed, stream=stream).repeat(2, 1, 1)
        given = (inputs.video, inputs.audio)[stream]
        level = given.sigma[:, None, None]
        noisy = (1 - level) * target.clean + level * epsilon
        torch.testing.assert_close(given.latent, noisy)
        assert torch.equal(given.timesteps, level[..., 0].expand(given.timesteps.shape))
        targets.append(epsilon - target.clean)
    expected = plain_loss(policy, reference, targets, beta=3.0)
    assert len(loss) == len(inputs.video.sigma) == 2 * ROWS  # the trainer pairs losses with σ
    torch.testing.assert_close(loss.double(), expected.repeat(2), rtol=1e-5, atol=0)
    weights = [p for p in strategy.model.parameters() if p.requires_grad]
    assert len(weights) == 4
    ours = torch.autograd.grad(loss.mean(), weights, retain_graph=True)
    true = torch.autograd.grad(expected.mean(), weights)
    for own, exact in zip(ours, true, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-6)


def test_rows_are_winners_then_losers_which_differ_in_the_sound_s_order_alone(example):
    data = batch()
    inputs, *_ = step(strategy_of(example, rules="replace", difficulty=0.0), data)
    video, audio = inputs.video_targets.clean, inputs.audio_targets.clean
    assert torch.equal(video[:ROWS], video[ROWS:])
    frames = data["audio_latents"]["latents"].transpose(1, 2).flatten(2)
    for row in range(2 * ROWS):  # each frame of a row is a frame of its clip
        own = (audio[row][:, None] == frames[row % ROWS]).all(2)
        assert own.any(1).all()
        moved = ~own.diagonal()
        if row >= ROWS:
            assert 0.3 < moved.float().mean() < 0.85  # half of the clip or more, of even frames
    for stream in (inputs.video, inputs.audio):
        same = (stream.sigma, stream.positions, stream.context, stream.context_mask)
        assert all(torch.equal(*values.chunk(2)) for values in same)


def test_latent_frames_lie_where_ltx2_s_codecs_put_them(example, monkeypatch):
    """121 pictures at 24 fps, and 501 hops of 10 ms of their sound."""
    make_pairs, times = example.make_pairs, {}

    def noted(*arguments, **options):
        times.update(options)
        return make_pairs(*arguments, **options)

    monkeypatch.setattr(example, "make_pairs", noted)
    strategy_of(example).prepare_training_inputs(batch(), Sampler())
    assert times["video_timeline"].duration == pytest.approx(121 / 24)
    assert times["audio_timeline"].duration == pytest.approx(5.01)


def test_a_clip_without_sound_costs_nothing_and_teaches_nothing(example):
    inputs, _, loss = step(strategy_of(example), batch(silent=[1]))
    assert inputs.video_loss_mask.tolist() == [True, False, True]
    assert (loss == 0).tolist() == [False, True, False] * 2


def test_the_data_it_asks_for_and_a_model_that_was_forgotten(example):
    strategy = strategy_of(example)
    assert strategy.config.name == "syncdpo"
    assert set(strategy.config.get_data_sources()) == {"latents", "audio_latents", "conditions"}
    inputs, policy, _ = step(strategy, batch())
    strategy.model = None
    with pytest.raises(ValueError, match="model: expected the trainer's transformer"):
        strategy.compute_loss(*policy, inputs)
