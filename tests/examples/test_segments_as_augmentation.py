"""examples/segments_as_augmentation.py: what is cut, what stays in step, what it is called."""

import pytest
import torch
from from_examples import load, run

pytest.importorskip("av")
from recordings import click_and_flash

from syncdpo.data import write_clip


@pytest.fixture
def folder(tmp_path):
    for label, when in (("early", 0.25), ("late", 1.25)):
        (tmp_path / label).mkdir()
        for k in range(2):
            write_clip(tmp_path / label / f"{k}.mp4", click_and_flash(when + k * 0.25))
    return tmp_path


def items(count=6):
    """Clips whose pictures and samples say whose they are and when."""
    clip = torch.arange(count)
    video = clip[:, None] * 40 + torch.arange(48) % 40  # uint8
    audio = clip[:, None] * 100_000.0 + torch.arange(32_000)
    pictures = video.to(torch.uint8)[:, :, None, None, None].expand(-1, -1, 2, 2, 3)
    return [(pictures[k], audio[k], k % 3) for k in range(count)]


def test_the_same_seconds_of_both_come_from_one_other_clip_and_labels_tell_how_many():
    torch.manual_seed(0)
    batch = items()
    video, audio, shares = load("segments_as_augmentation").CutSegments(3, chance=1.0)(batch)
    for k in range(len(batch)):
        owner = (audio[k] / 100_000).floor().long()
        donor = (k - 1) % len(batch)
        assert set(owner.tolist()) == {k, donor}
        cut = (owner == donor).nonzero()[:, 0]
        assert len(cut) == cut[-1] - cut[0] + 1  # one stretch
        assert 0.25 * 16_000 - 1 <= len(cut) <= 16_000
        pictures = (video[k, :, 0, 0, 0] != batch[k][0][:, 0, 0, 0]).nonzero()[:, 0]
        for own, heard in ((pictures[0], cut[0]), (pictures[-1] + 1, cut[-1] + 1)):
            assert abs(own / 24 - heard / 16_000) <= 0.5 / 24 + 1e-3
        moved = audio[k, cut[0]] - donor * 100_000 - cut[0]
        assert (audio[k, cut] - donor * 100_000 - cut == moved).all()
        share = len(cut) / 32_000
        expected = torch.zeros(3)
        expected[k % 3] += 1 - share
        expected[donor % 3] += share
        torch.testing.assert_close(shares[k], expected, rtol=0, atol=1e-4)


def test_without_the_chance_clips_stay_as_they_are():
    batch = items()
    video, audio, shares = load("segments_as_augmentation").CutSegments(3, chance=0.0)(batch)
    assert all(torch.equal(video[k], batch[k][0]) for k in range(6))
    assert all(torch.equal(audio[k], batch[k][1]) for k in range(6))
    assert torch.equal(shares, torch.eye(3).repeat(2, 1))


def test_a_click_and_its_flash_stay_together_through_files_and_cuts(folder):
    example = load("segments_as_augmentation")
    clips = example.Clips(folder)
    assert clips.classes == ["early", "late"]
    torch.manual_seed(1)
    cut = example.CutSegments(2, chance=1.0)
    seen = 0
    for _ in range(8):
        for video, audio in zip(*cut([clips[k] for k in range(4)])[:2], strict=True):
            flashes = (video.float().mean((1, 2, 3)) > 130).nonzero()[:, 0] / 24
            loud = (audio.abs() > 0.3).nonzero()[:, 0] / 16_000
            seen += len(flashes) > 1
            for flash in flashes:
                assert ((loud - flash).abs() < 1 / 24).any()
    assert seen  # some clips show their own event and another's


def test_it_runs_from_the_command_line(folder, monkeypatch, capsys):
    run(monkeypatch, "segments_as_augmentation", folder)
    assert capsys.readouterr().out.startswith("[4, 48, 64, 64, 3] [4, 32000] [[")


def test_a_folder_without_clips_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected readable clips below"):
        load("segments_as_augmentation").Clips(tmp_path)
