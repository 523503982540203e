"""Against Lightricks' own code (`ltx-core`): from one file, it and this package make the same."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("ltx_core", reason="the [interop] extra holds Lightricks' own code")

from ltx_core.components.patchifiers import AudioPatchifier, VideoLatentPatchifier
from ltx_core.guidance.perturbations import BatchedPerturbationConfig
from ltx_core.loader.single_gpu_model_builder import SingleGPUModelBuilder
from ltx_core.model.audio_vae import AudioProcessor
from ltx_core.model.audio_vae import model_configurator as audio_models
from ltx_core.model.audio_vae.audio_vae import encode_audio
from ltx_core.model.transformer import model_configurator as transformers_
from ltx_core.model.transformer.modality import Modality
from ltx_core.model.video_vae import model_configurator as video_models
from ltx_core.text_encoders.gemma import embeddings_connector as connectors_
from ltx_core.text_encoders.gemma.embeddings_processor import EmbeddingsProcessor
from ltx_core.text_encoders.gemma.feature_extractor import (
    FeatureExtractorV1,
    FeatureExtractorV2,
)
from ltx_core.tools import AudioLatentTools, VideoLatentTools
from ltx_core.types import Audio, AudioLatentShape, VideoLatentShape
from tiny_lightricks import AUDIO, CONFIGS, PREFIX, VIDEO, save_lightricks, tensors
from tiny_ltx2 import AUDIO_CHANNELS, BINS, CHANNELS, LAYERS, TEXT

from syncdpo.data.clips import Clip
from syncdpo.models.ltx2 import LTX2, log_mel

FPS, SIZE = 24.0, {"frames": 17, "height": 64, "width": 96}
# Of ltx-core 1.0.0; what its class of 2.5 lacks, and how the same function is written without it.
UNKNOWN_25 = ("ff.net.0.proj.bias", "ff.net.2.bias", "keyframes_abs_pos_embedding")


@pytest.fixture(scope="module", params=list(CONFIGS))
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(version, tmp_path_factory):
    return save_lightricks(tmp_path_factory.mktemp("file") / f"{version}.safetensors", version)


@pytest.fixture(scope="module")
def model(path) -> LTX2:
    return LTX2(path, **SIZE)


def theirs(path, configurator, keys):
    """A module as Lightricks' own loader makes it from a file."""
    module = SingleGPUModelBuilder(
        model_path=str(path), model_class_configurator=configurator, model_sd_ops=keys
    ).build(device=torch.device("cpu"), dtype=torch.float32)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        assert not tensor.is_meta, name
    return module.eval()


def their_transformer(path, version, folder):
    """2.5's video feed-forward layers have no bias, which is one of zeros."""
    if version == "2.5":
        weights = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        name = "model.diffusion_model.transformer_blocks.{}.ff.net.{}.bias"
        for block in range(2):
            inner = weights[name.format(block, "0.proj").replace("bias", "weight")]
            outer = weights[name.format(block, "2").replace("bias", "weight")]
            weights[name.format(block, "0.proj")] = torch.zeros(len(inner))
            weights[name.format(block, "2")] = torch.zeros(len(outer))
        path = folder / "with_bias.safetensors"
        save_file(weights, path, metadata=metadata)
    return theirs(
        path, transformers_.LTXModelConfigurator, transformers_.LTXV_MODEL_COMFY_RENAMING_MAP
    )


