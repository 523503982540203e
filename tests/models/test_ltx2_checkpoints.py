"""Checkpoints as people have them: Lightricks' files, whole and split, and parts by themselves."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lightricks import CONFIGS, PREFIX, save_lightricks, tensors
from tiny_ltx2 import LAYERS, TEXT, save_tiny_ltx2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

from syncdpo.cli import main
from syncdpo.data.clips import Clip
from syncdpo.models import load_model
from syncdpo.models.ltx2 import LTX2, log_mel
from syncdpo.models.ltx2_parts import NEEDED
from syncdpo.versions import WANTED, WrongVersions, checked_versions

SIZE = {"frames": 17, "height": 64, "width": 96}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ltx2")
    return {version: save_tiny_ltx2(root / version, version) for version in ("2.0", "2.3")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A whole file per version, and the separate ones of 2.5."""
    root = tmp_path_factory.mktemp("files")
    found = {v: save_lightricks(root / f"ltx-{v}-dev.safetensors", v) for v in CONFIGS}
    projections = tensors("2.5", "connectors")
    projections = {n: t for n, t in projections.items() if n.startswith("text_embedding_")}
    found["transformer"] = root / "ltx-2.5-dev-transformer.safetensors"
    save_lightricks(found["transformer"], "2.5", "transformer", "connectors")
    weights = load_file(found["transformer"])
    header = {"config": json.dumps({k: CONFIGS["2.5"][k] for k in ("transformer", "audio_vae")})}
    save_file(
        {n: t for n, t in weights.items() if n not in projections}, found["transformer"], header
    )
    found["video_vae"] = save_lightricks(root / "video-vae.safetensors", "2.5", "vae", bare=True)
    found["audio_vae"] = save_lightricks(
        root / "audio-vae.safetensors", "2.5", "audio_vae", "vocoder"
    )
    found["text_encoder"], found["language_model"] = pack_text(root, projections)
    return found


