"""The demonstration's report: one html file that needs nothing beside it."""

from __future__ import annotations

import math
from pathlib import Path
from string import Template

import matplotlib.pyplot as plt

from syncdpo.report.curves import running_mean
from syncdpo.report.page import page, picture, table
from syncdpo.report.players import Shown, gallery

LABELS = {
    "base": "base",
    "sft": "SFT, equal steps",
    "sft-equal-time": "SFT, equal time",
    "syncdpo": "SyncDPO",
}
COLOURS = {"base": "#8a8f98", "sft": "#d08c2e", "sft-equal-time": "#a05a1c", "syncdpo": "#1f77b4"}
SHOWN = 5  # clips per method, in the timeline and to play
COLUMNS = (
    ("f1", "F1", "{:.2f}"),
    ("onset_error_ms", "mean onset error, ms", "{:.0f}"),
    ("onset_error_median_ms", "median, ms", "{:.0f}"),
    ("events_per_clip", "sounds per clip", "{:.2f}"),
    ("own_f1", "own clips: F1", "{:.2f}"),
    ("own_onset_error_ms", "own clips: mean onset error, ms", "{:.0f}"),
    ("weights", "weights trained", "{}"),
    ("steps", "steps", "{:d}"),
    ("cpu_seconds", "CPU seconds", "{:.0f}"),
)

BODY = Template("""<h1>A generator learns to keep time</h1>
<p>The base knows which sound goes with a ball that strikes the floor, but not when. Supervised
fine-tuning (SFT) and SyncDPO train it on the same $training synchronised clips$offset, each the
weights, and at the learning rate, that suit it best. Then every model writes the sound to the
pictures of $held_out clips that none was trained on, and what is seen and heard in the resulting
mp4 files is compared. “Own clips”: it generates $samples, picture and sound.</p>
$table
<p class="note">F1 counts a visible impact as met when its sound leads by at most 90 ms or lags by
at most 185 ms (ITU-R BT.1359, acceptable; undetectable: 45 and 125 ms). The onset error is the
distance from each visible impact to the nearest sound. “Real clips” are the held-out clips with
their own sound, after the codec: as good as a generator can get. Seed $seed.</p>
<h2>Clips</h2>
<p>The first of these, to play; those of a column share their picture.</p>
$clips
<h2>Seen and heard</h2>
<p>Each line is one clip, the same in every column: marks above are impacts seen in its picture,
marks below are onsets heard in the model's sound. In step, they meet.</p>
$timeline
<h2>Training</h2>
$curves
""")


def write_report(path: Path, report: dict, sampled: dict, logs: dict) -> None:
    """Write `path` from report.json's content, `Samples` per method, and logs per method."""
    methods = [row["method"] for row in report["rows"]]
    clips, width = gallery(
        [(LABELS[m], [Shown(path) for path in sampled[m].given.paths[:SHOWN]]) for m in methods]
    )
    timeline = draw_timeline({m: sampled[m].given.metrics[:SHOWN] for m in methods})
    body = BODY.substitute(
        table=_table(report),
        training=report["settings"]["training_clips"],
        held_out=report["settings"]["held_out_clips"],
        offset=_offset(report["settings"]["offset_spread"]),
        samples=report["settings"]["samples"],
        seed=report["settings"]["seed"],
        timeline=picture(timeline, "Timeline of seen and heard events per method"),
        curves=picture(draw_curves(logs), "Training curves"),
        clips=clips,
    )
    path.write_text(page("syncdpo: a generator learns to keep time", body, width=width))


def draw_timeline(metrics: dict[str, list]) -> plt.Figure:
    """Seen events as marks above each line, heard ones below; one panel per method."""
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(3.1 * len(metrics), 3.2), sharex=True, sharey=True
    )
    for axis, (method, clips) in zip(axes, metrics.items(), strict=True):
        for line, clip in enumerate(clips):
            axis.axhline(line, color="#dfe3e8", lw=0.8, zorder=0)
            axis.vlines(clip.seen, line - 0.38, line, color="#1c2127", lw=2)
            axis.vlines(clip.heard, line, line + 0.38, color=COLOURS[method], lw=2)
        axis.set_title(LABELS[method], fontsize=10)
        axis.set_xlabel("seconds")
        axis.set_yticks([])
        axis.spines[["left", "right", "top"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def draw_curves(logs: dict[str, list[dict]]) -> plt.Figure:
    """Audio error of what is learnt from, by step; implicit accuracy and difficulty of SyncDPO."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
    for method, log in logs.items():
        name = "audio_error" if "audio_error" in log[0] else "audio_error_win"
        values = running_mean([entry[name] for entry in log])
        left.plot(values, color=COLOURS[method], label=LABELS[method])
    left.set(xlabel="step", ylabel="audio error (winners)", yscale="log")
    left.legend(frameon=False, fontsize=9)
    preference = next(log for log in logs.values() if "implicit_accuracy" in log[0])
    accuracy = running_mean([entry["implicit_accuracy"] for entry in preference])
    right.plot(accuracy, color=COLOURS["syncdpo"], label="implicit accuracy")
    right.plot([e["difficulty"] for e in preference], color="#8a8f98", ls="--", label="difficulty")
    right.set(xlabel="step", ylim=(0, 1.02))
    right.legend(frameon=False, fontsize=9)
    for axis in (left, right):
        axis.spines[["right", "top"]].set_visible(False)
    figure.tight_layout()
    return figure


def _offset(spread: float | None) -> str:
    """How exactly rendered clips are in step; of a user's own clips nobody knows."""
    if not spread:
        return ""
    return f" (to within {1000 * spread:g} ms, one standard deviation)"


def _table(report: dict) -> str:
    best = min(report["rows"], key=lambda row: row["onset_error_ms"] or math.inf)
    rows = [
        ("best" if row is best else "", _cells(LABELS[row["method"]], row))
        for row in report["rows"]
    ]
    rows.append(("real", _cells("real clips", report["real"])))
    return table(["after", *(title for _, title, _ in COLUMNS)], rows)


def _cells(label: str, row: dict) -> list[str]:
    values = ((form, row.get(key)) for key, _, form in COLUMNS)
    return [label, *("" if value is None else form.format(value) for form, value in values)]
