"""LoRAs in and out of diffusers, ltx-core, ComfyUI, ltx-trainer, musubi-tuner and ai-toolkit."""

import json
import sys

import pytest
import torch
from diffusers import LTX2Pipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_ltx2 import (
    AUDIO_CHANNELS,
    BINS,
    CHANNELS,
    HEADS,
    TEXT,
    VERSIONS,
    WIDTH,
    save_tiny_ltx2,
    tiny_transformer,
)
from typer.testing import CliRunner

from syncdpo.cli import app, main
from syncdpo.models.base_model import fingerprint, version_named, version_of
from syncdpo.models.lora_keys import linear_modules, original_name
from syncdpo.models.ltx2 import LTX2
from syncdpo.models.weights import (
    FULL,
    LORA,
    PEFT_FILE,
    PEFT_SETTINGS,
    load_weights,
    place_lora,
    save_weights,
)

FRAMES, SIDE, SOUNDS, WORDS = 3, 2, 5, 4
SIZE = {"frames": 17, "height": 64, "width": 64}
TRAINERS = "lora_weights_step_02000.safetensors"
BY_DEFAULT = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module", params=list(VERSIONS))
def version(request):
    return request.param


def base_of(version: str, layers: int = 2):
    """Always the same random transformer of this version."""
    return tiny_transformer(version, layers).requires_grad_(False).eval()


def random_pairs(transformer, rank=lambda place: 2, ends=()):
    """A LoRA of every linear layer, or of those with these ends, about as large as its weights."""
    generator = torch.Generator().manual_seed(1)
    modules = {
        name: size
        for name, size in linear_modules(transformer).items()
        if not ends or name.endswith(ends)
    }
    return {
        name: (
            torch.randn(rank(place), columns, generator=generator) / columns**0.5,
            0.3 * torch.randn(rows, rank(place), generator=generator),
        )
        for place, (name, (rows, columns)) in enumerate(modules.items())
    }


@torch.no_grad()
def merged(transformer, pairs, scale=lambda name: 1.0):
    """W + scale·B·A, by hand."""
    for name, (a, b) in pairs.items():
        transformer.get_submodule(name).weight += scale(name) * (b @ a)
    return transformer


