import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import LTX2Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from tiny_ltx2 import VERSIONS, save_tiny_ltx2

from syncdpo.data.clips import Clip, write_clip
from syncdpo.data.latents import LatentDataset, prepare
from syncdpo.data.precomputed import open_latents
from syncdpo.models import load_model
from syncdpo.models.ltx2 import LTX2, log_mel
from syncdpo.models.noise_levels import draw_sigma
from syncdpo.training.config import load_config

SIZE = {"frames": 17, "height": 64, "width": 96}
CONFIGS = Path(__file__).parents[2] / "configs"
PROMPT = "a ball strikes the floor"
# Without guidance the pipeline denoises by the velocities alone.
UNGUIDED = {
    "guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0,
    "audio_guidance_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0,
    "audio_guidance_rescale": 0.0, "spatio_temporal_guidance_blocks": None,
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One pipeline on disk per LTX-2 version, and one whose connectors have no registers."""
    root = tmp_path_factory.mktemp("ltx2")
    found = {version: save_tiny_ltx2(root / version, version) for version in VERSIONS}
    without = {f"{s}_connector_num_learnable_registers": None for s in ("video", "audio")}
    found["masked"] = save_tiny_ltx2(root / "masked", "2.0", **without)
    return found


@pytest.fixture(scope="session", params=[*VERSIONS, "masked"])
def model(request, folders) -> LTX2:
    return LTX2(folders[request.param], **SIZE)


@pytest.fixture(scope="session")
def newest(folders) -> LTX2:
    return LTX2(folders["2.5"], **SIZE)


def random_clip(seed: int = 0) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    shape = (SIZE["frames"], SIZE["height"], SIZE["width"], 3)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    audio = 0.2 * torch.rand(2, round(SIZE["frames"] / 24 * 16000), generator=generator) - 0.1
    return Clip(video, 24.0, audio, 16000)


def batch_of(sample: dict) -> tuple[tuple[torch.Tensor, torch.Tensor], dict]:
    conditions = {name: tensor[None] for name, tensor in sample.items()}
    return (conditions.pop("video"), conditions.pop("audio")), conditions


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# --- formats and identity -------------------------------------------------------------------------


def test_timelines_are_the_rotary_positions(newest):
    video, audio = newest.timelines
    frames, rows, columns = newest.latent_size
    transformer = newest.parts["transformer"]
    seen = transformer.rope.prepare_video_coords(1, frames, rows, columns, "cpu", fps=24.0)
    seen = seen[0, 0].mean(-1).reshape(frames, -1)
    heard = transformer.audio_rope.prepare_audio_coords(1, audio.frames, "cpu")[0, 0].mean(-1)
    steps = torch.arange(audio.frames, dtype=torch.float32)
    assert video.tokens == rows * columns == 6
    torch.testing.assert_close(video.seconds(steps[:frames])[:, None].expand_as(seen), seen)
    torch.testing.assert_close(audio.seconds(steps), heard)


def test_default_format_is_five_seconds_as_published(folders):
    model = LTX2(folders["2.0"])
    video, audio = model.timelines
    assert (video.frames, video.tokens, video.rate, video.first, video.stride) == (16, 384, 3, 1, 8)
    assert (audio.frames, audio.tokens, audio.rate, audio.first, audio.stride) == (126, 1, 25, 1, 4)
    clip = model.clip_format
    assert (clip.fps, clip.height, clip.width, clip.sample_rate, clip.channels) == (
        24, 512, 768, 16000, 2,
    )  # fmt: skip
    assert clip.seconds == 121 / 24


def test_identity_follows_the_encoders_and_not_the_transformer(folders, tmp_path, newest):
    other = save_tiny_ltx2(tmp_path / "other", "2.5", seed=1)
    identity = newest.identity()
    for part in ("vae", "audio_vae", "text_encoder", "connectors", "transformer"):
        mixed = tmp_path / part
        shutil.copytree(folders["2.5"], mixed)
        shutil.rmtree(mixed / part)
        shutil.copytree(other / part, mixed / part)
        found = LTX2(mixed, **SIZE).identity()
        differing = {key for key in identity if identity[key] != found[key]}
        assert differing == {part} - {"transformer"}
    assert json.loads(json.dumps(identity)) == identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 16}, r"frames: expected a multiple of 8 plus 1, got 16"),
        ({"height": 48}, r"height: expected a multiple of 32, got 48"),
        ({"width": 0}, r"width: expected a multiple of 32, got 0"),
        ({"fps": 0}, r"fps: expected more than 0, got 0"),
        ({"sigma": "each"}, r"sigma: expected shared or separate, got 'each'"),
    ],
)
def test_bad_formats_are_refused(folders, options, message):
    with pytest.raises(ValueError, match=message):
        LTX2(folders["2.0"], **SIZE | options)


def test_other_checkpoints_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="expected the folder or hub id of a diffusers LTX-2"):
        LTX2(tmp_path)
    silent = tmp_path / "silent"
    silent.mkdir()
    index = json.loads((folders["2.0"] / "model_index.json").read_text())
    (silent / "model_index.json").write_text(json.dumps(index | {"audio_vae": [None, None]}))
    with pytest.raises(ValueError, match=r"(transformer|scheduler): not found in .*silent"):
        LTX2(silent)
    older = index | {"_class_name": "LTXPipeline", "transformer": ["diffusers", "LTXVideo"]}
    (silent / "model_index.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match="LTX-2 pipeline with sound, got LTXPipeline"):
        LTX2(silent)


# --- encoding -------------------------------------------------------------------------------------


def test_latents_are_what_the_pipeline_starts_from(model):
    """The pipeline normalises and packs raw latents itself; it must come to the same."""
    clip = random_clip()
    sample = model.encode(clip, PROMPT)
    model.check_latents(sample)
    pipeline = model.parts.pipeline("vae", "audio_vae")
    with torch.no_grad():
        pictures = clip.video.movedim(-1, 0)[None].float() / 255 * 2 - 1
        video = pipeline.vae.encode(pictures).latent_dist.mode()
        mel = log_mel(clip.audio, pipeline.audio_vae.config)
        audio = pipeline.audio_vae.encode(mel[None]).latent_dist.mode()
    video = pipeline.prepare_latents(latents=video, dtype=torch.float32, device="cpu")
    audio = pipeline.prepare_audio_latents(latents=audio, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(sample["video"], video[0])
    torch.testing.assert_close(sample["audio"], audio[0, : len(sample["audio"])])
    assert len(sample["audio"]) == round(17 / 24 * 25)


def test_log_mel_is_slaneys(newest):
    librosa = pytest.importorskip("librosa", reason="the [eval] extra holds the other mel")
    audio = random_clip().audio
    expected = librosa.feature.melspectrogram(
        y=audio.numpy(), sr=16000, n_fft=1024, hop_length=160, n_mels=8, power=1.0,
        pad_mode="reflect",
    )  # fmt: skip
    expected = torch.from_numpy(expected).clamp(min=1e-5).log().mT
    found = log_mel(audio, newest.parts["audio_vae"].config)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_text_features_through_the_connectors_are_the_encoded_text(model):
    """What other trainers cache is the connectors' input; `velocity` runs the rest."""
    connectors, features = model.parts["connectors"], {}
    hooks = [
        getattr(connectors, f"{stream}_connector").register_forward_pre_hook(
            lambda _, arguments, stream=stream: features.update({stream: arguments})
        )
        for stream in ("video", "audio")
    ]
    expected = model.conditions([PROMPT, "x"])
    for hook in hooks:
        hook.remove()
    found = model._connect({
        "video_features": features["video"][0],
        "audio_features": features["audio"][0],
        "text_mask": features["video"][1][:, 0, 0] == 0,
    })  # fmt: skip
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


# --- the transformer ------------------------------------------------------------------------------


def test_velocities_are_those_of_the_pipelines_own_step(model):
    calls = []
    transformer = model.transformer
    hook = transformer.register_forward_hook(
        lambda _, arguments, named, output: calls.append((named, output)), with_kwargs=True
    )
    list(model.generate([PROMPT], torch.tensor([0]), steps=3, **UNGUIDED))
    hook.remove()
    assert len(calls) == 3
    conditions = model.conditions([PROMPT])
    for named, expected in calls:
        sigma = named["timestep"] / 1000
        noisy = (named["hidden_states"], named["audio_hidden_states"])
        with torch.no_grad():
            found = model.velocity(transformer, noisy, (sigma, sigma), conditions)
        for stream, velocity in zip(found, expected, strict=True):
            assert relative_error(stream, velocity) < 1e-6


def test_each_stream_has_its_own_sigma(model):
    """As the transformer itself treats a noise level for each token."""
    (video, audio), conditions = batch_of(model.encode(random_clip(), PROMPT))
    sigma = (torch.tensor([0.3]), torch.tensor([0.8]))
    frames, rows, columns = model.latent_size
    with torch.no_grad():
        found = model.velocity(model.transformer, (video, audio), sigma, conditions)
        expected = model.transformer(
            hidden_states=video, audio_hidden_states=audio,
            encoder_hidden_states=conditions["video_text"],
            audio_encoder_hidden_states=conditions["audio_text"],
            timestep=torch.full((1, video.shape[1]), 300.0),
            audio_timestep=torch.full((1, audio.shape[1]), 800.0),
            sigma=torch.tensor([300.0]), audio_sigma=torch.tensor([800.0]),
            use_cross_timestep=model.config["cross_attn_mod"],
            num_frames=frames, height=rows, width=columns, fps=24.0,
            audio_num_frames=audio.shape[1], return_dict=False,
        )  # fmt: skip
        swapped = model.velocity(model.transformer, (video, audio), sigma[::-1], conditions)
    for stream, one, other in zip(found, expected, swapped, strict=True):
        assert relative_error(stream, one) < 1e-5
        assert relative_error(stream, other) > 1e-3


def test_training_loads_the_transformer_alone(folders, newest):
    (video, audio), conditions = batch_of(newest.encode(random_clip(), PROMPT))
    model = LTX2(folders["2.5"], **SIZE)
    sigma = torch.full((1,), 0.5)
    model.velocity(model.transformer, (video, audio), (sigma, sigma), conditions)
    assert set(model.parts._loaded) == {"transformer"}
    assert all(parameter.requires_grad for parameter in model.transformer.parameters())


def test_lora_loads_into_the_pipeline(folders, tmp_path, newest):
    (video, audio), conditions = batch_of(newest.encode(random_clip(), PROMPT))
    sigma = torch.full((1,), 0.5)
    model = LTX2(folders["2.5"], **SIZE)
    transformer = model.transformer
    base = model.velocity(transformer, (video, audio), (sigma, sigma), conditions)
    targets = list(model.lora_targets)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    names = {
        name.split(".lora_")[0] for name, _ in transformer.named_parameters() if "lora" in name
    }
    assert {name.split(".")[2] for name in names} >= {
        "attn1", "audio_attn1", "audio_to_video_attn", "video_to_audio_attn",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    trained = model.velocity(transformer, (video, audio), (sigma, sigma), conditions)
    model.save_weights(tmp_path, get_peft_model_state_dict(transformer))

    pipeline = LTX2Pipeline.from_pretrained(folders["2.5"])
    pipeline.load_lora_weights(tmp_path)
    again = LTX2(folders["2.5"], **SIZE)
    again.load_weights(tmp_path)
    for loaded in (pipeline.transformer, again.transformer):
        found = model.velocity(loaded, (video, audio), (sigma, sigma), conditions)
        for stream, one, other in zip(found, trained, base, strict=True):
            torch.testing.assert_close(stream, one)
            assert relative_error(stream, other) > 1e-3


def test_the_shipped_settings_load():
    config = load_config(CONFIGS / "ltx2_lora.yaml")
    assert (config.lora_rank, config.normalize, config.gradient_checkpointing) == (32, True, True)
    for path in CONFIGS.glob("*_gpu*.yaml"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_config_from_file(str(path)).mixed_precision == "bf16"


# --- noise levels ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "shift"), [(126, 0.6285), (1024, 0.95), (4096, 2.05), (6144, 2.7833)]
)
def test_shift_is_linear_in_the_tokens_as_the_trainer_has_it(newest, tokens, shift):
    assert newest._shift(tokens) == pytest.approx(shift, abs=1e-4)


def test_shift_is_bounded_where_asked(folders):
    bounded = LTX2(folders["2.0"], shift_bound=4096)  # 121 pictures at 768x512: 6,144 tokens
    assert bounded._shift(6144) == bounded._shift(4096) == pytest.approx(2.05)
    free = LTX2(folders["2.0"])
    low, high = (
        model.draw_sigma(4096, torch.Generator().manual_seed(0))[0].mean()
        for model in (bounded, free)
    )
    assert high > low + 0.03


@pytest.mark.parametrize("shift", [0.95, 2.05])
def test_sigmas_are_distributed_as_published(shift):
    """Against the distribution function in closed form; 5 standard errors at 200,000 draws."""
    count = 200_000
    drawn = draw_sigma(count, shift, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 1e-3
    assert drawn.max() <= 1
    low, high = (1 / (1 + math.exp(-shift - z)) for z in (-2.5758, 3.0902))

    def stretched(level):
        before = low + level * (high - low)
        if before <= 0:
            return 0.0
        return torch.special.ndtr(torch.tensor(math.log(before / (1 - before)) - shift)).item()

    for level in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        # What falls below 0.001 is reflected there.
        normal = stretched(level) - stretched(2e-3 - level)
        expected = 0.9 * normal + 0.1 * (level - 1e-3) / (1 - 1e-3)
        error = math.sqrt(expected * (1 - expected) / count)
        assert (drawn < level).float().mean().item() == pytest.approx(expected, abs=5 * error)


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_sigmas_of_both_streams(folders, kind):
    model = LTX2(folders["2.0"], **SIZE, sigma=kind)
    draws = [model.draw_sigma(64, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    video, audio = draws[0]
    assert video.shape == audio.shape == (64,)
    assert torch.equal(video, audio) == (kind == "shared")


# --- sampling -------------------------------------------------------------------------------------


def test_clips_are_the_pipelines_own(model):
    """With its own guidance and number of steps; bit for bit, but for the pictures' rounding."""
    seed, options = torch.tensor([5]), {"height": 64, "width": 96, "num_frames": 17}
    [found] = model.generate([PROMPT], seed)
    pipeline = model.parts.pipeline(*model.parts._loaded)
    video, audio = pipeline(
        PROMPT, **options, frame_rate=24.0, generator=torch.Generator().manual_seed(5),
        use_cross_timestep=model.config["cross_attn_mod"], output_type="np", return_dict=False,
    )  # fmt: skip
    assert found.video.shape == (17, 64, 96, 3)
    assert found.sample_rate == pipeline.vocoder.config.output_sampling_rate
    difference = found.video.float() - torch.from_numpy(video[0]) * 255
    assert difference.abs().max() < 0.52
    assert torch.equal(found.audio, audio[0].float().clamp(-1, 1))


def test_clips_follow_seed_caption_and_guidance(newest):
    captions, seeds = [PROMPT, PROMPT, PROMPT, "rain"], torch.tensor([0, 0, 1, 0])
    clips = list(newest.generate(captions, seeds, steps=2, **UNGUIDED))
    assert torch.equal(clips[0].video, clips[1].video)
    assert torch.equal(clips[0].audio, clips[1].audio)
    for other in clips[2:]:
        assert not torch.equal(clips[0].audio, other.audio)
    stronger = UNGUIDED | {"audio_guidance_scale": 4.0}
    [guided] = newest.generate([PROMPT], seeds[:1], steps=2, **stronger)
    [away] = newest.generate([PROMPT], seeds[:1], steps=2, negative_prompt="rain", **stronger)
    assert not torch.equal(clips[0].audio, guided.audio)
    assert not torch.equal(guided.audio, away.audio)


# --- caches ---------------------------------------------------------------------------------------


def test_prepared_clips_open_for_the_model_that_made_them(folders, tmp_path):
    (tmp_path / "clips").mkdir()
    for index in range(2):
        write_clip(tmp_path / "clips" / f"{index}.mp4", random_clip(index))
    model = load_model(str(folders["2.3"]), **SIZE)
    cache = tmp_path / "cache"
    summary = prepare(model, tmp_path / "clips", cache, captions={}, progress=False)
    assert (summary.made, len(summary.without_caption)) == (2, 2)

    fresh = load_model(str(folders["2.3"]))  # its format is the cache's, whatever its default
    data = open_latents(cache, fresh)
    assert fresh.clip_format == model.clip_format
    assert len(data) == 2
    fresh.check_latents(data[1])
    with pytest.raises(ValueError, match=r"connectors is .* in the cache"):
        LatentDataset(cache, LTX2(folders["2.0"], **SIZE).identity())
    fresh.config["in_channels"] = 16
    with pytest.raises(ValueError, match=r"video: expected \[tokens, channels\] of \[18, 16\]"):
        open_latents(cache, fresh)
