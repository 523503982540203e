"""A `.precomputed` folder of several sizes and rates trains whole: no clip is lost to others."""

from collections import Counter

import pytest
import torch
from tiny_ltx2 import save_tiny_ltx2

from syncdpo.data.buckets import Bucket
from syncdpo.data.precomputed import PrecomputedDataset, open_latents
from syncdpo.models.ltx2 import LTX2
from syncdpo.train import train
from syncdpo.training.config import TrainConfig

TOKENS = 1024
WIDE, TALL, BRIEF, SLOW = (6, 1, 2, 24.0), (6, 2, 1, 24.0), (3, 2, 2, 24.0), (6, 1, 2, 25.0)
CLIPS = {"a": WIDE, "b": TALL, "c": WIDE, "d": BRIEF, "e": SLOW, "deep/f": WIDE, "g": BRIEF}


def write(root, name, form, number):
    frames, rows, columns, fps = form
    generator = torch.Generator().manual_seed(number)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    seconds = (8 * (frames - 1) + 1) / fps
    audio = round(seconds * 25) + 1
    mask = torch.arange(TOKENS) >= TOKENS - 20
    contents = {
        "latents": {
            "latents": randn(8, frames, rows, columns),
            "num_frames": frames, "height": rows, "width": columns, "fps": fps,
        },
        "audio_latents": {
            "latents": randn(2, audio, 2), "num_time_steps": audio, "frequency_bins": 2,
            "duration": seconds,
        },
        "conditions": {
            "video_prompt_embeds": randn(TOKENS, 32) * mask[:, None],
            "audio_prompt_embeds": randn(TOKENS, 16) * mask[:, None],
            "prompt_attention_mask": mask,
        },
    }  # fmt: skip
    for kind, content in contents.items():
        path = root / ".precomputed" / kind / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)


def folder_of(root, clips):
    for name in clips:
        write(root, name, CLIPS[name], [*CLIPS].index(name))
    return root


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory):
    return save_tiny_ltx2(tmp_path_factory.mktemp("ltx2"), "2.3", layers=1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("mixed"), CLIPS)


def names(data):
    latents = data.root / "latents"
    return [path.relative_to(latents).with_suffix("").as_posix() for path in data.clips]


def test_all_clips_are_used_and_their_formats_said(ltx2, mixed):
    model = LTX2(ltx2)
    data = open_latents(mixed, model)
    assert sorted(names(data)) == sorted(CLIPS)
    assert data.skipped == []
    expected = {WIDE: (41, 32, 64, 24.0), TALL: (41, 64, 32, 24.0), BRIEF: (17, 64, 64, 24.0),
                SLOW: (41, 32, 64, 25.0)}  # fmt: skip
    assert data.buckets == [Bucket(*expected[CLIPS[name]]) for name in names(data)]
    assert data.summary.splitlines() == [
        f"7 of 7 clips in {data.root} used",
        "  3 of 6x1x2 latents at 24 fps",
        "  2 of 3x2x2 latents at 24 fps",
        "  1 of 6x2x1 latents at 24 fps",
        "  1 of 6x1x2 latents at 25 fps",
    ]
    assert model.latent_size == (6, 1, 2)  # the commonest


def test_a_clip_is_read_as_in_a_folder_of_its_own_kind(ltx2, mixed, tmp_path):
    data = PrecomputedDataset(mixed, LTX2(ltx2))
    found = dict(zip(names(data), data, strict=True))
    for form in (WIDE, TALL, BRIEF, SLOW):
        own = folder_of(tmp_path / str(form), [n for n in CLIPS if CLIPS[n] == form])
        alone = PrecomputedDataset(own, LTX2(ltx2))
        for name, sample in zip(names(alone), alone, strict=True):
            assert all(torch.equal(found[name][key], sample[key]) for key in sample)


def test_every_clip_is_trained_on(ltx2, mixed, tmp_path, monkeypatch):
    seen = Counter()
    read = PrecomputedDataset.__getitem__

    def watched(self, index):
        seen[names(self)[index]] += 1
        return read(self, index)

    data = open_latents(mixed, LTX2(ltx2))
    monkeypatch.setattr(PrecomputedDataset, "__getitem__", watched)
    config = TrainConfig(
        output=str(tmp_path), steps=14, batch_size=1, lora_rank=2, warmup=1, learning_rate=1e-3
    )
    assert train(config, LTX2(ltx2), data, progress=False)["skipped"] == 0
    assert seen == dict.fromkeys(CLIPS, 2)  # two epochs of seven clips


def test_a_still_is_left_out_by_name(ltx2, tmp_path):
    folder_of(tmp_path, ["a", "b"])
    write(tmp_path, "still", (1, 1, 2, 24.0), 9)
    data = PrecomputedDataset(tmp_path, LTX2(ltx2))
    assert sorted(names(data)) == ["a", "b"]
    assert "  still.pt: it is a still, with no time to be in step" in data.summary.splitlines()


def test_sound_that_is_short_by_the_common_rate_is_named(ltx2, tmp_path):
    """121 pictures are 126 audio latents long at 24.10 pictures a second, and 125 at 24.11."""
    for index in range(3):
        write(tmp_path, f"{index}", (16, 1, 2, 24.10), index)
    write(tmp_path, "quick", (16, 1, 2, 24.11), 3)
    path = tmp_path / ".precomputed" / "audio_latents" / "quick.pt"
    content = torch.load(path)
    kept = content["latents"][:, :125]
    torch.save(content | {"latents": kept, "num_time_steps": 125}, path)
    data = PrecomputedDataset(tmp_path, LTX2(ltx2))
    assert names(data) == ["0", "1", "2"]
    assert "  quick.pt: expected 126 audio latents, got 125" in data.summary.splitlines()