def pack_text(root: Path, projections: dict) -> tuple[Path, Gemma4UnifiedForConditionalGeneration]:
    """Gemma 4, tiny, as Lightricks pack it: flattened names, and small files as bytes."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    text = {
        "vocab_size": 300, "hidden_size": TEXT, "intermediate_size": 2 * TEXT, "head_dim": 8,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
        "layer_types": kinds[:LAYERS] if LAYERS > 1 else ["full_attention"],
    }  # fmt: skip
    config = Gemma4UnifiedConfig(text_config=text, vision_config=None, audio_config=None)
    model = Gemma4UnifiedForConditionalGeneration(config).eval()
    flat = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("model.language_model.")
    }
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "ball", "strikes", "the", "floor", "x"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    names = ("pad", "eos", "bos", "unk")
    assets = {
        "tokenizer_json": tokenizer.to_str().encode(),
        "hf_asset__tokenizer_config.json": json.dumps(
            {f"{name}_token": f"<{name}>" for name in names}
            | {"processor_class": "Gemma4Processor"}
        ).encode(),
    }
    stored = {k: torch.frombuffer(bytearray(v), dtype=torch.uint8) for k, v in assets.items()}
    vision = {"vision_model.patch.weight": torch.ones(2, 2)}  # of no use to the text
    path = root / "gemma4-with-proj.safetensors"
    settings = json.dumps(config.to_dict() | {"gemma_version": "tiny"})
    tensors_ = flat | stored | vision | projections
    save_file({n: t.contiguous() for n, t in tensors_.items()}, path, {"gemma_config": settings})
    return path, model


def random_clip() -> Clip:
    generator = torch.Generator().manual_seed(0)
    shape = (SIZE["frames"], SIZE["height"], SIZE["width"], 3)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    audio = 0.1 * torch.randn(2, round(SIZE["frames"] / 24 * 16000), generator=generator)
    return Clip(video, 24.0, audio, 16000)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line here: its exit code and what it says as errors."""

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["syncdpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capsys.readouterr().err

    return call


def write_precomputed(folder: Path, clips: int) -> Path:
    """A folder of the LTX-2 trainer: 17 pictures of 64x96 each, text for either stream."""
    generator = torch.Generator().manual_seed(0)
    text = {
        f"{stream}_prompt_embeds": torch.randn(1024, width, generator=generator)
        for stream, width in (("video", 32), ("audio", 16))
    } | {"prompt_attention_mask": torch.arange(1024) >= 1000}
    for index in range(clips):
        contents = {
            "latents": {
                "latents": torch.randn(8, 3, 2, 3, generator=generator),
                "num_frames": 3, "height": 2, "width": 3, "fps": 24.0,
            },
            "audio_latents": {"latents": torch.randn(2, 18, 2, generator=generator)},
            "conditions": text,
        }  # fmt: skip
        for kind, content in contents.items():
            path = folder / ".precomputed" / kind / f"{index}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)
    return folder


def relative_error(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# --- whole and split files ------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_a_whole_file_encodes_with_a_text_encoder_beside_it(files, folders, version):
    model = LTX2(files[version], text_encoder=folders[version], **SIZE)
    sample = model.encode(random_clip(), "a ball strikes the floor")
    model.check_latents(sample)
    assert all(tensor.isfinite().all() for tensor in sample.values())
    identity = model.identity()
    assert all(
        re.fullmatch("[0-9a-f]{16}", identity[k]) for k in ("vae", "audio_vae", "connectors")
    )
    assert identity["text_encoder"] == LTX2(folders[version], **SIZE).identity()["text_encoder"]
    assert "transformer" not in model.parts._loaded


def test_split_files_make_one_pipeline(files):
    parts = {name: files[name] for name in ("text_encoder", "video_vae", "audio_vae")}
    model = LTX2(files["transformer"], **parts, **SIZE)
    sample = model.encode(random_clip(), "a ball")
    model.check_latents(sample)
    whole = LTX2(files["2.5"], text_encoder=files["text_encoder"], **SIZE)
    for name, tensor in whole.encode(random_clip(), "a ball").items():
        assert torch.equal(sample[name], tensor)
    pipeline = model.parts.pipeline(*NEEDED)
    assert pipeline.scheduler.config.use_dynamic_shifting
    mine, theirs = model.identity(), whole.identity()
    assert mine["audio_vae"] == theirs["audio_vae"]
    assert mine["vae"] != theirs["vae"]  # other names, so told apart: see docs/ltx2.md


def test_folders_serve_as_parts(files, folders):
    """A part's own folder, or the pipeline's that holds it."""
    whole = LTX2(folders["2.3"], **SIZE).encode(random_clip(), "x")
    for of in (lambda part: folders["2.3"], lambda part: folders["2.3"] / part):
        parts = {"video_vae": of("vae"), "audio_vae": of("audio_vae")}
        model = LTX2(files["2.3"], text_encoder=folders["2.3"], **parts, **SIZE)
        sample = model.encode(random_clip(), "x")
        assert torch.equal(sample["video"], whole["video"])
        assert torch.equal(sample["audio"], whole["audio"])


def test_the_packed_text_encoder_is_transformers_own(files):
    model = LTX2(files["transformer"], text_encoder=files["text_encoder"], **SIZE)
    tokenizer, encoder = model.parts["tokenizer"], model.parts["text_encoder"]
    tokens = tokenizer("a ball", return_tensors="pt").input_ids
    assert tokens.tolist() == [[2, 4, 5]]  # <bos>, which the packed tokenizer leaves out
    with torch.no_grad():
        found = encoder(input_ids=tokens, output_hidden_states=True).hidden_states
        whole = files["language_model"](input_ids=tokens, output_hidden_states=True).hidden_states
    assert len(found) == LAYERS + 1
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_precomputed_folders_train_from_the_transformers_file_alone(files, tmp_path, command):
    data, output = write_precomputed(tmp_path / "data", 2), tmp_path / "run"
    settings = ("--steps", 2, "--batch-size", 2, "--lora-rank", 2, "--rules", "shift")
    code, said = command(
        "train", "--model", files["transformer"], "--data", data, "--output", output, *settings
    )
    assert code == 0, said
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2
    assert all(0 < entry["loss"] < 1e3 for entry in log)
    model = LTX2(files["transformer"])
    with pytest.raises(ValueError, match="holds no text projections; --text-encoder names"):
        model.parts["connectors"](torch.ones(1, 1024, TEXT * (LAYERS + 1)), torch.ones(1, 1024))


def test_weights_are_those_of_the_file(files):
    stored = load_file(files["2.3"])
    model = LTX2(files["2.3"])
    name = "transformer_blocks.1.audio_attn1.to_q.weight"
    expected = stored[PREFIX["transformer"] + name]
    assert torch.equal(model.transformer.state_dict()[name], expected)
    assert next(model.transformer.parameters()).requires_grad
    assert not any(p.requires_grad for p in model.parts["connectors"].parameters())
    half = LTX2(files["2.3"], dtype="bfloat16").transformer.state_dict()[name]
    assert torch.equal(half, expected.bfloat16())


# --- what is missing or wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("prepare", ("audio_vae", "text_encoder"), "vae: .* has none; --video-vae names the file"),
        ("prepare", ("video_vae", "text_encoder"), "audio_vae: .* has none; --audio-vae names"),
        ("prepare", ("video_vae", "audio_vae"), "text_encoder: .* has none; --text-encoder names"),
        ("sample", ("video_vae", "text_encoder"), "audio_vae: .* has none; --audio-vae names"),
    ],
)
def test_a_missing_part_is_named_with_its_option(files, tmp_path, command, given, message):
    parts = {name: files[name] for name in given}
    model = LTX2(files["transformer"], **parts, **SIZE)
    asked = model.generate(["x"], torch.tensor([0]))
    with pytest.raises(ValueError, match=message):
        _ = model.identity() if command == "prepare" else next(asked)
    assert not model.parts._loaded  # before anything large


