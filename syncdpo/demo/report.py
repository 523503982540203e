"""The demonstration's report: one html file that needs nothing beside it."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

import matplotlib.pyplot as plt

from syncdpo.data.files import readable
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

TITLE = "A generator learns to keep time"
BODY = Template("""<h1>$title</h1>
<p>$story Then every model writes the sound to $pictures, and what is seen and heard in the
resulting mp4 files is compared. “Own clips”: it generates $samples, picture and sound.</p>
$warnings$table
<p class="note">F1 counts a visible event as met when its sound leads by at most 90 ms or lags by
at most 185 ms (ITU-R BT.1359, acceptable; undetectable: 45 and 125 ms).$interval The onset error is
the distance from each visible event to the nearest sound. “Real clips” are the held-out clips with
their own sound, after the codec: a generator can be better only where that is not in step. SFT at
equal time takes as many steps as SyncDPO's floating-point operations allow. Seed $seed.</p>
<h2>Clips</h2>
<p>The first of these, to play; those of a column share their picture.</p>
$clips
<h2>Seen and heard</h2>
<p>Each line is one clip, the same in every column: marks above are events seen in its picture,
marks below are onsets heard in the model's sound. In step, they meet.</p>
$timeline
<h2>Training</h2>
$curves
""")
RENDERED = Template("""The base knows which sound goes with a ball that strikes the floor, but not
when. Supervised fine-tuning (SFT) and SyncDPO train it on the same $training synchronised
clips$offset, each the weights, and at the learning rate, that suit it best.""")
OWN = Template("""The base knows balls that strike a floor, and nothing of the clips of $folder.
Their pictures are brought to the place and spread of those that it knows. Supervised fine-tuning
(SFT) trains all its weights on $training of them; SyncDPO does so for its first $first steps, and
goes on with the sound's half$kept.""")
INTERVAL = """ In brackets: what it could have been with other clips of this kind (95 % of 2,000
draws of the held-out clips, with replacement)."""


def write_report(path: Path, report: dict, sampled: dict, logs: dict, real: Sequence[Path]) -> None:
    """Write `path` from report.json's content, `Samples` per method, logs per method, and some of
    the real clips' files."""
    methods = [row["method"] for row in report["rows"]]
    settings = report["settings"]
    shown = [(LABELS[m], sampled[m].given.paths[:SHOWN]) for m in methods]
    shown.append(("real clips, through the codec", real))
    clips, width = gallery([(label, list(map(Shown, paths))) for label, paths in shown])
    timeline = draw_timeline({m: sampled[m].given.metrics[:SHOWN] for m in methods})
    own = any("f1_interval" in row for row in report["rows"])
    body = BODY.substitute(
        title=TITLE,
        story=_story(settings, own),
        pictures=_pictures(settings, report["rows"][0]["clips"]),
        warnings=_warnings(report),
        table=_table(report),
        interval=INTERVAL if own else "",
        samples=settings["samples"],
        seed=settings["seed"],
        timeline=picture(timeline, "Timeline of seen and heard events per method"),
        curves=picture(draw_curves(logs), "Training curves"),
        clips=clips,
    )
    path.write_text(page(f"syncdpo: {TITLE[0].lower()}{TITLE[1:]}", body, width=width))


def _story(settings: dict, own: bool) -> str:
    if not own:
        offset = settings["offset_spread"]
        told = f" (to within {1000 * offset:g} ms, one standard deviation)" if offset else ""
        return RENDERED.substitute(training=settings["training_clips"], offset=told)
    validated = settings["validated_clips"]
    kept = (
        f"; {validated} further ones tell which step of each training is kept" if validated else ""
    )
    folder = f"<b>{html.escape(readable(Path(settings['clips']).name))}</b>"
    return OWN.substitute(
        folder=folder,
        training=settings["training_clips"],
        first=settings["first_steps"],
        kept=kept,
    )


def _pictures(settings: dict, sounds: int) -> str:
    """What a sound is written to."""
    held_out = settings["held_out_clips"]
    of_each = f", {sounds // held_out} sounds each" if sounds > held_out else ""
    return f"the pictures of {min(held_out, sounds)} clips that none was trained on{of_each}"


def _warnings(report: dict) -> str:
    """What is to be said of the table, and what the watchdog said of each training."""
    lines = list(report["remarks"])
    for row in report["rows"]:
        lines += [f"{LABELS[row['method']]}, {said}" for said in row.get("warnings", ())]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<ul class="warnings">{items}</ul>' if items else ""


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
        errors = [entry.get("audio_error", entry.get("audio_error_win")) for entry in log]
        values = running_mean(errors)
        left.plot(values, color=COLOURS[method], label=LABELS[method])
    left.set(xlabel="step", ylabel="audio error (winners)", yscale="log")
    left.legend(frameon=False, fontsize=9)
    steps = [i for i, entry in enumerate(logs["syncdpo"]) if "implicit_accuracy" in entry]
    preference = [logs["syncdpo"][i] for i in steps]
    accuracy = running_mean([entry["implicit_accuracy"] for entry in preference])
    difficulty = [entry["difficulty"] for entry in preference]
    right.plot(steps, accuracy, color=COLOURS["syncdpo"], label="implicit accuracy")
    right.plot(steps, difficulty, color="#8a8f98", ls="--", label="difficulty")
    right.set(xlabel="step", ylim=(0, 1.02))
    right.legend(frameon=False, fontsize=9)
    for axis in (left, right):
        axis.spines[["right", "top"]].set_visible(False)
    figure.tight_layout()
    return figure


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
    cells = ["" if value is None else form.format(value) for form, value in values]
    if row.get("f1_interval"):
        low, high = row["f1_interval"]
        cells[0] += f"\N{NO-BREAK SPACE}({low:.2f}–\N{WORD JOINER}{high:.2f})"
    kept, steps = row.get("kept_step"), row.get("steps")
    if kept is not None and kept != steps:
        cells[[key for key, _, _ in COLUMNS].index("steps")] += f", {kept} kept"
    return [label, *cells]
