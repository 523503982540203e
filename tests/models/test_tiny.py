"""The embedded default: a codec that keeps time, and the model behind the common protocol."""

from pathlib import Path

import pytest
import torch
from micro import CONFIG, micro_model
from safetensors.torch import load_file, save_file

from syncdpo import ops
from syncdpo.data.synthetic import render
from syncdpo.models import codec, load_model
from syncdpo.models.tiny import BASE, SHIFT, Tiny, sampling_sigmas


@pytest.fixture
def model():
    return micro_model()


def test_codec_shapes_and_scale():
    latents = [Tiny.encode(None, render(seed).clip, "") for seed in range(8)]
    video, audio = (torch.stack([x[k] for x in latents]) for k in ("video", "audio"))
    assert video.shape == (8, 96, 40)
    assert audio.shape == (8, 50, 32)
    for x in (video, audio):
        assert x.mean().abs() < 0.5
        assert 0.4 < x.std() < 1.2


def test_codec_video_survives_its_own_round_trip():
    latents = codec.encode_video(render(1).clip.video)
    again = codec.encode_video(codec.decode_video(latents))
    assert torch.corrcoef(torch.stack([latents.flatten(), again.flatten()]))[0, 1] > 0.97


@pytest.mark.parametrize("seed", range(4))
def test_codec_audio_keeps_time_within_a_step(seed):
    """Cross-correlation of the envelopes before and after peaks within 10 ms of zero lag."""
    before = render(seed).clip.audio[0]
    after = codec.decode_audio(codec.encode_audio(before))
    envelopes = torch.stack([before, after]).abs().unfold(1, 160, 16).mean(2)  # every 1 ms
    a, b = envelopes - envelopes.mean(1, keepdim=True)
    lags = range(-60, 61)
    scores = [(a[60:-60] * b[60 + lag : len(b) - 60 + lag]).sum().item() for lag in lags]
    assert abs(lags[max(range(len(scores)), key=scores.__getitem__)]) <= 10


def test_base_is_small_and_loads():
    assert BASE.stat().st_size <= 6e6
    assert sum(p.numel() for p in load_model("tiny").transformer.parameters()) < 3e6


def test_without_its_base_it_says_where_to_get_it(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: path != BASE)
    with pytest.raises(FileNotFoundError, match=r"pip install -e.*python -m syncdpo\.demo\.base"):
        Tiny()


def test_sample_is_a_function_of_each_seed(model):
    seeds = torch.tensor([5, 6, 7])
    together = model.sample(model.transformer, {}, seeds, steps=2)
    alone = model.sample(model.transformer, {}, seeds[1:2], steps=2)
    for x, y in zip(together, alone, strict=True):
        torch.testing.assert_close(x[1:2], y, atol=1e-5, rtol=1e-5)


def test_sampling_spends_its_steps_at_the_levels_of_training():
    levels = sampling_sigmas(8)
    assert levels[[0, -1]].tolist() == [1, 0]
    even = torch.arange(7, 0, -1) / 8
    torch.testing.assert_close(levels[1:-1].logit(), even.logit() + SHIFT)


def test_given_pictures_come_back_and_the_sound_depends_on_them(model):
    seeds = torch.tensor([5, 6])
    video = ops.noise((2, 96, 40), torch.tensor([1, 2]))
    shown, heard = model.sample(model.transformer, {}, seeds, steps=3, video=video)
    torch.testing.assert_close(shown, video, atol=1e-5, rtol=1e-5)
    _, other = model.sample(model.transformer, {}, seeds, steps=3, video=video.flip(0))
    assert (heard - other).abs().mean() > 1e-3
    clips = list(model.generate([""] * 2, seeds, steps=3, video=video))
    expected = model.decode(shown, heard)
    for clip, own in zip(clips, expected, strict=True):
        assert torch.equal(clip.video, own.video)
        torch.testing.assert_close(clip.audio, own.audio, atol=1e-4, rtol=1e-4)


def test_velocity_depends_on_the_other_stream(model):
    video, audio = ops.noise((2, 96, 40), torch.tensor([1, 2])), torch.randn(2, 50, 32)
    sigma = (torch.tensor([0.3, 0.8]),) * 2
    with torch.no_grad():
        first = model.velocity(model.transformer, (video, audio), sigma, {})
        second = model.velocity(model.transformer, (video, audio + 1), sigma, {})
    assert [tuple(x.shape) for x in first] == [(2, 96, 40), (2, 50, 32)]
    assert not torch.allclose(first[0], second[0], atol=1e-4)


def test_decode_gives_clips_of_the_format(model):
    [clip] = model.decode(torch.zeros(1, 96, 40), torch.zeros(1, 50, 32))
    assert clip.video.shape == (48, 64, 64, 3)
    assert clip.audio.shape == (1, 32_000)


def test_full_weights_return_from_disk(model, tmp_path):
    model.save_weights(tmp_path, model.transformer.state_dict())
    other = Tiny(weights=tmp_path, config=CONFIG)
    for name, tensor in model.transformer.state_dict().items():
        assert torch.equal(tensor, other.transformer.state_dict()[name]), name


def test_weights_of_another_model_are_refused(model, tmp_path):
    model.save_weights(tmp_path, model.transformer.state_dict())
    with pytest.raises(ValueError, match="belongs to another model"):
        Tiny(weights=tmp_path, config=CONFIG | {"num_layers": 2})
    file = next(tmp_path.glob("*.safetensors"))
    state = load_file(file)
    state.pop("proj_in.weight")
    save_file(state, file)
    with pytest.raises(ValueError, match=r"proj_in\.weight"):
        model.load_weights(tmp_path)


def test_missing_and_pickled_weights_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="weights: expected"):
        model.load_weights(tmp_path)
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        model.load_weights(tmp_path / "weights.pt")
