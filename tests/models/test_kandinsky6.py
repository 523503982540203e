import json
import math
import shutil

import pytest
import torch
from diffusers import Kandinsky6TI2VAPipeline, Kandinsky6Transformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_kandinsky6 import CHANNELS, INDEX, SOUNDS, save_tiny_kandinsky6
from torch import nn

from syncdpo import ops
from syncdpo.data.clips import Clip
from syncdpo.models import load_model
from syncdpo.models.kandinsky6 import FPS, Kandinsky6
from syncdpo.models.kandinsky6_parts import IDLE, PreciseModulation, TextProcessor
from syncdpo.models.noise_levels import draw_sigma
from syncdpo.models.quantised import quantisable
from syncdpo.models.weights import COMFYUI_LORA, LORA
from syncdpo.training.offload import offload_blocks

SIZE = {"frames": 17, "height": 32, "width": 48}
PROMPT = "a ball strikes the floor"
LATENTS, SOUND_LATENTS = 5 * 4 * 6, 31
UNGUIDED = {"guidance_scale": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_kandinsky6(tmp_path_factory.mktemp("kandinsky6"))


@pytest.fixture(scope="module")
def piflow(tmp_path_factory):
    return save_tiny_kandinsky6(tmp_path_factory.mktemp("piflow"), piflow=4)


@pytest.fixture(scope="module")
def model(folder) -> Kandinsky6:
    return Kandinsky6(folder, **SIZE)


@pytest.fixture(scope="module")
def sample(model):
    return model.encode(random_clip(), PROMPT)


@pytest.fixture
def fresh(folder) -> Kandinsky6:
    return Kandinsky6(folder, **SIZE)


def random_clip(seed: int = 0) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    shape = (SIZE["frames"], SIZE["height"], SIZE["width"], 3)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    audio = 0.2 * torch.rand(1, round(SIZE["frames"] / 24 * 44100), generator=generator) - 0.1
    return Clip(video, FPS, audio, 44100)


def batch_of(sample: dict):
    conditions = {name: tensor[None] for name, tensor in sample.items()}
    return (conditions.pop("video"), conditions.pop("audio")), conditions


def relative_error(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def copy_with(folder, target, index=None, **configs):
    """A copy of a pipeline on disk with other entries in its index, or settings of components."""
    shutil.copytree(folder, target)
    (target / "model_index.json").write_text(json.dumps(INDEX | (index or {})))
    for part, changes in configs.items():
        path = next((target / part).glob("*config.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


# --- which family ---------------------------------------------------------------------------------


def test_the_family_is_the_checkpoints_class_not_its_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "LTX-2")
    assert isinstance(load_model(str(tmp_path / "LTX-2")), Kandinsky6)


@pytest.mark.parametrize(
    ("transformer", "message"),
    [
        (["diffusers", "Kandinsky6SRTransformer3DModel"],
         r"expected a pipeline of LTX-2 or Kandinsky 6 \(transformer .*\), got "
         r"Kandinsky6TI2VAPipeline with Kandinsky6SRTransformer3DModel in"),
        ([None, None], "got Kandinsky6TI2VAPipeline with no transformer in"),
    ],
)  # fmt: skip
def test_a_class_that_no_family_has_is_refused(folder, tmp_path, transformer, message):
    other = copy_with(folder, tmp_path / "other", {"transformer": transformer})
    with pytest.raises(ValueError, match=message):
        load_model(str(other))


def test_nothing_is_refused_by_what_could_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"folder or hub id of a diffusers pipeline, LTX-2 or Kan"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="hub id of a diffusers Kandinsky 6 pipeline"):
        Kandinsky6(tmp_path)


@pytest.mark.parametrize("option", ["text_encoder", "video_vae", "audio_vae", "shift_bound"])
def test_options_of_ltx2_are_refused(folder, option):
    with pytest.raises(ValueError, match=rf"^{option}: for LTX-2 alone, Kandinsky 6 has none"):
        load_model(str(folder), **{option: 4096})
    load_model(str(folder), **{option: None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 16}, "frames: expected a multiple of 4 plus 1, got 16"),
        ({"height": 40}, "height: expected a multiple of 16, got 40"),
        ({"width": 24}, "width: expected a multiple of 16, got 24"),
        ({"fps": 25}, "fps: expected 24, as Kandinsky 6 counts latents and not seconds, got 25"),
        ({"fps": 0}, "fps: expected more than 0, got 0"),
        ({"frames": 513}, "frames: expected at most 509, which Kandinsky 6 has positions for"),
        ({"width": 4096}, "width: expected at most 2048, which Kandinsky 6 has positions for"),
        ({"sigma": "separate"}, r"sigma: expected shared \(--sigma shared\), as Kandinsky 6 has"),
        ({"text_encoder_precision": "int4"}, "text_encoder_precision: expected bf16, fp8"),
    ],
)
def test_bad_formats_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Kandinsky6(folder, **SIZE | options)


