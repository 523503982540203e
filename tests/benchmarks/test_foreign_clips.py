"""Folders of foreign clips: what happens in them can be seen and heard, where they say it does."""

import numpy as np
import pytest
from scripts import module

from syncdpo.metrics import clip_metrics, match_events

foreign_clips = module("foreign_clips")


@pytest.mark.parametrize("kind", foreign_clips.KINDS)
def test_what_happens_is_seen_and_heard(kind):
    happened = seen = heard = 0
    for seed in range(4):
        clip, times = foreign_clips.make_clip(kind, seed)
        metrics = clip_metrics(clip)
        happened += len(times)
        seen += len(match_events(times, metrics.seen, 0.06))
        heard += len(match_events(times, metrics.heard, 0.06))
        assert np.all(np.diff(times) > 0)
    assert happened >= 8
    assert min(seen, heard) / happened > 0.85  # not at the ends, where nothing can be seen


def test_a_clip_is_a_function_of_its_kind_and_seed():
    first, again, other = (foreign_clips.make_clip("keys", seed)[0] for seed in (3, 3, 4))
    assert first.video.equal(again.video)
    assert first.audio.equal(again.audio)
    assert not first.video.equal(other.video)


def test_a_folder_goes_on_where_another_ended(tmp_path):
    foreign_clips.make_folder("squares", tmp_path, count=2, first=7)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["squares-0007.mp4", "squares-0008.mp4"]


def test_a_recorded_clips_sound_is_off_by_as_much_throughout():
    offsets = []
    for seed in range(6):
        (exact, _), (clip, _) = (
            foreign_clips.make_clip("drops", seed, spread) for spread in (0.0, 0.06)
        )
        assert clip.video.equal(exact.video)
        before, after = (clip_metrics(c) for c in (exact, clip))
        pairs = match_events(before.heard, after.heard, 0.2)
        moved = np.array([after.heard[j] - before.heard[i] for i, j in pairs])
        assert moved.std() < 0.01
        offsets.append(moved.mean())
    assert 0.02 < np.std(offsets) < 0.12
