"""Rule-made losers on raw clips, as files and a table for somebody else's preference trainer.

`replace` overwrites a segment by another moment of the clip; half of the winners are cut as well,
sound and picture alike, so that seams give nothing away. `scale`, `warp`, `shift` move the sound
and keep its pitch. Winners are encoded anew as losers are; captions: a .txt beside each clip.
Run: python examples/losers_for_another_trainer.py clips/ pairs/ replace
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import torch

from syncdpo.data import find_clips, read_clip, write_clip
from syncdpo.negatives import Timeline, make_pairs, parse_rule, warp_keeping_pitch


def winner_and_loser(clip, rule, difficulty):
    if rule == "replace":
        pairs = make_pairs(
            clip.video[None], clip.audio.T[None], parse_rule("replace(crossfade=0.01)"), difficulty,
            video_timeline=Timeline(len(clip.video), clip.fps),
            audio_timeline=Timeline(clip.audio.shape[1], float(clip.sample_rate)),
        )  # fmt: skip
        halves = (pairs.win, pairs.lose)
        win, lose = (replace(clip, video=v[0], audio=a[0].T.contiguous()) for v, a in halves)
    else:
        drawn = parse_rule(rule).draw(1, difficulty, clip.seconds)
        drawn = drawn[torch.zeros(len(clip.audio), dtype=torch.long)]  # one for all channels
        moved = warp_keeping_pitch(clip.audio, drawn, clip.sample_rate)
        win, lose = clip, replace(clip, audio=moved.clamp(-1, 1))
    if (win.audio - lose.audio).abs().max() < 0.01:
        raise ValueError("winner and loser sound the same; another rule or seed may do")
    return win, lose


def main(source, target, rule, difficulty=0.3):
    Path(target).mkdir(parents=True, exist_ok=True)
    clips, left_out = find_clips(source)
    rows = [("win", "lose", "caption")]
    for number, path in enumerate(clips):
        text, names = path.with_suffix(".txt"), [f"{number:06d}_{k}.mp4" for k in ("win", "lose")]
        try:
            pair = winner_and_loser(read_clip(path, require_sound=True), rule, difficulty)
            for name, clip in zip(names, pair, strict=True):
                write_clip(Path(target, name), clip)
        except ValueError as error:  # a clip that cannot be read, used or written
            left_out.append((path, error))
        else:
            rows.append((*names, text.read_text("utf-8").strip() if text.exists() else ""))
    print(*(f"left out {path}: {reason}\n" for path, reason in left_out), sep="", end="")
    with open(Path(target, "pairs.csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:4])