def test_the_largest_clip_has_positions(folder):
    model = Kandinsky6(folder, frames=509, height=16, width=2048)
    transformer = model.transformer
    assert transformer.visual_rope_embeddings.angles_0.shape[0] == 128
    assert model.latent_size == (128, 2, 256)
    assert model.timelines[1].frames <= len(transformer.audio_rope_embeddings.angles)


def test_a_pipeline_without_sound_is_refused(folder, tmp_path):
    silent = copy_with(folder, tmp_path / "silent", {"audio_vae": [None, None]})
    with pytest.raises(ValueError, match="expected Kandinsky 6 with sound, got a pipeline without"):
        Kandinsky6(silent)
    mute = copy_with(folder, tmp_path / "mute", {"vocoder": [None, None]})
    model = Kandinsky6(mute)  # which training and `prepare` do without
    with pytest.raises(ValueError, match=r"^vocoder: .* has none"):
        model.check_generation([PROMPT])


# --- formats and identity -------------------------------------------------------------------------


def test_default_format_is_five_seconds_as_published(folder):
    model = Kandinsky6(folder)
    video, audio = model.timelines
    assert (video.frames, video.tokens, video.rate, video.first, video.stride) == (
        31, 64 * 96, 6, 1, 4,
    )  # fmt: skip
    assert (audio.frames, audio.first, audio.stride) == (218, 1, 1)
    assert audio.rate == 44100 / 1024
    assert model.transformer_tokens == (31 * 32 * 48, 218)


@pytest.mark.parametrize("frames", [1, 5, 17, 97, 121, 125, 241])
def test_latents_are_as_many_as_the_pipeline_makes(model, frames, monkeypatch):
    """Of both streams, by its own arithmetic; it stops before it denoises."""
    pipeline = model.parts.pipeline(*model.parts.layout.needed)
    seen = {}

    def noted(batch, channels, length, *_):
        seen["audio"] = length
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prepare_audio_latents", noted)
    with pytest.raises(KeyboardInterrupt):
        pipeline(PROMPT, height=32, width=48, num_frames=frames, **UNGUIDED)
    model.set_format(frames, 32, 48, 24)
    assert model.timelines[1].frames == seen["audio"]
    model.set_format(**SIZE, fps=24)


def test_identity_follows_the_encoders_and_not_the_transformer(folder, tmp_path, model):
    other = save_tiny_kandinsky6(tmp_path / "other", seed=1)
    identity = model.identity()
    for part in ("vae", "audio_vae", "text_encoder", "text_encoder_2", "transformer", "vocoder"):
        mixed = tmp_path / part
        shutil.copytree(folder, mixed)
        shutil.rmtree(mixed / part)
        shutil.copytree(other / part, mixed / part)
        found = Kandinsky6(mixed, **SIZE).identity()
        differing = {key for key in identity if identity[key] != found[key]}
        assert differing == {part} - {"transformer", "vocoder"}
    assert json.loads(json.dumps(identity)) == identity
    assert identity["model"] == "kandinsky6"


