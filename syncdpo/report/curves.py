"""Figures by step, as small pictures beside each other: one panel for what belongs together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt

COLOURS = ("#1f77b4", "#d08c2e", "#1a7f37", "#8a8f98", "#a05a1c", "#7b4fa3")
COLUMNS = 3
Series = Mapping[str, Sequence[tuple[int, float]]]  # name → (step, value)
TRAINING = {  # title → names in the log, as the legend has them
    "loss": {"loss": "loss"},
    "error of the sound (log)": {
        "audio_error": "error",
        "audio_error_win": "winner",
        "audio_error_lose": "loser",
        "audio_reference_win": "winner, reference",
    },
    "error of the picture (log)": {
        "video_error": "error",
        "video_error_win": "winner",
        "video_error_lose": "loser",
        "video_reference_win": "winner, reference",
    },
    "accuracy and difficulty": {
        "implicit_accuracy": "implicit accuracy",
        "difficulty": "difficulty",
        "valid": "pairs that count",
    },
    "margin": {"margin": "margin"},
    "gradient norm (log)": {"grad_norm": "before it is shortened"},
    "steps skipped": {"skipped": "so far"},
}
QUIET = {"skipped": 0.0, "valid": 1.0}  # not drawn where they are so all the time
HELD_OUT = {
    "held-out accuracy": lambda name: name.startswith("accuracy"),
    "held-out margin": lambda name: name.startswith("margin"),
    "held-out error, of the reference's": lambda name: name.endswith("ratio"),
    "held-out loss of SFT": lambda name: name == "sft_loss",
}
SAMPLES = {
    "samples: F1, AV-Align": lambda name: name in ("f1", "av_align"),
    "samples: onset error, ms": lambda name: name == "onset_error_ms",
    "samples: events per clip": lambda name: name in ("events_per_clip", "seen_per_clip"),
}
NO_CURVE = {"clips", "best_step"}


def training_panels(log: Sequence[Mapping]) -> dict[str, Series]:
    """Of the rows of steps: what there is of `TRAINING`, then whatever else is in them."""
    names = [name for name in dict.fromkeys(n for row in log for n in row) if name != "step"]
    flat = [n for n in names if n in QUIET and {row.get(n) for row in log} == {QUIET[n]}]
    series = {n: _points((r["step"], r.get(n)) for r in log) for n in names if n not in flat}
    panels = {
        title: {label: series.pop(name) for name, label in wanted.items() if name in series}
        for title, wanted in TRAINING.items()
    }
    return {title: found for title, found in panels.items() if found} | {
        name: {name: points} for name, points in series.items()
    }


def figure_panels(
    rows: Sequence[tuple[int, Mapping]], kinds: Mapping[str, Callable[[str], bool]], other: str
) -> dict[str, Series]:
    """Of figures after so many steps: those of each kind together, each other one by itself."""
    names = [name for name in dict.fromkeys(n for _, row in rows for n in row)]
    left = {n: _points((step, row.get(n)) for step, row in rows) for n in names}
    left = {n: points for n, points in left.items() if points and n not in NO_CURVE}
    panels = {}
    for title, of_kind in kinds.items():
        panels[title] = {n.replace("_", " "): left.pop(n) for n in list(left) if of_kind(n)}
    panels |= {f"{other}: {n}": {n: points} for n, points in left.items()}
    return {title: series for title, series in panels.items() if series}


def draw(panels: Mapping[str, Series], *, smooth: bool = False) -> plt.Figure:
    """One panel each. smooth: a running mean over the values, which stay in the background."""
    lines = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=(12, 2.7 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        for colour, (name, points) in zip(COLOURS * 9, series.items(), strict=False):
            steps, values = zip(*points, strict=True)
            if smooth:
                axis.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
                axis.plot(steps, running_mean(values), color=colour, label=name)
            else:
                axis.plot(steps, values, color=colour, label=name, marker="o", ms=3)
        axis.set_title(title, fontsize=10)
        if title.endswith("(log)") and all(v > 0 for s in series.values() for _, v in s):
            axis.set_yscale("log")
        axis.spines[["right", "top"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def running_mean(values: Sequence[float], memory: float = 0.9) -> list[float]:
    """Of each value and those before it, the older the less."""
    mean, smoothed = values[0], []
    for value in values:
        mean = memory * mean + (1 - memory) * value
        smoothed.append(mean)
    return smoothed


def _points(pairs) -> list[tuple[int, float]]:
    """Those with a number; a gap where a value is missing or infinite is none in the curve."""
    return [
        (step, value)
        for step, value in pairs
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]
