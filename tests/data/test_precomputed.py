import pytest
import torch
from tiny_ltx2 import save_tiny_ltx2

from syncdpo.data.latents import LatentDataset
from syncdpo.data.precomputed import PrecomputedDataset, is_precomputed, open_latents
from syncdpo.models.ltx2 import LTX2

FRAMES, ROWS, COLUMNS, FPS = 3, 2, 3, 24.0  # latents; 17 pictures of 64x96
AUDIO = round(17 / FPS * 25)
WIDTHS = {"2.0": (16, 16), "2.3": (32, 16)}  # of the connectors' inputs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ltx2")
    return {version: save_tiny_ltx2(root / version, version) for version in WIDTHS}


def write(folder, name, kind, content):
    path = folder / ".precomputed" / kind / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def write_clip_of(folder, name, version="2.3", *, seed=0, fps=FPS, audio=AUDIO + 1):
    """What the trainer writes now: text for each stream, padded on the left."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    latents = {
        "latents": randn(8, FRAMES, ROWS, COLUMNS),
        "num_frames": FRAMES, "height": ROWS, "width": COLUMNS, "fps": fps,
    }  # fmt: skip
    heard = {
        "latents": randn(2, audio, 2), "num_time_steps": audio, "frequency_bins": 2,
        "duration": 17 / fps,
    }  # fmt: skip
    mask = torch.zeros(1024, dtype=torch.bool)
    mask[-20:] = True
    text = {
        "video_prompt_embeds": randn(1024, WIDTHS[version][0]) * mask[:, None],
        "audio_prompt_embeds": randn(1024, WIDTHS[version][1]) * mask[:, None],
        "prompt_attention_mask": mask,
    }
    write(folder, name, "latents", latents)
    write(folder, name, "audio_latents", heard)
    write(folder, name, "conditions", text)
    return latents, heard, text


@pytest.mark.parametrize("root", [".", ".precomputed"])
def test_reads_what_the_trainer_writes_now(folders, tmp_path, root):
    latents, heard, text = write_clip_of(tmp_path, "walks/a")
    write_clip_of(tmp_path, "walks/b", seed=1)
    model = LTX2(folders["2.3"])
    data = open_latents(tmp_path / root, model)
    assert (len(data), data.skipped) == (2, [])
    assert model.latent_size == (FRAMES, ROWS, COLUMNS)
    clip = model.clip_format
    assert (clip.seconds, clip.fps, clip.height, clip.width) == (17 / 24, 24, 64, 96)
    sample = data[0]
    packed = model.parts.pipeline()._pack_latents(latents["latents"][None])[0]
    assert torch.equal(sample["video"], packed)
    packed = model.parts.pipeline()._pack_audio_latents(heard["latents"][None])[0]
    assert torch.equal(sample["audio"], packed[:AUDIO])
    assert torch.equal(sample["video_features"], text["video_prompt_embeds"])
    assert torch.equal(sample["audio_features"], text["audio_prompt_embeds"])
    assert torch.equal(sample["text_mask"], text["prompt_attention_mask"])


def test_reads_what_the_trainer_wrote_before(folders, tmp_path):
    """Packed latents, tensors for numbers, one text for both streams, other names, no padding."""
    latents, heard, text = write_clip_of(tmp_path, "latent_a", "2.0")
    packed = latents["latents"].permute(1, 2, 3, 0).reshape(-1, 8)
    numbers = {k: torch.tensor(latents[k]) for k in ("num_frames", "height", "width", "fps")}
    old = tmp_path / "old"
    write(old, "latent_a", "latents", {"latents": packed, **numbers})
    write(old, "latent_a", "audio_latents", heard)
    write(old, "condition_a", "conditions", {
        "prompt_embeds": text["video_prompt_embeds"][-24:].clone(),
        "prompt_attention_mask": text["prompt_attention_mask"][-24:].long(),
    })  # fmt: skip
    with pytest.raises(ValueError, match="none of 1 clips"):
        open_latents(tmp_path, LTX2(folders["2.0"]))
    write(tmp_path, "condition_a", "conditions", text)
    expected = open_latents(tmp_path, LTX2(folders["2.0"]))[0]
    found = open_latents(old, LTX2(folders["2.0"]))[0]
    for name in ("video", "audio", "video_features", "text_mask"):
        assert torch.equal(found[name], expected[name])
    assert torch.equal(found["audio_features"], found["video_features"])


@pytest.mark.parametrize("version", WIDTHS)
def test_the_model_takes_them(folders, tmp_path, version):
    write_clip_of(tmp_path, "a", version)
    write_clip_of(tmp_path, "b", version, seed=1)
    model = LTX2(folders[version])
    data = open_latents(tmp_path, model)
    batch = {name: torch.stack([data[0][name], data[1][name]]) for name in data[0]}
    streams = batch.pop("video"), batch.pop("audio")
    sigma = torch.tensor([0.4, 0.9])
    velocity = model.velocity(model.transformer, streams, (sigma, sigma), batch)
    assert [v.shape for v in velocity] == [s.shape for s in streams]
    assert all(v.isfinite().all() for v in velocity)
    assert all(p.grad is None for p in model.parts["connectors"].parameters())
    sum(v.square().mean() for v in velocity).backward()
    assert all(p.grad is None for p in model.parts["connectors"].parameters())


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("kind", ["latents", "audio_latents", "conditions"])
def test_a_pickle_is_refused(folders, tmp_path, kind):
    contents = dict(
        zip(("latents", "audio_latents", "conditions"), write_clip_of(tmp_path, "a"), strict=True)
    )
    path = write(tmp_path, "a", kind, contents[kind] | {"trap": Trap()})
    with pytest.raises(ValueError, match=f"{path} is refused: it holds pickled objects"):
        open_latents(tmp_path, LTX2(folders["2.3"]))


def test_clips_that_cannot_be_used_are_named(folders, tmp_path):
    for index in range(3):
        write_clip_of(tmp_path, f"good{index}", seed=index)
    write_clip_of(tmp_path, "slow", fps=12.0)
    for name in ("deaf", "wordless"):
        write_clip_of(tmp_path, name)
    root = tmp_path / ".precomputed"
    (root / "audio_latents" / "deaf.pt").unlink()
    (root / "conditions" / "wordless.pt").unlink()
    write_clip_of(tmp_path, "damaged")
    path = root / "latents" / "damaged.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    data = PrecomputedDataset(tmp_path, LTX2(folders["2.3"]))
    assert [path.stem for path in data.clips] == ["good0", "good1", "good2"]
    reasons = {path.stem: reason for path, reason in data.skipped}
    assert reasons == {
        "deaf": "it lacks audio_latents/deaf.pt",
        "wordless": "it lacks conditions/wordless.pt",
        "damaged": "damaged.pt is damaged",
        "slow": "expected 35 audio latents, got 19: its sound lasts 0.76 s, its pictures 1.42 s at "
        "12 fps",
    }


def test_latents_of_another_model_are_refused(folders, tmp_path):
    write_clip_of(tmp_path, "a", "2.0")
    with pytest.raises(ValueError, match=r"video_features: expected .* of \[1024, 32\]"):
        open_latents(tmp_path, LTX2(folders["2.3"]))


def test_a_folder_without_latents_is_refused(folders, tmp_path):
    assert not is_precomputed(tmp_path)
    with pytest.raises(ValueError, match="expected a cache made by `syncdpo prepare` or"):
        open_latents(tmp_path, LTX2(folders["2.3"]))
    with pytest.raises(ValueError, match="expected a latent cache"):
        LatentDataset(tmp_path)


def test_too_little_sound_is_an_error_that_names_the_clip(folders, tmp_path):
    write_clip_of(tmp_path, "short", audio=AUDIO - 1)
    with pytest.raises(ValueError, match=f"short.pt: expected {AUDIO} audio latents"):
        open_latents(tmp_path, LTX2(folders["2.3"]))