def close(found: torch.Tensor, expected: torch.Tensor, limit: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert expected.norm() > 0.1 * expected.numel() ** 0.5  # nothing that vanishes is compared
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < limit, error


# --- names ----------------------------------------------------------------------------------------


def test_every_name_and_shape_is_that_of_lightricks_own_classes(version):
    """Of the files that all tests here read: the table in tiny_lightricks.py invents none."""
    config = CONFIGS[version]
    made = {
        PREFIX["transformer"]: transformers_.LTXModelConfigurator,
        "vae.encoder.": video_models.VideoEncoderConfigurator,
        "vae.decoder.": video_models.VideoDecoderConfigurator,
        "audio_vae.encoder.": audio_models.AudioEncoderConfigurator,
        "audio_vae.decoder.": audio_models.AudioDecoderConfigurator,
        "vocoder.": audio_models.VocoderConfigurator,
        "model.diffusion_model.video_embeddings_connector.": (
            connectors_.Embeddings1DConnectorConfigurator
        ),
        "model.diffusion_model.audio_embeddings_connector.": (
            connectors_.AudioEmbeddings1DConnectorConfigurator
        ),
    }
    expected = {}
    for prefix, configurator in made.items():
        for name, tensor in configurator.from_config(config).state_dict().items():
            whole = prefix + name
            for coder in ("encoder", "decoder"):  # of which both hold the statistics
                whole = whole.replace(f"{coder}.per_channel", "per_channel")
            expected[whole] = tuple(tensor.shape)
    found = {
        name: tuple(tensor.shape)
        for name, tensor in tensors(version).items()
        if not name.startswith("text_embedding_projection.")
    }
    if version == "2.5":
        found = {n: s for n, s in found.items() if not n.endswith(UNKNOWN_25)}
        expected = {
            n: s for n, s in expected.items() if not (n.endswith(UNKNOWN_25) and ".ff." in n)
        }
        found |= {n: s for n, s in expected.items() if n.endswith(UNKNOWN_25) and n in found}
    assert found.keys() ^ expected.keys() == {
        n for n in expected.keys() - found.keys() if version == "2.5" and ".audio_ff." in n
    }
    assert all(found[name] == expected[name] for name in found)


# --- sound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [8, 64])
def test_log_mel_is_the_audio_processors(bins):
    class Settings:
        sample_rate, mel_hop_length, mel_bins = 16000, 160, bins

    audio = 0.1 * torch.randn(2, 16001, generator=torch.Generator().manual_seed(0))
    processor = AudioProcessor(16000, bins, 160, 1024)
    expected = processor.waveform_to_mel(Audio(audio[None], 16000))[0]
    torch.testing.assert_close(log_mel(audio, Settings), expected, rtol=0, atol=1e-6)


def random_clip() -> Clip:
    generator = torch.Generator().manual_seed(0)
    shape = (SIZE["frames"], SIZE["height"], SIZE["width"], 3)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    audio = 0.1 * torch.randn(2, round(SIZE["frames"] / FPS * 16000), generator=generator)
    return Clip(video, FPS, audio, 16000)


@torch.no_grad()
def test_latents_of_sound_are_those_of_the_trainer(path, model):
    encoder = theirs(
        path,
        audio_models.AudioEncoderConfigurator,
        audio_models.AUDIO_VAE_ENCODER_COMFY_KEYS_FILTER,
    )
    clip = random_clip()
    expected = encode_audio(Audio(clip.audio[None], 16000), encoder)[0]
    found = model._encode_audio(clip)
    expected = expected.transpose(0, 1).flatten(1)[: len(found)]
    close(found, expected)


@torch.no_grad()
def test_sound_is_decoded_the_same(path, model):
    decoder = theirs(
        path,
        audio_models.AudioDecoderConfigurator,
        audio_models.AUDIO_VAE_DECODER_COMFY_KEYS_FILTER,
    )
    latents = torch.randn(1, AUDIO_CHANNELS, 9, BINS // 4, generator=torch.manual_seed(0))
    expected = decoder(latents)
    vae = model.parts["audio_vae"]
    packed = latents.transpose(1, 2).flatten(2) * vae.latents_std + vae.latents_mean
    raw = packed.unflatten(2, (AUDIO_CHANNELS, -1)).transpose(1, 2)
    close(vae.decode(raw).sample, expected)


@torch.no_grad()
def test_the_vocoder_makes_the_same_waveform(path, model):
    vocoder = theirs(path, audio_models.VocoderConfigurator, audio_models.VOCODER_COMFY_KEYS_FILTER)
    mel = torch.randn(1, 2, 12, 64, generator=torch.manual_seed(0))
    expected, found = vocoder(mel), model.parts["vocoder"](mel)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- pictures -------------------------------------------------------------------------------------


@torch.no_grad()
def test_latents_of_pictures_are_those_of_the_trainer(path, model):
    encoder = theirs(
        path, video_models.VideoEncoderConfigurator, video_models.VAE_ENCODER_COMFY_KEYS_FILTER
    )
    clip = random_clip()
    expected = encoder(clip.video.movedim(-1, 0)[None] / 127.5 - 1)
    expected = VideoLatentPatchifier(1).patchify(expected)[0]
    close(model._encode_video(clip), expected)


@torch.no_grad()
def test_pictures_are_decoded_the_same(path, model):
    decoder = theirs(
        path, video_models.VideoDecoderConfigurator, video_models.VAE_DECODER_COMFY_KEYS_FILTER
    )
    vae = model.parts["vae"]
    latents = torch.randn(1, CHANNELS, 3, 2, 3, generator=torch.manual_seed(0))
    mean, std = (x.view(1, -1, 1, 1, 1) for x in (vae.latents_mean, vae.latents_std))
    close(vae.decode(latents * std + mean).sample, decoder(latents))


# --- text -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_features_and_connectors_are_the_trainers(path, version, model):
    """The same hidden states of a text encoder, padded on the left, through both."""
    processor = EmbeddingsProcessor(
        feature_extractor=_extractor(path, version),
        video_connector=_connector(path, "video", connectors_.Embeddings1DConnectorConfigurator),
        audio_connector=_connector(
            path, "audio", connectors_.AudioEmbeddings1DConnectorConfigurator
        ),
    )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, model.text_tokens, TEXT, LAYERS + 1, generator=generator)
    mask = (torch.arange(model.text_tokens) >= 1000).long()[None]
    video, audio, _ = processor.process_hidden_states(tuple(hidden.unbind(-1)), mask)
    found = model.parts["connectors"](hidden.flatten(2), mask, padding_side="left")
    close(found[0], video)
    close(found[1], audio)
    features = processor.feature_extractor(tuple(hidden.unbind(-1)), mask)
    cached = {"video_features": features[0], "audio_features": features[1], "text_mask": mask}
    connected = model._connect(cached)  # as training from a .precomputed folder does
    close(connected["video_text"], video)
    close(connected["audio_text"], audio)


def _connector(path, stream, configurator):
    prefix = f"model.diffusion_model.{stream}_embeddings_connector."
    with safe_open(path, framework="pt") as file:
        module = configurator.from_config(json.loads(file.metadata()["config"]))
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        state = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    module.load_state_dict(state, assign=True)  # else the registers stay in bf16
    return module.eval()


def _extractor(path, version):
    weights = load_file(path)
    prefix = "text_embedding_projection."
    weights = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    width = TEXT * (LAYERS + 1)
    if version == "2.0":
        extractor = FeatureExtractorV1(torch.nn.Linear(width, TEXT, bias=False), is_av=True)
    else:
        linear = [torch.nn.Linear(width, size) for size in (VIDEO, AUDIO)]
        extractor = FeatureExtractorV2(linear[0], TEXT, linear[1])
    extractor.load_state_dict(weights)
    return extractor


# --- the transformer ------------------------------------------------------------------------------


def inputs(model: LTX2):
    generator = torch.Generator().manual_seed(1)
    video, audio = (line.frames * line.tokens for line in model.timelines)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    noisy = draw(2, video, CHANNELS), draw(2, audio, AUDIO_CHANNELS * BINS // 4)
    early = model.config["use_prompt_embeddings"]
    widths = (TEXT, TEXT) if early else (VIDEO, AUDIO)
    text = [draw(2, 7, width) for width in widths]
    return noisy, {"video_text": text[0], "audio_text": text[1]}


def their_velocity(transformer, model: LTX2, noisy, sigma, conditions):
    frames, rows, columns = model.latent_size
    shapes = (
        VideoLatentShape(2, CHANNELS, frames, rows, columns),
        AudioLatentShape(2, AUDIO_CHANNELS, model.timelines[1].frames, BINS // 4),
    )
    tools = (
        VideoLatentTools(VideoLatentPatchifier(1), shapes[0], FPS),
        AudioLatentTools(AudioPatchifier(1), shapes[1]),
    )
    modalities = [
        Modality(
            latent=latents,
            sigma=level,
            timesteps=level[:, None].expand(-1, latents.shape[1]),
            positions=tool.create_initial_state("cpu", torch.float32).positions,
            context=conditions[f"{stream}_text"],
        )
        for latents, level, tool, stream in zip(
            noisy, sigma, tools, ("video", "audio"), strict=True
        )
    ]
    return transformer(*modalities, BatchedPerturbationConfig.empty(2))


@torch.no_grad()
@pytest.mark.parametrize("apart", [False, True], ids=["shared", "separate"])
def test_velocities_are_those_of_lightricks_transformer(
    path, version, model, apart, tmp_path, monkeypatch
):
    """With one σ for both streams, and with one for each.

    ltx-core 1.0.0 modulates cross-modal attention by the other stream's σ whatever the version,
    diffusers since 2.3: for 2.0 it is the stream's own, as in ltx-core when 2.0 came out. Samplers,
    where σ is one, cannot tell.
    """
    transformer = their_transformer(path, version, tmp_path)
    noisy, conditions = inputs(model)
    first = torch.tensor([0.9, 0.2])
    sigma = (first, torch.tensor([0.3, 0.7]) if apart else first)
    expected = their_velocity(transformer, model, noisy, sigma, conditions)
    if apart and version == "2.0":
        mine = model.velocity(model.transformer, noisy, sigma, conditions)
        assert ((mine[1] - expected[1]).norm() / expected[1].norm()) > 1e-3
        monkeypatch.setitem(model.config, "cross_attn_mod", True)
    found = model.velocity(model.transformer, noisy, sigma, conditions)
    for stream, velocity in zip(found, expected, strict=True):
        close(stream, velocity)