def test_a_missing_part_ends_a_command_with_exit_code_2(files, tmp_path, command):
    (tmp_path / "clips").mkdir()
    code, said = command(
        "prepare", tmp_path / "clips", "--model", files["2.3"], "-o", tmp_path / "cache"
    )
    assert code == 2
    assert said.startswith("syncdpo: text_encoder: ")
    assert said.endswith(" has none; --text-encoder names the file or folder that has one\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.popitem(), "does not fit its settings: tensors 1 missing, "),
        (lambda w: w.update({"model.diffusion_model.more": torch.ones(1)}), "1 unknown, more "),
        (
            lambda w: w.update({"model.diffusion_model.proj_out.bias": torch.ones(3)}),
            "1 of another shape, proj_out.bias ",
        ),
        (
            lambda w: w.update({"model.diffusion_model.proj_out.weight_scale": torch.ones(1)}),
            "is quantised; expected the file with bf16 weights",
        ),
        (
            lambda w: w.update({
                "model.diffusion_model.proj_out.weight": w[
                    "model.diffusion_model.proj_out.weight"
                ].to(torch.float8_e4m3fn)
            }),
            "is quantised; expected the file with bf16 weights",
        ),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(files, tmp_path, change, message):
    weights = tensors("2.3", "transformer")
    change(weights)
    path = tmp_path / "model.safetensors"
    save_file(weights, path, {"config": json.dumps(CONFIGS["2.3"])})
    with pytest.raises(ValueError, match=message):
        _ = LTX2(path).transformer


def test_other_files_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"model: there is no .*nowhere.safetensors"):
        LTX2(tmp_path / "nowhere.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        LTX2(damaged)
    other = tmp_path / "other.safetensors"
    save_file({"blocks.0.weight": torch.ones(1)}, other)
    with pytest.raises(ValueError, match=r"expected a transformer of LTX-2 in .*, got blocks\.0"):
        LTX2(other)
    bald = tmp_path / "bald.safetensors"
    save_file(tensors("2.3", "transformer"), bald)
    with pytest.raises(ValueError, match="expected the settings of transformer as JSON in"):
        LTX2(bald)
    with pytest.raises(ValueError, match=r"text_encoder: expected a text_encoder in .*, got none"):
        LTX2(files["2.3"], text_encoder=files["video_vae"])


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_pickled_weights_of_a_pipeline_are_refused(folders, tmp_path, part):
    folder = shutil.copytree(folders["2.3"], tmp_path / "pickled")
    for path in (folder / part).glob("*.safetensors"):
        name = "pytorch_model.bin" if part == "text_encoder" else path.stem + ".bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    with pytest.raises(OSError, match="safetensors"):
        LTX2(folder, **SIZE).parts[part]


def test_another_text_encoder_than_the_model_was_trained_with_is_refused(files, tmp_path):
    """2.5 says which: of the same shapes, the stock Gemma would pass unseen."""
    source = json.dumps({"gemma_version": "gemma4-12b-ltx-v1"})
    path = save_lightricks(tmp_path / "a.safetensors", "2.5", gemma_source_checkpoint=source)
    with pytest.raises(ValueError, match=r"expected gemma4-12b-ltx-v1 for .*, got tiny in"):
        LTX2(path, text_encoder=files["text_encoder"])
    source = json.dumps({"gemma_version": "tiny"})
    path = save_lightricks(tmp_path / "b.safetensors", "2.5", gemma_source_checkpoint=source)
    LTX2(path, text_encoder=files["text_encoder"])


def test_a_diffusion_decoder_is_named_with_what_to_take_instead(tmp_path, files):
    settings = {"vae": CONFIGS["2.5"]["vae"] | {"_class_name": "CausalDiffusionVAE"}}
    path = tmp_path / "video-vae.safetensors"
    save_file(load_file(files["video_vae"]), path, {"config": json.dumps(settings)})
    model = LTX2(files["2.5"], video_vae=path, **SIZE)
    with pytest.raises(ValueError, match="--video-vae names the file with the convolutional"):
        model._encode_video(random_clip())


# --- distilled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["its name", "its header", "its scheduler"])
def test_a_distilled_checkpoint_is_not_trained_unasked(files, folders, tmp_path, where, command):
    if where == "its name":
        path = tmp_path / "ltx-2.3-22b-distilled-1.1.safetensors"
        shutil.copy(files["2.3"], path)
    elif where == "its header":
        path = save_lightricks(tmp_path / "a.safetensors", "2.3", model_version="2.3-distilled")
    else:
        path = tmp_path / "pipeline"
        shutil.copytree(folders["2.3"], path)
        settings = path / "scheduler" / "scheduler_config.json"
        changed = {"use_dynamic_shifting": False, "shift_terminal": None}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | changed))
    with pytest.raises(ValueError, match=f"is distilled, as {where} says; expected the full model"):
        load_model(str(path), allow_distilled=False)
    assert load_model(str(path), allow_distilled=True).parts.distilled == where
    data = write_precomputed(tmp_path / "data", 1)
    options = ("--data", data, "--steps", 1, "--batch-size", 1, "--lora-rank", 2)
    train = ("train", "--model", path, *options, "--output", tmp_path / "run")
    code, said = command(*train)
    assert code == 2
    assert "--allow-distilled" in said
    assert not (tmp_path / "run").exists()
    if where == "its name":
        code, said = command(*train, "--allow-distilled")
        assert code == 0, said


