"""Artefact probe: can the losers be told from the winners by their sound alone?

A rule is to teach timing, which lies between picture and sound. Where a small network that hears
only the sound prefers the winners, the rule leaves a trace (blur, a seam, a cut tail) that a
generator may learn to avoid instead. Near one half: the rule teaches time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncdpo.negatives.distortion import RULES
from syncdpo.negatives.pairs import Pairs, draw_pairs
from syncdpo.negatives.rules import Rule, parse_rule
from syncdpo.negatives.timeline import Timeline

WIDTH = 24
BATCH = 64
HELD_OUT = 0.3
FEWEST = 8  # clips


class Listener(nn.Module):
    """Scores sounds [N, C, T] by local patterns: two convolutions, then mean and peak over time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, WIDTH, 5, padding=2)
        self.second = nn.Conv1d(WIDTH, WIDTH, 5, padding=2)
        self.score = nn.Linear(2 * WIDTH, 1)

    def forward(self, sound: Tensor) -> Tensor:
        x = F.gelu(self.second(F.gelu(self.first(sound))))
        return self.score(torch.cat([x.mean(2), x.amax(2)], dim=1))[:, 0]


class Finding(NamedTuple):
    """`accuracy`: share of `pairs` unheard before whose winner the listener preferred."""

    rule: str
    difficulty: float
    matched: float
    accuracy: float
    pairs: int


def probe(
    audio: Tensor,
    rule: Rule | str,
    difficulty: float,
    *,
    video_timeline: Timeline,
    audio_timeline: Timeline,
    matched: float = 0.0,
    steps: int = 200,
    draws: int = 4,
    seed: int = 0,
) -> Finding:
    """Train a listener on pairs of one rule and test it on pairs of clips it has not heard.

    Args:
        audio: [N, ...] sound of synchronised clips, N at least 8; the last 30 % are the test.
        rule, difficulty, matched: which pairs, as in `syncdpo.negatives.pairs.make_pairs`.
        video_timeline: decides where matched segments begin, though no picture is seen.
        steps: of Adam on 64 pairs each, drawn anew every time.
        draws: pairs per test clip.

    Raises:
        ValueError: fewer than 8 clips.
    """
    if audio.shape[0] < FEWEST:
        raise ValueError(f"audio: expected at least {FEWEST} clips, got {audio.shape[0]}")
    name = rule if isinstance(rule, str) else repr(rule)
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    generator = torch.Generator().manual_seed(seed)
    heard = audio.shape[0] - max(1, round(HELD_OUT * audio.shape[0]))

    def pairs(clips: Tensor) -> Pairs:
        draw = draw_pairs(
            clips.shape[0],
            rule,
            difficulty,
            video_timeline=video_timeline,
            audio_timeline=audio_timeline,
            matched=matched,
            generator=generator,
        )
        return draw.make(_blank(video_timeline, clips.shape[0]), clips)

    def train_batch() -> Pairs:
        return pairs(audio[torch.randint(heard, (BATCH,), generator=generator)])

    listener = _train(audio[:heard], audio_timeline, train_batch, steps, seed)
    test = pairs(audio[heard:].repeat_interleave(draws, dim=0))
    margin = (listener(test.win[1]) - listener(test.lose[1]))[test.valid]
    preferred = (margin.sign().double() + 1) / 2  # a tie is half a guess
    return Finding(name, difficulty, matched, preferred.mean().item(), len(preferred))


def probe_all(
    audio: Tensor,
    *,
    video_timeline: Timeline,
    audio_timeline: Timeline,
    rules: Sequence[Rule | str] = RULES,
    difficulties: Sequence[float] = (0.0, 0.5, 1.0),
    shares: Sequence[float] = (0.0, 1.0),
    **options,
) -> list[Finding]:
    """One finding per rule, share of matched pairs and difficulty; `options` as in `probe`."""
    timelines = {"video_timeline": video_timeline, "audio_timeline": audio_timeline}
    return [
        probe(audio, rule, difficulty, matched=matched, **timelines, **options)
        for rule in rules
        for matched in shares
        for difficulty in difficulties
    ]


def table(findings: Sequence[Finding]) -> str:
    """The findings as a Markdown table: a row per rule and share, a column per difficulty."""
    difficulties = sorted({finding.difficulty for finding in findings})
    cells = {(f.rule, f.matched, f.difficulty): f"{f.accuracy:.0%}" for f in findings}
    rows = list(dict.fromkeys((f.rule, f.matched) for f in findings))
    lines = [
        "| rule | matched | " + " | ".join(f"d = {d:g}" for d in difficulties) + " |",
        "| --- | --- |" + " --- |" * len(difficulties),
    ]
    for rule, matched in rows:
        row = " | ".join(cells.get((rule, matched, d), "") for d in difficulties)
        lines.append(f"| {rule} | {matched:.0%} | {row} |")
    return "\n".join(lines)


def _train(heard: Tensor, timeline: Timeline, batch, steps: int, seed: int):
    """A listener on the project's own axes: takes sound as the pairs hold it."""

    def channels_first(x: Tensor) -> Tensor:
        frames = x.movedim(timeline.dim, -1).unflatten(-1, (timeline.frames, timeline.tokens))
        return frames.movedim(-2, -1).flatten(1, -2).float()

    sound = channels_first(heard)
    mean, spread = sound.mean((0, 2), keepdim=True), sound.std((0, 2), keepdim=True) + 1e-6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        listener = Listener(sound.shape[1])
    optimiser = torch.optim.Adam(listener.parameters(), lr=3e-3)

    def score(x: Tensor) -> Tensor:
        return listener((channels_first(x) - mean) / spread)

    for _ in range(steps):
        pairs = batch()
        margin = score(pairs.win[1]) - score(pairs.lose[1])
        loss = (F.softplus(-margin) * pairs.valid).sum() / pairs.valid.sum().clamp(min=1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return torch.no_grad()(score)


def _blank(timeline: Timeline, batch: int) -> Tensor:
    """A picture that shows nothing, for pairs of which only the sound is heard."""
    shape = [batch] + [1] * max(timeline.dim, 1)
    shape[timeline.dim] = timeline.frames * timeline.tokens
    return torch.zeros(shape)