def test_latents_of_another_model_are_refused(model, sample):
    model.check_latents(sample)
    for name, tensor in sample.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected .* got \[1"):
            model.check_latents(sample | {name: tensor[None][:1]})
    with pytest.raises(ValueError, match=r"text_mask: expected .* got nothing"):
        model.check_latents({n: t for n, t in sample.items() if n != "text_mask"})


# --- encoding -------------------------------------------------------------------------------------


def test_latents_are_what_the_pipeline_decodes(model, sample):
    """Scaled by each VAE's own factor, in the layout that the transformer takes."""
    vae, audio_vae = model.parts["vae"], model.parts["audio_vae"]
    clip = random_clip()
    pictures = clip.video.movedim(-1, 0)[None].float() / 255 * 2 - 1
    with torch.no_grad():
        video = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
        # All that the clip's own samples decide: 30.5 latents of sound are in it.
        audio = audio_vae.encode(clip.audio[:, : 30 * 1024]).latent_dist.mode()
    assert sample["video"].shape == (LATENTS, CHANNELS)
    assert sample["audio"].shape == (SOUND_LATENTS, SOUNDS)
    torch.testing.assert_close(
        sample["video"].unflatten(0, model.latent_size).movedim(-1, 0), video[0]
    )
    scaled = audio[0].mT * audio_vae.config.scaling_factor
    # The mid block attends to everything, so the end tells on the beginning a little.
    assert relative_error(sample["audio"][:20], scaled[:20]) < 0.05


def test_a_step_of_the_pipeline_from_almost_no_noise_is_the_clip(model, sample):
    """x_σ at σ = 10⁻⁶, one Euler step by the pipeline, its decoders: what the latents decode to."""
    sigma, (video, audio) = 1e-6, (sample["video"][None], sample["audio"][None])
    generator = torch.Generator().manual_seed(0)
    noisy = [
        (1 - sigma) * x + sigma * torch.randn(x.shape, generator=generator) for x in (video, audio)
    ]
    pipeline = model.parts.pipeline(*model.parts.layout.needed)
    shift = pipeline.scheduler.config.shift
    frames, sound = pipeline(
        PROMPT, **{"height": 32, "width": 48}, num_frames=17, frame_rate=24.0,
        sigmas=[sigma / (shift - (shift - 1) * sigma)],
        latents=noisy[0].unflatten(1, model.latent_size).movedim(-1, 1),
        audio_latents=noisy[1].mT, output_type="np", return_dict=False, **UNGUIDED,
    )  # fmt: skip
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([sigma, 0])
    [expected] = model.decode(video, audio)
    assert (torch.from_numpy(frames[0]) * 255 - expected.video).abs().max() < 1.1
    assert relative_error(torch.from_numpy(sound), expected.audio) < 0.02
    # As the VAE takes the pictures back, by its own functions.
    vae = model.parts["vae"]
    pictures = random_clip().video.movedim(-1, 0)[None].float() / 127.5 - 1
    with torch.no_grad():
        again = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    again = ((again[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (again - expected.video).abs().max() <= 1


def test_sound_is_decoded_within_5_ms_of_its_place(folder):
    """Knocks through `encode` and `decode`: the centre of the energy that each adds.

    Filters are made the same to either side, so that only padding, hops and cropping place it.
    Random weights do not tell where within a latent a knock was, so it is the mean over places
    all through a latent that is measured; a mel frame of 11.6 ms too many would show.
    """
    model = Kandinsky6(folder, **SIZE)
    codec, vocoder = model.parts["audio_vae"], model.parts["vocoder"]
    for module in (*codec.modules(), *vocoder.modules()):
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            module.weight.data = (module.weight.data + module.weight.data.flip(-1)) / 2
    for half in (codec.vae.encoder, codec.vae.decoder):
        half.mid.attn_1.proj_out.weight.data.zero_()  # which looks everywhere
    picture = model.encode(random_clip(), PROMPT)["video"][None]

    def through(audio):
        latents = model._encode_audio(Clip(random_clip().video, FPS, audio, 44100))[None]
        [decoded] = model.decode(picture, latents)
        assert decoded.audio.shape == (1, SOUND_LATENTS * 1024)
        return decoded.audio[0]

    silence = torch.zeros_like(random_clip().audio)
    nothing = through(silence)
    errors = []
    for place in range(14 * 1024, 16 * 1024, 256):
        knock = silence.clone()
        knock[:, place - 32 : place + 32] = 0.5
        energy = (through(knock) - nothing).square()
        centre = (energy * torch.arange(len(energy))).sum() / energy.sum()
        errors.append((centre - place) / 44100)
    errors = torch.stack(errors)
    assert errors.mean().abs() < 2e-3
    assert errors.abs().max() < 1024 / 44100


def test_the_end_of_the_sound_is_no_click(model):
    """The last latent reaches beyond the clip: what fills it is the sound's own end, mirrored."""
    video, vae = random_clip().video, model.parts["audio_vae"]
    times, own = torch.arange(SOUND_LATENTS * 1024) / 44100, random_clip().audio.shape[1]
    errors = []
    for hertz in (100, 130, 170, 220, 290, 370, 480, 620):
        longer = 0.5 * torch.cos(2 * math.pi * hertz * times)[None]
        cut_off = longer * (torch.arange(len(times)) < own)
        found = model.encode(Clip(video, FPS, longer[:, :own], 44100), PROMPT)["audio"][-1]
        with torch.no_grad():
            going_on, silent = (
                vae.encode(sound).latent_dist.mode()[0, :, -1] * vae.config.scaling_factor
                for sound in (longer, cut_off)
            )
        errors.append([(x - going_on).norm() for x in (found, silent)])
    mirrored, silent = torch.tensor(errors).mean(0)
    assert mirrored < 0.6 * silent


def test_the_text_is_what_qwens_whole_processor_makes_of_it(folder, model):
    """Its template, crop and padding, with a caption that is too long and one like the template."""
    pytest.importorskip("torchvision", reason="the whole processor prepares films, too")
    captions = [PROMPT, "<|im_start|>x", "y" * 1500]
    pipeline = Kandinsky6TI2VAPipeline.from_pretrained(folder)
    assert type(pipeline.tokenizer).__name__ == "Qwen2_5_VLProcessor"
    text, pooled, mask, *_ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    found = model.conditions(captions)
    torch.testing.assert_close(found["text"], text, rtol=0, atol=0)
    torch.testing.assert_close(found["pooled_text"], pooled, rtol=0, atol=0)
    assert torch.equal(found["text_mask"], mask)


def test_a_caption_without_padding_has_a_whole_mask(model):
    """For which the pipeline has none, so that batches have one shape."""
    found = model.conditions(["y" * 1500])
    assert found["text_mask"].all()
    assert found["text_mask"].shape == (1, 1024)
    with pytest.raises(ValueError, match="expected text alone"):
        TextProcessor(None)(["x"], images=[1])


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
        noisy = named["hidden_states"][..., :CHANNELS].flatten(1, 3), named["audio_hidden_states"]
        with torch.no_grad():
            found = model.velocity(transformer, noisy, (sigma, sigma), conditions)
        assert relative_error(found[0], expected[0].flatten(1, 3)) < 1e-6
        assert relative_error(found[1], expected[1]) < 1e-6


def test_a_perfect_velocity_takes_the_pipeline_back_to_the_clip(model, sample, monkeypatch):
    """Of our noising, (1−σ)x + σε, and our sign: its scheduler returns x from ε, in its own loop;
    and what it passes through on the way is our noising at its σ."""
    clean = (sample["video"][None], sample["audio"][None])
    seed, pipeline = torch.tensor([7]), model.parts.pipeline(*model.parts.layout.needed)
    noise = [ops.noise(x.shape, seed, stream=m) for m, x in enumerate(clean)]
    velocity = [model.velocity_sign * (e - x) for e, x in zip(noise, clean, strict=True)]
    passed = []

    def perfect(hidden_states, audio_hidden_states, timestep, **_):
        passed.append((timestep / 1000, hidden_states[..., :CHANNELS], audio_hidden_states))
        return velocity[0].unflatten(1, model.latent_size), velocity[1]

    monkeypatch.setattr(model.transformer, "forward", perfect)
    video, audio = pipeline(
        PROMPT, **{"height": 32, "width": 48}, num_frames=17, num_inference_steps=6,
        latents=noise[0].unflatten(1, model.latent_size).movedim(-1, 1),
        audio_latents=noise[1].mT, output_type="latent", return_dict=False, **UNGUIDED,
    )  # fmt: skip
    torch.testing.assert_close(video.movedim(1, -1).flatten(1, 3), clean[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(audio.mT, clean[1], rtol=0, atol=2e-6)
    assert len(passed) == 6
    for sigma, *streams in passed:
        noisy = ops.paired_noise(clean, (None, None), sigma, seed)
        for stream, found in zip(streams, noisy, strict=True):
            torch.testing.assert_close(
                stream.reshape(found[:1].shape), found[:1], rtol=0, atol=2e-6
            )


def test_the_text_to_video_task_has_empty_conditioning(model, sample):
    seen = {}

    def noted(**arguments):
        seen.update(arguments)
        return model.transformer(**arguments)

    noisy, conditions = batch_of(sample)
    sigma = torch.tensor([0.25])
    with torch.no_grad():
        model.velocity(noted, noisy, (sigma, sigma), conditions)
    given = seen["hidden_states"]
    assert given.shape == (1, *model.latent_size, 2 * CHANNELS + 1)
    assert torch.equal(given[..., :CHANNELS].flatten(1, 3), noisy[0])
    assert not given[..., CHANNELS:].any()
    assert seen["timestep"].tolist() == [250.0]
    assert "visual_token_type_ids" not in seen


def test_a_transformer_without_conditioning_takes_the_latents_alone(tmp_path, sample):
    bare = {"visual_cond": False, "visual_token_type_num_embeddings": 0}
    model = Kandinsky6(save_tiny_kandinsky6(tmp_path, **bare), **SIZE)
    noisy, conditions = batch_of(sample)
    sigma = torch.tensor([0.25])
    found = model.velocity(model.transformer, noisy, (sigma, sigma), conditions)
    assert [x.shape for x in found] == [x.shape for x in noisy]


def test_padding_of_the_text_changes_nothing(model, sample):
    (noisy, conditions), sigma = batch_of(sample), torch.tensor([0.5])
    others = conditions["text"].clone()
    others[~conditions["text_mask"]] = 9.0
    with torch.no_grad():
        found, expected = (
            model.velocity(model.transformer, noisy, (sigma, sigma), conditions | {"text": text})
            for text in (others, conditions["text"])
        )
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-5


def test_training_loads_the_transformer_alone(fresh, sample):
    noisy, conditions = batch_of(sample)
    sigma = torch.full((1,), 0.5)
    fresh.velocity(fresh.transformer, noisy, (sigma, sigma), conditions)
    assert set(fresh.parts._loaded) == {"transformer"}
    frozen = {n for n, p in fresh.transformer.named_parameters() if not p.requires_grad}
    assert frozen == {f"{IDLE}.weight"}  # of the reference picture in image-to-video


def test_every_trained_weight_gets_a_gradient(fresh, sample):
    """Or several processes would wait for it."""
    noisy, conditions = batch_of(sample)
    sigma = torch.full((1,), 0.5)
    outputs = fresh.velocity(fresh.transformer, noisy, (sigma, sigma), conditions)
    sum(x.square().sum() for x in outputs).backward()
    without = [n for n, p in fresh.transformer.named_parameters() if p.grad is None]
    assert without == [f"{IDLE}.weight"]


def test_what_serves_the_sound_alone_leaves_the_picture_of_the_last_block(fresh, sample):
    """There nothing of the sound's goes back to the picture: exactly these have no gradient of it,
    but for the modulations, which serve both, and how the picture attends to the sound."""
    noisy, conditions = batch_of(sample)
    sigma = torch.full((1,), 0.5)
    video, _ = fresh.velocity(fresh.transformer, noisy, (sigma, sigma), conditions)
    video.square().sum().backward()
    last = "visual_transformer_blocks.1."
    for name, parameter in fresh.transformer.named_parameters():
        if "av_cross_attention" in name and name.startswith(last):
            assert fresh.of_audio(name)
            assert parameter.grad is None or not parameter.grad.any(), name
        if any(part in name for part in ("va_cross", "video_", "av_modulation", "va_modulation")):
            assert not fresh.of_audio(name), name
        if "av_modulation" in name:  # whose gate is the picture's
            assert parameter.grad.any()
    heard = [n for n, _ in fresh.transformer.named_parameters() if fresh.of_audio(n)]
    assert {name.split(".")[0] for name in heard} == {
        "audio_embeddings", "audio_out_layer", "audio_time_embeddings", "audio_text_embeddings",
        "audio_pooled_text_embeddings", "audio_text_transformer_blocks",
        "visual_transformer_blocks",
    }  # fmt: skip


def test_autocast_rounds_no_modulation(fresh):
    """They are computed in their weights' precision, float32 where all weights are trained."""
    block = fresh.transformer.visual_transformer_blocks[0]
    modulation = block.video_dec_block.visual_modulation
    assert isinstance(modulation, PreciseModulation)
    x = torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, time = modulation(x), fresh.transformer.video_time_embeddings(torch.tensor([500.0]))
    assert found.dtype == time.dtype == torch.float32
    torch.testing.assert_close(found, modulation(x), rtol=0, atol=0)


def test_what_is_quantised_and_offloaded_are_its_blocks(fresh):
    names = quantisable(fresh.transformer)
    assert {name.split(".")[0] for name in names} == {
        "visual_transformer_blocks", "video_text_transformer_blocks",
        "audio_text_transformer_blocks",
    }  # fmt: skip
    assert not [name for name in names if "modulation" in name]
    transformer = fresh.transformer.requires_grad_(False)
    arguments = {
        "hidden_states": torch.randn(1, 2, 2, 2, 2 * CHANNELS + 1),
        "audio_hidden_states": torch.randn(1, 5, SOUNDS),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    expected = transformer(**arguments)
    offload_blocks(transformer, torch.device("cpu"))
    for one, other in zip(transformer(**arguments), expected, strict=True):
        assert torch.equal(one, other)


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory, sample):
    """A LoRA with all its matrices, saved: (its folder, velocities with it, without it)."""
    noisy, conditions = batch_of(sample)
    sigma = torch.full((1,), 0.5)
    model = Kandinsky6(folder, **SIZE)
    transformer = model.transformer
    with torch.no_grad():
        base = model.velocity(transformer, noisy, (sigma, sigma), conditions)
    transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=_targeted(transformer, model.lora_targets))
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        trained = model.velocity(transformer, noisy, (sigma, sigma), conditions)
    target = tmp_path_factory.mktemp("lora")
    model.save_weights(target, get_peft_model_state_dict(transformer))
    return target, trained, base


def _targeted(transformer, targets):
    ends = tuple(f".{target}" for target in targets)
    return [name for name, _ in transformer.named_modules() if name.endswith(ends)]


def test_targets_are_both_streams_and_their_attentions(model):
    names = _targeted(model.transformer, model.lora_targets)
    places = {name.removeprefix("visual_transformer_blocks.0.") for name in names if ".0." in name}
    expected = {
        f"{attention}.{projection}"
        for attention in (
            "video_dec_block.self_attention", "video_dec_block.cross_attention",
            "audio_dec_block.self_attention", "audio_dec_block.cross_attention",
            "va_cross_attention", "av_cross_attention",
        )
        for projection in ("to_query", "to_key", "to_value", "out_layer")
    }  # fmt: skip
    assert places == expected
    assert len(names) == 2 * len(expected)


def test_a_lora_loads_into_a_fresh_pipeline_and_into_ours(folder, lora, sample, model):
    target, trained, base = lora
    noisy, conditions = batch_of(sample)
    sigma = torch.full((1,), 0.5)
    theirs = Kandinsky6Transformer3DModel.from_pretrained(folder / "transformer")
    theirs.load_lora_adapter(target, weight_name=LORA)
    ours = [Kandinsky6(folder, **SIZE) for _ in range(2)]
    ours[0].load_weights(target)
    ours[1].load_weights(target / COMFYUI_LORA)
    for loaded in (theirs, *(other.transformer for other in ours)):
        with torch.no_grad():
            found = model.velocity(loaded, noisy, (sigma, sigma), conditions)
        for stream, one, other in zip(found, trained, base, strict=True):
            torch.testing.assert_close(stream, one)
            assert relative_error(stream, other) > 1e-3


def test_the_file_for_comfyui_has_the_names_of_its_own_model(lora, model):
    """ComfyUI's rule, written down: of every weight `diffusion_model.<name>.weight` that its model
    has, `diffusion_model.<name>` is a LoRA's key; and its Kandinsky 6 renames diffusers' weights by
    these replacements (comfyui/kandinsky6 of kandinskylab/kandinsky-6)."""
    renamed = {
        "visual_transformer_blocks.": "visual_blocks.", "audio_out_layer.": "audio_outLayer.",
        ".timestep_embedder.linear_1.": ".in_layer.", ".timestep_embedder.linear_2.": ".out_layer.",
        ".video_dec_block.": ".videoT.", ".audio_dec_block.": ".audioT.",
        ".feed_forward.net.0.proj.": ".feed_forward.in_layer.",
        ".feed_forward.net.2.": ".feed_forward.out_layer.", ".attn.": ".self_attention.",
    }  # fmt: skip
    known = {}
    for name, weight in model.transformer.state_dict().items():
        for theirs, own in renamed.items():
            name = name.replace(theirs, own)
        known[f"diffusion_model.{name.removesuffix('.weight')}"] = weight.shape
    tensors = load_file(lora[0] / COMFYUI_LORA)
    modules = {key.split(".lora_")[0] for key in tensors}
    assert modules <= known.keys()
    for module in modules:
        a, b = (tensors[f"{module}.lora_{half}.weight"] for half in "AB")
        assert (b @ a).shape == known[module]
    assert len(tensors) == len(load_file(lora[0] / LORA))


def test_a_lora_of_ltx2_is_refused(fresh, tmp_path):
    from safetensors.torch import save_file

    stray = {
        f"diffusion_model.transformer_blocks.0.attn1.to_q.lora_{half}.weight": torch.ones(2, 2)
        for half in "AB"
    }
    save_file(stray, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"nothing of the LoRA in .* belongs to this model"):
        fresh.load_weights(tmp_path / "x.safetensors")
    save_file(stray, tmp_path / "x.safetensors", metadata={"base_version": "2.3"})
    with pytest.raises(ValueError, match=r"made for LTX-2 of version 2.3, .* the model is version"):
        fresh.load_weights(tmp_path / "x.safetensors")


# --- noise levels ---------------------------------------------------------------------------------


def test_both_streams_have_one_sigma_shifted_as_the_scheduler_shifts(model):
    sigma, same = model.draw_sigma(4096, torch.Generator().manual_seed(0))
    assert torch.equal(sigma, same)
    assert sigma.shape == (4096,)
    plain = draw_sigma(4096, math.log(5.0), torch.Generator().manual_seed(0))
    assert torch.equal(sigma, plain)
    # sigmoid(z + log 5) is 5s / (1 + 4s) of s = sigmoid(z).
    z = torch.randn(100, dtype=torch.float64)
    s = torch.sigmoid(z)
    torch.testing.assert_close(torch.sigmoid(z + math.log(5)), 5 * s / (1 + 4 * s))


# --- sampling -------------------------------------------------------------------------------------


def test_clips_are_the_pipelines_own(model):
    seed = torch.tensor([5])
    [found] = model.generate([PROMPT], seed, steps=3)
    pipeline = model.parts.pipeline(*model.parts.layout.needed)
    video, audio = pipeline(
        PROMPT, height=32, width=48, num_frames=17, frame_rate=24.0, num_inference_steps=3,
        generator=torch.Generator().manual_seed(5), output_type="np", return_dict=False,
    )  # fmt: skip
    assert found.video.shape == (17, 32, 48, 3)
    assert (found.sample_rate, found.fps) == (44100, 24.0)
    assert (found.video.float() - torch.from_numpy(video[0]) * 255).abs().max() < 0.52
    assert torch.equal(found.audio, torch.from_numpy(audio).clamp(-1, 1))


def test_clips_follow_seed_caption_and_guidance(model):
    captions, seeds = [PROMPT, PROMPT, PROMPT, "rain"], torch.tensor([0, 0, 1, 0])
    clips = list(model.generate(captions, seeds, steps=2, guidance_scale=3.0))
    assert torch.equal(clips[0].audio, clips[1].audio)
    for other in clips[2:]:
        assert not torch.equal(clips[0].audio, other.audio)
    [away] = model.generate([PROMPT], seeds[:1], steps=2, guidance_scale=3.0, negative_prompt="x")
    assert not torch.equal(clips[0].audio, away.audio)
    with pytest.raises(ValueError, match="stg_scale: expected negative_prompt or guidance_scale"):
        next(model.generate([PROMPT], seeds[:1], stg_scale=1.0))
    with pytest.raises(ValueError, match="caption: expected text, which Kandinsky 6 generates"):
        model.check_generation([PROMPT, ""])


def test_given_pictures_get_a_sound(model, sample, monkeypatch):
    """The picture that comes out is the one given, whatever the seed; at every step it had the
    noise of its level; the sound is the model's, and hears the picture."""
    passed = []
    hook = model.transformer.register_forward_pre_hook(
        lambda _, arguments, named: passed.append(named), with_kwargs=True
    )
    other = model.encode(random_clip(3), PROMPT)
    video = torch.stack([sample["video"], other["video"]])
    seeds = torch.tensor([1, 1, 2])
    clips = list(model.generate([PROMPT] * 3, seeds, steps=4, video=video[[0, 1, 0]], **UNGUIDED))
    hook.remove()
    expected = model.decode(video, torch.stack([sample["audio"], other["audio"]]))
    for clip, decoded in zip(clips, (expected[0], expected[1], expected[0]), strict=True):
        assert (clip.video.float() - decoded.video.float()).abs().max() <= 1
    assert not torch.equal(clips[0].audio, clips[1].audio)
    assert not torch.equal(clips[0].audio, clips[2].audio)
    first, *_, last = (named["hidden_states"][0, ..., :CHANNELS] for named in passed[:4])
    sigma = passed[3]["timestep"] / 1000
    clean = sample["video"].unflatten(0, model.latent_size)
    torch.testing.assert_close(last, torch.lerp(clean, first, sigma.item()), rtol=0, atol=1e-6)
    # Fewer pictures than captions are shared in turn.
    shared = list(model.generate([PROMPT] * 2, seeds[:2], steps=2, video=video[:1], **UNGUIDED))
    assert torch.equal(shared[0].video, shared[1].video)


# --- PiFlow ---------------------------------------------------------------------------------------


def test_a_piflow_checkpoint_is_not_trained(piflow, sample):
    with pytest.raises(ValueError, match=r"is distilled, as its PiFlow, .* expected the full"):
        load_model(str(piflow), allow_distilled=False)
    model = Kandinsky6(piflow, **SIZE)
    noisy, conditions = batch_of(sample)
    sigma = torch.full((1,), 0.5)
    with pytest.raises(ValueError, match=r"predicts no velocity; .* --allow-distilled cannot"):
        model.velocity(model.transformer, noisy, (sigma, sigma), conditions)


def test_a_piflow_checkpoint_samples_without_guidance(piflow):
    model, asked = Kandinsky6(piflow, **SIZE), []
    pipeline = model.parts.pipeline(*model.parts.layout.needed)
    call = type(pipeline).__call__

    def watched(self, *arguments, **options):
        asked.append(options)
        return call(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipeline), "__call__", watched)
        list(model.generate([PROMPT], torch.tensor([0])))
        [clip] = model.generate([PROMPT], torch.tensor([0]), steps=2)
    assert [(a["guidance_scale"], a["num_inference_steps"]) for a in asked] == [(1.0, 16), (1.0, 2)]
    assert clip.audio.isfinite().all()


def test_distilled_by_name_or_by_its_outputs(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "Kandinsky-6.0-Lite-distill-5s")
    with pytest.raises(ValueError, match="is distilled, as its name says"):
        load_model(str(tmp_path / "Kandinsky-6.0-Lite-distill-5s"), allow_distilled=False)
    wide = {"transformer": {"out_visual_dim": 10 * CHANNELS}}
    widened = copy_with(folder, tmp_path / "wide", **wide)
    with pytest.raises(ValueError, match="is distilled, as its PiFlow"):
        load_model(str(widened), allow_distilled=False)
