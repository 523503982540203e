"""What happens at a time is in the latent frame that `Timeline` says, for both families.

Weights are random but for their reach in time: filters of causal codecs see no further back than
their stride asks for, those of the others the same to either side. So strides, padding and cropping
alone decide where a change lands.
"""

import pytest
import torch
from tiny_kandinsky6 import save_tiny_kandinsky6
from tiny_ltx2 import save_tiny_ltx2
from torch import nn

from syncdpo.data.clips import Clip
from syncdpo.models import load_model

FRAMES = 33
SAMPLES = 64  # of an impulse in the sound


def look_no_further_back(codec):
    """Causal filters along time keep the present alone; those that skip pictures keep two.

    Norms over all pictures at once go: by them each is a little in every frame.
    """
    for module in list(codec.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.kernel_size[0] > 1:
            module.weight.data[:, :, : -module.stride[0]] = 0


def look_both_ways(codec):
    for module in codec.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            module.weight.data = (module.weight.data + module.weight.data.flip(-1)) / 2
    codec.vae.encoder.mid.attn_1.proj_out.weight.data.zero_()  # which looks everywhere


@pytest.fixture(scope="module", params=["LTX-2", "Kandinsky 6"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    if request.param == "LTX-2":
        model = load_model(str(save_tiny_ltx2(folder)), frames=FRAMES, height=32, width=32)
        look_no_further_back(model.parts["audio_vae"].encoder)
    else:
        save_tiny_kandinsky6(folder)
        model = load_model(str(folder), frames=FRAMES, height=16, width=16)
        look_both_ways(model.parts["audio_vae"])
    look_no_further_back(model.parts["vae"].encoder)
    return model


def clip_for(model, picture=None, sample=None):
    """Of noise; with another picture, or a knock in the sound."""
    form, generator = model.clip_format, torch.Generator().manual_seed(0)
    shape = (FRAMES, form.height, form.width, 3)
    video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    count = round(form.seconds * form.sample_rate)
    audio = 0.01 * torch.randn(form.channels, count, generator=generator)
    if picture is not None:
        video[picture] = 255 - video[picture].flip(0)
    if sample is not None:
        audio[:, sample : sample + SAMPLES] += 0.5
    return Clip(video, form.fps, audio, form.sample_rate)


@torch.no_grad()
def moved(model, stream, **change):
    """Energy of the difference that a change makes, by latent frame."""
    encode = (model._encode_video, model._encode_audio)[stream]
    difference = encode(clip_for(model, **change)) - encode(clip_for(model))
    return model.timelines[stream].as_frames(difference[None])[0].square().flatten(1).sum(1)


# Both borders of frames, and the pictures between; more than 16 are encoded piece by piece.
@pytest.mark.parametrize("picture", [0, 1, 4, 5, 8, 9, 16, 17, 20, 24, 31, 32])
def test_a_picture_is_in_the_frame_that_shows_it(model, picture):
    timeline = model.timelines[0]
    energy = moved(model, 0, picture=picture)
    shown = (picture + 0.5) / 24
    begins = timeline.begins(torch.arange(timeline.frames, dtype=torch.float32))
    [frame] = ((begins <= shown).nonzero()[-1]).tolist()
    assert energy.argmax() == frame
    assert energy[frame] > 0.8 * energy.sum()


@pytest.mark.parametrize("seconds", [0.12, 0.2, 0.37, 0.5, 0.777, 1.0, 1.2])
def test_a_knock_is_in_the_frame_that_sounds_it(model, seconds):
    timeline, rate = model.timelines[1], model.clip_format.sample_rate
    sample = round(seconds * rate)
    energy = moved(model, 1, sample=sample)
    heard = timeline.position(torch.tensor((sample + SAMPLES / 2) / rate))
    frames = torch.arange(timeline.frames)
    near = (frames - heard).abs() < 6
    assert energy[near].sum() > 0.95 * energy.sum()
    centre = (frames * energy * near).sum() / (energy * near).sum()
    assert centre == pytest.approx(heard.item(), abs=0.5)