@torch.no_grad()
def velocities(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(2, *shape, generator=generator)

    prompt = transformer.config.use_prompt_embeddings
    text = (TEXT, TEXT) if prompt else (HEADS * WIDTH, HEADS * WIDTH // 2)
    sigma = torch.tensor([300.0, 700.0])
    output = transformer(
        hidden_states=random(FRAMES * SIDE * SIDE, CHANNELS),
        audio_hidden_states=random(SOUNDS, AUDIO_CHANNELS * BINS // 4),
        encoder_hidden_states=random(WORDS, text[0]),
        audio_encoder_hidden_states=random(WORDS, text[1]),
        timestep=sigma, audio_timestep=sigma, sigma=sigma, audio_sigma=sigma,
        num_frames=FRAMES, height=SIDE, width=SIDE, fps=24.0, audio_num_frames=SOUNDS,
        use_cross_timestep=transformer.config.cross_attn_mod, return_dict=False,
    )  # fmt: skip
    return torch.cat([stream.flatten() for stream in output])


def assert_same_velocities(found, expected, base):
    """To rounding, of which what the LoRA changes is many times as much."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).norm() > 0.05 * base.norm()


def save_lora(folder, version, pairs, **options):
    transformer = base_of(version)
    place_lora(transformer, pairs)
    state = transformer.state_dict()
    save_weights(folder, transformer, state, **options)
    return folder / LORA


# --- out ------------------------------------------------------------------------------------------


def different_ranks(place: int) -> int:
    return 1 + place % 3


@pytest.mark.parametrize("rank", [lambda place: 2, different_ranks], ids=["one rank", "many"])
def test_ours_to_diffusers(version, tmp_path, rank):
    pairs = random_pairs(base_of(version), rank)
    save_lora(tmp_path, version, pairs)
    pipeline = LTX2Pipeline(
        transformer=base_of(version),
        **dict.fromkeys(
            ("scheduler", "vae", "audio_vae", "text_encoder", "tokenizer", "connectors", "vocoder")
        ),
    )
    pipeline.load_lora_weights(tmp_path)
    added = {n: p for n, p in pipeline.transformer.named_parameters() if ".lora_" in n}
    assert len(added) == 2 * len(pairs)
    expected = velocities(merged(base_of(version), pairs))
    assert_same_velocities(velocities(pipeline.transformer), expected, velocities(base_of(version)))


def test_ours_to_ltx_core(version, tmp_path):
    """Its own loader and its own fusing, every tensor: W + B·A, each rounded to bfloat16."""
    pytest.importorskip("ltx_core", reason="ltx-core is not installed (extra: interop)")
    from ltx_core.loader import LTXV_LORA_COMFY_RENAMING_MAP
    from ltx_core.loader.fuse_loras import apply_loras
    from ltx_core.loader.primitives import LoraStateDictWithStrength, StateDict
    from ltx_core.loader.sft_loader import SafetensorsModelStateDictLoader

    transformer = base_of(version).bfloat16()
    pairs = random_pairs(transformer)
    file = save_lora(tmp_path, version, pairs)
    weights = original_state(transformer)
    lora = SafetensorsModelStateDictLoader().load(
        [str(file)], sd_ops=LTXV_LORA_COMFY_RENAMING_MAP, device=torch.device("cpu")
    )
    assert len(lora.sd) == 2 * len(pairs)
    fused = apply_loras(
        StateDict(dict(weights), torch.device("cpu"), 0, {torch.bfloat16}),
        [LoraStateDictWithStrength(lora, 1.0)],
        dtype=torch.bfloat16,
    ).sd
    changed = {name for name in weights if not torch.equal(fused[name], weights[name])}
    assert changed == {f"{original_name(name)}.weight" for name in pairs}
    for name, (a, b) in pairs.items():
        key = f"{original_name(name)}.weight"
        expected = (b @ a).bfloat16() + weights[key]
        torch.testing.assert_close(fused[key], expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("of", ["2.0", "2.3"])
def test_original_names_are_those_of_ltx_core(of):
    """ltx-core 1.0 knows 2.0 and 2.3; 2.5 has no linear layer that 2.3 lacks."""
    pytest.importorskip("ltx_core", reason="ltx-core is not installed (extra: interop)")
    from ltx_core.model.transformer.model import LTXModel
    from ltx_core.model.transformer.text_projection import create_caption_projection

    newer, text = of != "2.0", {}
    with torch.device("meta"):
        if not newer:  # 2.3 projects the text before the transformer
            sizes = {
                "caption_channels": TEXT, "num_attention_heads": HEADS,
                "attention_head_dim": WIDTH, "audio_num_attention_heads": HEADS,
                "audio_attention_head_dim": WIDTH // 2,
            }  # fmt: skip
            text["caption_projection"] = create_caption_projection(sizes)
            text["audio_caption_projection"] = create_caption_projection(sizes, audio=True)
        theirs = LTXModel(
            num_layers=2, num_attention_heads=HEADS, attention_head_dim=WIDTH,
            cross_attention_dim=HEADS * WIDTH, audio_num_attention_heads=HEADS,
            audio_attention_head_dim=WIDTH // 2, audio_cross_attention_dim=HEADS * WIDTH // 2,
            apply_gated_attention=newer, cross_attention_adaln=newer, **text,
        )  # fmt: skip
    expected = {name for name, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {original_name(name) for name in linear_modules(base_of(of))} == expected


def original_state(transformer) -> dict[str, torch.Tensor]:
    """The weights under Lightricks' names, as far as they are weights of linear layers."""
    return {
        f"{original_name(name)}.weight": transformer.get_submodule(name).weight.detach()
        for name in linear_modules(transformer)
    }


def test_ours_to_comfyui(version, tmp_path):
    """Its rule: of each weight `diffusion_model.<name>.weight` a LoRA is `<that>.lora_up`, or
    `.lora_B`, with or without the prefix, or `lora_unet_` and underscores; W + (alpha / rank)·B·A,
    with 1 where no alpha is stored; and a key that no weight asks for is left unused."""
    transformer = base_of(version)
    pairs = random_pairs(transformer, different_ranks)
    stored = load_file(save_lora(tmp_path, version, pairs))
    unused = set(stored)
    for key, weight in original_state(transformer).items():
        name = f"diffusion_model.{key.removesuffix('.weight')}"
        a, b = stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"]
        unused -= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
        assert f"{name}.alpha" not in stored
        expected = merged_weight(transformer, pairs, key)
        torch.testing.assert_close(weight + b @ a, expected)
    assert not unused


def merged_weight(transformer, pairs, key):
    [name] = [n for n in pairs if f"{original_name(n)}.weight" == key]
    a, b = pairs[name]
    return transformer.get_submodule(name).weight + b @ a


def test_all_modules_are_under_their_original_names(tmp_path):
    """Not the attentions alone: the names as they stand in Lightricks' checkpoints."""
    stored = load_file(save_lora(tmp_path, "2.3", random_pairs(base_of("2.3"))))
    first = {key.split(".")[1] for key in stored}
    assert first == {
        "patchify_proj", "audio_patchify_proj", "adaln_single", "audio_adaln_single",
        "prompt_adaln_single", "audio_prompt_adaln_single", "proj_out", "audio_proj_out",
        "av_ca_video_scale_shift_adaln_single", "av_ca_audio_scale_shift_adaln_single",
        "av_ca_a2v_gate_adaln_single", "av_ca_v2a_gate_adaln_single", "transformer_blocks",
    }  # fmt: skip


def test_the_file_says_what_it_is_of(version, tmp_path):
    file = save_lora(tmp_path, version, random_pairs(base_of(version)), about={"method": "sft"})
    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    assert (told["format"], told["method"]) == ("pt", "sft")
    assert (told["base_version"], told["lora_rank"], told["lora_alpha"]) == (version, "2", "2")
    assert version_named(told) == version


def test_a_scale_of_ones_own_is_folded_in(tmp_path):
    """save_weights with an adapter of any alpha: the file means the same without it."""
    transformer = base_of("2.3")
    config = LoraConfig(r=4, lora_alpha=3, target_modules=list(BY_DEFAULT), use_rslora=True)
    transformer.add_adapter(config)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    save_weights(tmp_path, transformer, transformer.state_dict())
    again = base_of("2.3")
    load_weights(tmp_path, again)
    assert_same_velocities(velocities(again), velocities(transformer), velocities(base_of("2.3")))


# --- in -------------------------------------------------------------------------------------------


def under(name: str) -> str:
    return original_name(name).replace(".", "_")


def as_diffusers(folder, pairs, alpha):
    tensors, settings = {}, {}
    for name, (a, b) in pairs.items():
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        settings[name] = alpha(name)
    metadata = {"r": 2, "lora_alpha": 1.0, "alpha_pattern": settings}
    LTX2Pipeline.save_lora_weights(
        folder, transformer_lora_layers=tensors, transformer_lora_adapter_metadata=metadata
    )


def as_peft(folder, pairs, alpha):
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / PEFT_FILE)
    settings = {"r": 2, "lora_alpha": 2, "alpha_pattern": {n: alpha(n) for n in pairs}}
    (folder / PEFT_SETTINGS).write_text(json.dumps(settings))


def as_ltx_trainer(folder, pairs, alpha):
    """It keeps no alpha, and no tool that reads its files supposes another than the rank."""
    tensors = {}
    for name, (a, b) in pairs.items():
        key = f"diffusion_model.{original_name(name)}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(tensors, folder / TRAINERS)


def as_ai_toolkit(folder, pairs, alpha):
    tensors = {}
    for name, (a, b) in pairs.items():
        key = f"diffusion_model.{original_name(name)}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(tensors, folder / "my_ltx2.safetensors", {"ss_base_model_version": "ltx2"})


def as_comfyui(folder, pairs, alpha, prefix="diffusion_model."):
    tensors = {}
    for name, (a, b) in pairs.items():
        key = f"{prefix}{original_name(name)}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        tensors[f"{key}.alpha"] = torch.tensor(alpha(name))
    save_file(tensors, folder / "comfy.safetensors")


def as_comfyui_bare(folder, pairs, alpha):
    as_comfyui(folder, pairs, alpha, prefix="")


def as_musubi(folder, pairs, alpha, prefix="lora_unet_model_"):
    tensors = {}
    for name, (a, b) in pairs.items():
        key = f"{prefix}{under(name)}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        tensors[f"{key}.alpha"] = torch.tensor(alpha(name))
    save_file(tensors, folder / "musubi.safetensors", {"ss_network_module": "networks.lora_ltx2"})


def as_kohya(folder, pairs, alpha):
    as_musubi(folder, pairs, alpha, prefix="lora_unet_")


WITH_ALPHA = (as_diffusers, as_peft, as_comfyui, as_comfyui_bare, as_musubi, as_kohya)
WITHOUT = (as_ltx_trainer, as_ai_toolkit)


def some_alpha(name: str) -> float:
    return 3.0 if "audio" in name else 0.5


@pytest.mark.parametrize("write", [*WITH_ALPHA, *WITHOUT], ids=lambda f: f.__name__)
@pytest.mark.parametrize("by", ["folder", "file"])
def test_theirs_to_ours(version, tmp_path, write, by):
    """With another alpha than the rank, and ranks that differ, wherever the tool stores them."""
    pairs = random_pairs(base_of(version), different_ranks)
    write(tmp_path, pairs, some_alpha)
    [file] = tmp_path.glob("*.safetensors")
    found = base_of(version)
    assert load_weights(tmp_path if by == "folder" else file, found) == ""

    def scale(name):
        return some_alpha(name) / len(pairs[name][0]) if write in WITH_ALPHA else 1.0

    expected = velocities(merged(base_of(version), pairs, scale))
    assert_same_velocities(velocities(found), expected, velocities(base_of(version)))


def test_what_was_read_is_written_alike(tmp_path):
    """From musubi-tuner's file to ours to diffusers: one LoRA."""
    pairs = random_pairs(base_of("2.3"), different_ranks)
    as_musubi(tmp_path, pairs, some_alpha)
    loaded = base_of("2.3")
    load_weights(tmp_path, loaded)
    save_weights(tmp_path / "ours", loaded, loaded.state_dict())
    again = base_of("2.3")
    load_weights(tmp_path / "ours", again)
    assert_same_velocities(velocities(again), velocities(loaded), velocities(base_of("2.3")))


def test_half_precision_is_read_and_kept_on_demand(tmp_path):
    pairs = {n: (a.bfloat16(), b.bfloat16()) for n, (a, b) in random_pairs(base_of("2.3")).items()}
    as_ltx_trainer(tmp_path, pairs, some_alpha)
    for dtype in (None, torch.float32):
        transformer = base_of("2.3").bfloat16()
        load_weights(tmp_path, transformer, dtype=dtype)
        adapter = [p for name, p in transformer.named_parameters() if ".lora_" in name]
        assert {p.dtype for p in adapter} == {dtype or torch.bfloat16}


def test_spellings_of_a_module_mean_one():
    """No name of one module is, in any other spelling, another module's."""
    for version in VERSIONS:
        names = list(linear_modules(base_of(version)))
        for spell in (str, original_name, under, lambda name: name.replace(".", "_")):
            assert len({spell(name) for name in names}) == len(names)
        renamed = {original_name(name) for name in names} - set(names)
        assert renamed.isdisjoint(names)


def test_generated_latents_agree_before_and_after(version, tmp_path):
    """diffusers' pipeline with ltx-trainer's LoRA, and with the file that we make of it."""
    model = save_tiny_ltx2(tmp_path / "model", version)
    pairs = random_pairs(LTX2(model, **SIZE).transformer, ends=BY_DEFAULT)
    as_ltx_trainer(tmp_path, pairs, some_alpha)
    ours = LTX2(model, **SIZE)
    ours.load_weights(tmp_path / TRAINERS)
    ours.save_weights(tmp_path / "ours", ours.transformer.state_dict())
    before, after, base = (
        generated_latents(model, lora) for lora in (tmp_path / TRAINERS, tmp_path / "ours", None)
    )
    assert_same_velocities(after, before, base)


def generated_latents(model, lora) -> torch.Tensor:
    pipeline = LTX2Pipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    streams = pipeline(
        "a ball strikes the floor", height=SIZE["height"], width=SIZE["width"],
        num_frames=SIZE["frames"], num_inference_steps=2, output_type="latent", return_dict=False,
        use_cross_timestep=pipeline.transformer.config.cross_attn_mod,
        generator=torch.Generator().manual_seed(0), spatio_temporal_guidance_blocks=[1],
    )  # fmt: skip
    return torch.cat([stream.flatten() for stream in streams])


# --- refused --------------------------------------------------------------------------------------


def ltx_trainer_tensors(version="2.3"):
    tensors = {}
    for name, (a, b) in random_pairs(base_of(version), ends=BY_DEFAULT).items():
        key = f"diffusion_model.{original_name(name)}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    return tensors


FIRST = "diffusion_model.transformer_blocks.0.attn1.to_q"


def other_names(tensors):
    return {key.replace("transformer_blocks", "blocks"): t for key, t in tensors.items()}


def a_connector_too(tensors):
    extra = {f"text_embedding_projection.x.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    return tensors | extra


def changed(tensors, key, tensor):
    return tensors | {f"{FIRST}.{key}": tensor}


def without(tensors, key):
    return {name: t for name, t in tensors.items() if name != f"{FIRST}.{key}"}


def spoilt(tensors, value):
    bad = tensors[f"{FIRST}.lora_B.weight"].clone()
    bad[0, 0] = value
    return changed(tensors, "lora_B.weight", bad)


REFUSED = {
    "nothing matches": (other_names, "nothing of the LoRA"),
    "part matches": (a_connector_too, r"2 of .* text_embedding_projection.*--allow-partial"),
    "NaN": (lambda t: spoilt(t, torch.nan), rf"finite numbers in {FIRST}"),
    "infinity": (lambda t: spoilt(t, torch.inf), "NaN or infinity"),
    "alpha is NaN": (lambda t: changed(t, "alpha", torch.tensor(torch.nan)), "finite"),
    "alphas": (lambda t: changed(t, "alpha", torch.ones(2)), "one number as alpha"),
    "shapes": (lambda t: changed(t, "lora_A.weight", torch.ones(2, 7)), "another model or version"),
    "ranks": (lambda t: changed(t, "lora_A.weight", torch.ones(3, 32)), r"\[3, 32\]"),
    "no rank": (lambda t: changed(t, "lora_A.weight", torch.ones(0, 32)), r"\[0, 32\]"),
    "a number": (lambda t: changed(t, "lora_A.weight", torch.tensor(1.0)), "another model"),
    "half a pair": (lambda t: without(t, "lora_A.weight"), "lacks its matrix A"),
    "twice": (lambda t: changed(t, "lora_down.weight", torch.ones(2, 32)), "the second A"),
    "DoRA": (lambda t: changed(t, "dora_scale", torch.ones(32)), "plain LoRA, got DoRA"),
    "LoKr": (lambda t: {f"{FIRST}.lokr_w1": torch.ones(2, 2)}, "got LoKr"),
    "LoHa": (lambda t: {f"{FIRST}.hada_w1_a": torch.ones(2, 2)}, "got LoHa"),
    "biases": (lambda t: changed(t, "lora_B.bias", torch.ones(32)), "a LoRA with biases"),
    "difference": (lambda t: changed(t, "diff_b", torch.ones(32)), "a difference of weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(tmp_path, case):
    spoil, message = REFUSED[case]
    save_file(spoil(ltx_trainer_tensors()), tmp_path / "lora.safetensors")
    transformer = base_of("2.3")
    before = velocities(transformer)
    with pytest.raises(ValueError, match=message) as refusal:
        load_weights(tmp_path, transformer)
    assert str(refusal.value).startswith("weights: ")
    assert "\n" not in str(refusal.value)
    assert torch.equal(velocities(transformer), before)


@pytest.mark.parametrize("key", ["base_version", "ss_ltx_version", "ss_base_model_version"])
def test_another_version_is_refused_by_its_metadata(tmp_path, key):
    """Shapes would fit: 2.5 has the attentions of 2.3."""
    named = {"ss_base_model_version": "ltx2.5"}.get(key, "2.5")
    save_file(ltx_trainer_tensors(), tmp_path / "lora.safetensors", {key: named})
    with pytest.raises(ValueError, match=r"made for LTX-2 of version 2\.5.* is version 2\.3"):
        load_weights(tmp_path, base_of("2.3"))
    assert load_weights(tmp_path, base_of("2.5")) == ""


def test_part_of_a_lora_is_taken_on_demand(tmp_path):
    save_file(a_connector_too(ltx_trainer_tensors()), tmp_path / "lora.safetensors")
    found = base_of("2.3")
    note = load_weights(tmp_path, found, allow_partial=True)
    assert "2 of" in note
    assert "text_embedding_projection" in note
    assert note.endswith("left out")
    pairs = random_pairs(base_of("2.3"), ends=BY_DEFAULT)
    expected = velocities(merged(base_of("2.3"), pairs))
    assert_same_velocities(velocities(found), expected, velocities(base_of("2.3")))


def test_several_files_and_damaged_ones_are_refused(tmp_path):
    for name in ("a", "b"):
        save_file(ltx_trainer_tensors(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"one \.safetensors file in .*a\.safetensors, b"):
        load_weights(tmp_path, base_of("2.3"))
    (tmp_path / "a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read"):
        load_weights(tmp_path / "a.safetensors", base_of("2.3"))


def test_a_finished_run_hides_its_checkpoints_and_an_unfinished_one_has_no_weights(tmp_path):
    save_file(ltx_trainer_tensors(), tmp_path / "checkpoint-000100.safetensors")
    with pytest.raises(FileNotFoundError, match="weights: expected"):
        load_weights(tmp_path, base_of("2.3"))


def test_full_weights_of_another_version_are_refused(tmp_path):
    transformer = base_of("2.5")
    save_weights(tmp_path, transformer, transformer.state_dict())
    with pytest.raises(ValueError, match=r"version 2\.5"):
        load_weights(tmp_path / FULL, base_of("2.3"))


# --- which base -----------------------------------------------------------------------------------


def test_versions_by_their_settings(version):
    assert version_of(base_of(version).config) == version
    assert version_of({"patch_size": 2}) is None


def test_2_5_is_told_by_its_biases_alone():
    """As diffusers' conversion script leaves it: the prompt is modulated by σ as in 2.3."""
    options = VERSIONS["2.5"]["transformer"] | {"use_prompt_adaln_single": True}
    assert version_of(options) == "2.5"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2.3", "2.3"), ("ltx2.3", "2.3"), ("LTX-2.5", "2.5"), ("ltxv-2.0", "2.0"), ("ltx2_v1", None)],
)
def test_versions_as_others_write_them(value, expected):
    assert version_named({"ss_base_model_version": value}) == expected


def test_a_fingerprint_is_the_weights_whatever_their_precision():
    transformer = base_of("2.3")
    found = fingerprint(transformer)
    assert found == fingerprint(base_of("2.3").bfloat16())
    name, weight = next(iter(transformer.named_parameters()))
    assert name
    weight.view(-1)[0] += 1
    assert fingerprint(transformer) != found


# --- the command line -----------------------------------------------------------------------------


def test_the_command_line_refuses_with_exit_code_2(tmp_path, monkeypatch, capsys):
    save_file(other_names(ltx_trainer_tensors()), tmp_path / "lora.safetensors")
    arguments = ("sample", "--weights", tmp_path / "lora.safetensors", "-o", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["syncdpo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "nothing of the LoRA" in capsys.readouterr().err


def test_sample_takes_part_of_a_lora_on_demand(tmp_path):
    pair = {
        f"{FIRST}.lora_A.weight": torch.ones(2, 128),
        f"{FIRST}.lora_B.weight": torch.ones(128, 2),
    }
    save_file(pair | {"other.lora_A.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    arguments = ["sample", "--weights", str(tmp_path), "-o", str(tmp_path / "out")]
    arguments += ["--count", "1", "--steps", "1", "--allow-partial"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "other.lora_A.weight; they are left out" in result.stderr