def test_the_full_transformer_is_taken_from_beside_the_distilled(folders, tmp_path):
    """As the published 2.5 is laid out: transformer/ and scheduler/ are the distilled model's."""
    folder = tmp_path / "LTX-2.5-Diffusers"
    shutil.copytree(folders["2.3"], folder)
    full = save_tiny_ltx2(tmp_path / "full", "2.3", seed=5) / "transformer"
    shutil.copytree(full, folder / "transformer_full")
    settings = folder / "scheduler" / "scheduler_config.json"
    changed = {"use_dynamic_shifting": False, "shift_terminal": None}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changed))
    model = LTX2(folder, allow_distilled=False, **SIZE)
    expected = load_file(full / "diffusion_pytorch_model.safetensors")
    state = model.transformer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    scheduler = model.parts["scheduler"].config
    assert (scheduler.use_dynamic_shifting, scheduler.shift_terminal) == (True, 0.1)


# --- precision and options ------------------------------------------------------------------------


@torch.no_grad()
def test_sound_is_encoded_in_float32_whatever_the_models_dtype(files):
    whole, half = (LTX2(files["2.3"], dtype=kind, **SIZE) for kind in ("float32", "bfloat16"))
    exact, found = (model._encode_audio(random_clip()) for model in (whole, half))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    vae = half.parts["audio_vae"]
    assert vae.dtype == torch.bfloat16
    beside = LTX2(files["2.3"], dtype="bfloat16", text_encoder=files["text_encoder"], **SIZE)
    assert beside.identity()["audio_vae_dtype"] == "float32"  # so that other caches are refused
    mel = log_mel(random_clip().audio, vae.config)[None].bfloat16()
    rough = half.parts.pipeline()._pack_audio_latents(vae.encode(mel).latent_dist.mode())
    rough = (rough[0] - vae.latents_mean) / vae.latents_std
    assert relative_error(rough[: len(exact)].float(), exact) > 3 * relative_error(
        found.float(), exact
    )


def test_tiny_takes_none_of_ltx2s_options():
    with pytest.raises(ValueError, match="text_encoder, shift_bound: for LTX-2 alone"):
        load_model("tiny", text_encoder="x", shift_bound=4096, allow_distilled=False)


# --- versions -------------------------------------------------------------------------------------


def test_the_bounds_are_those_that_are_installed_by():
    text = (ROOT / "pyproject.toml").read_text()
    for name, bounds in WANTED.items():
        assert f'"{name}{bounds}"' in text


@pytest.mark.parametrize("package", ["transformers", "diffusers"])
def test_an_import_that_fails_beneath_ends_in_one_sentence(tmp_path, package):
    broken = tmp_path / package
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('tokenizers of another day')")
    paths = [str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = subprocess.run(
        [sys.executable, "-m", "syncdpo", "sample", "-o", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    last = found.stderr.splitlines()[-1]
    assert last.startswith(f"syncdpo: versions: expected diffusers {WANTED['diffusers']}, ")
    assert "(tokenizers of another day); pip install 'diffusers" in last


def test_what_is_beside_the_point_is_not_said():
    """Whatever is installed, a command begins without warnings of others about themselves."""
    program = """
from syncdpo.versions import checked_versions
with checked_versions():
    import peft
    from diffusers import LTX2Pipeline
"""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr, ran.stderr


def test_other_imports_fail_as_they_are():
    with pytest.raises(ModuleNotFoundError, match="nowhere"), checked_versions():
        import nowhere  # noqa: F401
    with pytest.raises(RuntimeError, match="of a training"), checked_versions():
        raise RuntimeError("of a training")
    with pytest.raises(WrongVersions, match="Failed to import"), checked_versions():
        raise RuntimeError("Failed to import diffusers.x (look up to see its traceback)")
