"""What docs/models.md says of other generators, as far as numbers and diffusers' code settle it."""

from dataclasses import replace

import pytest
import torch
from documented_model import PAGE, own_class
from torch import nn

from syncdpo.data import ClipFormat
from syncdpo.models.members import check_in_step
from syncdpo.negatives import Timeline

TEXT = PAGE.read_text("utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return own_class(tmp_path_factory.mktemp("own"))()


def in_step(model, seconds, *timelines):
    model.clip_format = replace(model.clip_format, seconds=seconds)
    model.timelines = timelines
    check_in_step(model)


@pytest.mark.parametrize(
    ("pictures", "fps", "timelines"),
    [
        (121, 24, ("Timeline(31, 6.0, dim=2, first=1, stride=4)", "Timeline(157, 31.25, dim=1)")),
        (121, 24, ("Timeline((n − 1) // 4 + 1, 6.0, dim=2, first=1, stride=4)",
                   "Timeline(L, 50.0, dim=2)")),
        (193, 24, ("Timeline((n − 1) // 4 + 1, 6.0, dim=2, first=1, stride=4)",
                   "Timeline(L, 50.0, dim=2)")),
        (81, 16, ("Timeline((n − 1) // 4 + 1, 4.0, dim=2, first=1, stride=4)",
                  "Timeline(126, 25.0, dim=2)")),
    ],
)  # fmt: skip
def test_timelines_are_as_long_as_the_clips(model, pictures, fps, timelines):
    names = {"Timeline": Timeline, "n": pictures, "L": {121: 253, 193: 403}.get(pictures)}
    lines = []
    for line in timelines:
        assert f"`{line}`" in TEXT
        lines.append(eval(line.replace("−", "-"), names))
    in_step(model, pictures / fps, *lines)


def test_javisdit_s_padded_sound_would_not_count_as_in_step(model):
    video = Timeline(21, 4.0, dim=2, first=1, stride=4)
    with pytest.raises(ValueError, match=r"expected 5\.0625 s of audio, .* got 128 frames"):
        in_step(model, 81 / 16, video, Timeline(128, 25.0, dim=2))


# --- MiniMax-H3 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def h3():
    return pytest.importorskip("diffusers.modular_pipelines.minimax_h3.before_denoise")


def test_its_sizes_are_diffusers_own(h3):
    from diffusers import MiniMaxH3Transformer3DModel

    with torch.device("meta"):
        transformer = MiniMaxH3Transformer3DModel()
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert f"{count / 1e9:.1f} billion weights" in TEXT
    assert f"{2 * count / 1e9:.0f} GB in bfloat16" in TEXT
    names = [name for name, _ in transformer.named_parameters() if "audio" in name]
    assert {name.partition(".")[0] for name in names} == {"audio_proj_in", "audio_proj_out"}
    assert isinstance(transformer.get_submodule("transformer_blocks.0.attn.to_out.0"), nn.Linear)


def test_its_pictures_do_not_lie_evenly_in_time(h3):
    """A regular stream of the same number of latents is off by 2.4 pictures, 100 ms."""
    lengths = torch.tensor(h3._ROPE_FRAMES_PER_LATENT, dtype=torch.float64)
    assert lengths.tolist() == [1, 4, 4, 4, 4]
    begins = lengths.cumsum(0) - lengths
    even = torch.arange(5) * 17 / 5
    off = (begins - even).abs().max().item()
    assert off == pytest.approx(2.4)
    assert "2.4 pictures, 100 ms" in TEXT
    assert off / 24 == pytest.approx(0.1)
    from diffusers.modular_pipelines.minimax_h3.modular_pipeline import (
        audio_latent_num_frames,
        video_latent_num_frames,
    )

    assert video_latent_num_frames(124, 17, 5) == 5 * 7 + 2
    form = ClipFormat(124 / 24, 24, 768, 768, 32_000, 2)
    sound = Timeline(audio_latent_num_frames(124), 40.0, tokens=2)
    assert abs(sound.duration - form.seconds) < 1 / sound.rate


def test_its_velocity_points_to_the_data_and_its_time_is_one_at_clean(h3):
    from diffusers import MiniMaxH3Scheduler

    scheduler = MiniMaxH3Scheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[0.6, 0.0])
    clean, noise = torch.randn(2, 3), torch.randn(2, 3)
    sigma = scheduler.sigmas[0].item()
    noisy = (1 - sigma) * clean + sigma * noise
    assert scheduler.timesteps[0].item() == pytest.approx(1 - sigma)
    found = scheduler.step(clean - noise, scheduler.timesteps[0], noisy, return_dict=False)[0]
    torch.testing.assert_close(found, clean)


def test_one_call_serves_a_pair_of_one_noise_level_and_caption(h3):
    """Rows by diffusers' own layout and times; with other levels each clip wants a call."""
    from diffusers import MiniMaxH3Transformer3DModel

    torch.manual_seed(0)
    transformer = MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=32, hidden_size=32, num_layers=1,
        num_refiner_layers=1, ffn_dim=48, text_dim=16, freq_dim=16, time_embed_hidden_dim=32,
        time_embed_dim=16, rope_freq_dim=4,
    ).eval()  # fmt: skip
    frames, sounds, words = 7, 37, 4
    positions, tags, *rows, _, _ = h3.MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(words, dtype=torch.long), frames, 4, 4, sounds, (1, 2, 2), 2, audio_tag=2,
        video_tag=0,
    )  # fmt: skip
    video, audio, text = (
        torch.randn(2, n, c) for n, c in ((28, 96), (2 * sounds, 32), (words, 16))
    )
    text = text[:1].expand(2, -1, -1)

    def velocity(clips, sigma):
        times, which = h3.MiniMaxH3SetTimestepsStep.build_row_timesteps(
            *rows[:2], 0, 0, words, 1 - sigma[0], 1 - sigma[1], 1.0, 1.0
        )
        assert (which[:words] == which[rows[0][0]]).all()  # text has the picture's time
        return transformer(
            video[clips], audio[clips], text[clips], times, which, tags, positions, *rows,
            return_dict=False,
        )  # fmt: skip

    with torch.no_grad():
        both = velocity([0, 1], (0.7, 0.3))
        for clip in (0, 1):
            for together, alone in zip(both, velocity([clip], (0.7, 0.3)), strict=True):
                torch.testing.assert_close(together[clip], alone[0])
        assert not torch.allclose(both[0], velocity([0, 1], (0.2, 0.3))[0], atol=1e-3)
