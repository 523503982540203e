"""The probe hears what can be heard, and nothing where there is nothing to hear."""

import pytest
import torch

from syncdpo.negatives import Replace, Shift, Timeline
from syncdpo.negatives.distortion import Distortion
from syncdpo.negatives.probe import Finding, probe, probe_all, table

TIMELINES = {
    "video_timeline": Timeline(12, 6.0, tokens=2),
    "audio_timeline": Timeline(24, 12.0),
}


def sounds(count=160, frames=24, channels=4):
    """Clicks at random times, each with a tail that falls off: they sound different backwards."""
    generator = torch.Generator().manual_seed(5)
    clicks = (torch.rand(count, frames, channels, generator=generator) < 0.12).float()
    level = torch.zeros(count, channels)
    out = []
    for click in clicks.unbind(1):
        level = torch.maximum(0.6 * level, click)
        out.append(level)
    return torch.stack(out, dim=1)


class Louder(Replace):
    """A rule with a trace that nobody could miss: what it replaces is twice as loud."""

    def _tries(self, setting):
        ((first, second),) = super()._tries(setting)
        loud = type("Loud", (Distortion,), {"apply": lambda self, x, timeline: 2 * x})
        return [(first, loud(**vars(second)))]


@pytest.fixture(scope="module")
def audio():
    return sounds()


def test_a_plain_trace_is_heard(audio, monkeypatch):
    monkeypatch.setattr(Distortion, "aligned", lambda self, *timelines: self)
    finding = probe(audio, Louder(), 0.5, steps=40, **TIMELINES)
    assert finding.accuracy > 0.95


def test_backwards_sound_is_heard_in_plain_pairs_and_not_in_matched_ones(audio):
    rule = Shift(coarse=(0.9, 1.0), boundary="reflect")
    plain, matched = probe_all(
        audio, rules=[rule], difficulties=[0.0], shares=[0.0, 1.0], steps=60, draws=8, **TIMELINES
    )
    assert plain.accuracy > 0.75
    # Chance is one half; three standard errors of so many pairs.
    assert abs(matched.accuracy - 0.5) <= 3 * 0.5 / matched.pairs**0.5
    assert matched.pairs > 300


def test_a_seed_tells_everything(audio):
    first, again, other = (
        probe(audio, "scale", 0.5, steps=5, seed=seed, **TIMELINES) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_too_few_clips_are_refused(audio):
    with pytest.raises(ValueError, match="at least 8 clips, got 7"):
        probe(audio[:7], "scale", 0.5, **TIMELINES)


def test_table():
    findings = [Finding("shift", d, m, 0.5 + d / 4 + m / 8, 99) for m in (0.0, 1.0) for d in (0, 1)]
    assert table(findings).splitlines() == [
        "| rule | matched | d = 0 | d = 1 |",
        "| --- | --- | --- | --- |",
        "| shift | 0% | 50% | 75% |",
        "| shift | 100% | 62% | 88% |",
    ]


def test_sounds_that_score_the_same_count_half():
    """Hits moved within a clip score exactly the same: a tie prefers neither."""
    at = torch.randint(24, 72, (80, 1), generator=torch.Generator().manual_seed(0))
    clips = torch.exp(-((torch.arange(96) - at) ** 2) / 2.0)[..., None]
    timelines = {"video_timeline": Timeline(48, 12.0), "audio_timeline": Timeline(96, 24.0)}
    finding = probe(clips, Shift(), 1.0, matched=1.0, steps=1, draws=16, **timelines)
    assert abs(finding.accuracy - 0.5) <= 3 * 0.5 / finding.pairs**0.5
