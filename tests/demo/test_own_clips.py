"""A user's own clips: how they are divided, how the model sees them, what is said of the table."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from syncdpo.demo.own_clips import (
    DRAWS,
    KNOWN_SPREAD,
    StandardisedTiny,
    Statistics,
    f1_interval,
    remarks,
    repeated,
    split,
)
from syncdpo.metrics import ClipMetrics


class Latents(torch.utils.data.Dataset):
    """Bright, still pictures with a little that moves."""

    def __init__(self, clips: int):
        self.names = [f"{i:03d}" for i in range(clips)]
        generator = torch.Generator().manual_seed(0)
        self.video = (
            4 + torch.arange(40.0) / 10 + 0.1 * torch.randn(clips, 96, 40, generator=generator)
        )
        self.audio = torch.randn(clips, 50, 32, generator=generator)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return {"video": self.video[index], "audio": self.audio[index]}


@pytest.mark.parametrize(
    ("clips", "training", "validated", "measured"),
    [(2, 1, 0, 1), (8, 6, 0, 2), (31, 23, 0, 8), (32, 20, 4, 8), (120, 75, 15, 30)],
)
def test_every_clip_has_one_use(clips, training, validated, measured):
    found = uses(clips)
    assert [len(part) for part in found] == [training, validated, measured]
    assert sorted(itertools.chain(*found)) == list(range(clips))


def uses(clips: int) -> list[list[int]]:
    parts = split(Latents(clips), Path("clips"))
    looked_at = parts.validated.data.indices if parts.validated else []
    return [parts.training.indices, looked_at, parts.measured.indices]


def test_each_validated_clip_has_draws_of_its_own():
    parts = split(Latents(32), Path("clips"))
    assert len(parts.validated) == DRAWS * 4
    assert len(set(parts.validated.names)) == DRAWS * 4
    first, again = parts.validated[1], parts.validated[5]
    assert torch.equal(first["video"], again["video"])
    assert torch.equal(first["audio"], Latents(32)[11]["audio"])


def test_further_clips_at_the_end_change_no_clips_use():
    for old, new in zip(uses(40), uses(56), strict=True):
        assert [index for index in new if index < 40] == old


def test_the_model_sees_what_it_knows():
    """Place and spread, of the clips that are trained on, whatever their brightness."""
    parts = split(Latents(64), Path("clips"))
    seen = torch.stack([sample["video"] for sample in parts.training])
    assert seen.unflatten(1, (24, 4)).mean((0, 1)).abs().max() < 1e-4
    assert seen.std().item() == pytest.approx(KNOWN_SPREAD, rel=1e-3)
    held_out = torch.stack([sample["video"] for sample in parts.measured])
    assert held_out.mean().abs() < 0.05  # by the others' statistics, not its own


def test_standardising_is_undone_when_clips_are_made():
    latents = Latents(16)
    statistics = Statistics.of(latents.video)
    torch.testing.assert_close(statistics.undo(statistics.apply(latents.video)), latents.video)
    plain = StandardisedTiny(Statistics(torch.zeros(4, 40), torch.tensor(1.0)))
    ours = StandardisedTiny(statistics)
    seen = statistics.apply(latents.video[:1])
    (expected,), (got,) = (
        model.decode(video, latents.audio[:1])
        for model, video in ((plain, latents.video[:1]), (ours, seen))
    )
    assert (expected.video.int() - got.video.int()).abs().max() <= 1
    assert torch.equal(expected.audio, got.audio)


def test_pictures_that_never_change_are_no_division_by_nothing():
    video = torch.full((4, 96, 40), 3.0)
    assert Statistics.of(video).apply(video).abs().max() == 0


def test_a_picture_gets_several_sounds_where_pictures_are_few():
    assert repeated("abc", 8) == list("abcabc")
    assert repeated("abc", 2) == list("ab")
    assert repeated("a", 3) == list("aaa")


def metrics(seen: list[float], heard: list[float]) -> ClipMetrics:
    return ClipMetrics(np.array(seen), np.array(heard), seconds=2.0)


def test_an_interval_is_of_pictures_not_of_sounds():
    """A clip that is met and one that is not: anything between all and nothing, however many sounds
    each is given. Of very many clips it is narrow, and where F1 is."""
    met, missed = metrics([0.5], [0.5]), metrics([0.5], [1.5])
    assert f1_interval([met, missed] * 50, pictures=2) == [0.0, 1.0]
    low, high = f1_interval([met, missed] * 200, pictures=400)
    assert 0.44 < low < 0.5 < high < 0.56
    assert f1_interval([met] * 3, pictures=3) == [1.0, 1.0]
    assert f1_interval([metrics([], [])] * 3, pictures=3) is None


def row(method: str, f1: float | None, seen: float = 3.0) -> dict:
    return {"method": method, "f1": f1, "seen_per_clip": seen, "f1_interval": [0.1, 0.9]}


def test_nothing_is_said_of_a_table_that_says_it():
    assert remarks([row("base", 0.4), row("sft", 0.6), row("syncdpo", 0.9)], clips=30) == []


def test_too_few_clips_are_named():
    (said,) = remarks([row("base", 0.4), row("syncdpo", 0.9)], clips=5)
    assert said.startswith("5 held-out clips are too few")
    assert "0.10 to 0.90" in said
    assert "64 clips or more" in said


def test_a_method_that_is_ahead_of_ours_is_named():
    (said,) = remarks([row("sft", 0.9), row("syncdpo", 0.7)], clips=30)
    assert "not ahead" in said
    assert "0.70" in said
    assert "SFT, equal steps 0.90" in said


def test_pictures_in_which_nothing_happens_are_named():
    (said,) = remarks([row("sft", None, 0.0), row("syncdpo", None, 0.0)], clips=30)
    assert said.startswith("Nothing is seen to happen")
