"""The page of a training run, from its folder alone: figures, samples by step, settings."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from syncdpo.data.files import readable, write_atomic
from syncdpo.report import curves
from syncdpo.report.page import page, picture, table
from syncdpo.report.players import Shown, gallery
from syncdpo.training.checkpoint import LOG, read_figures, read_log, run_settings
from syncdpo.training.config import TrainConfig
from syncdpo.training.publish import shareable
from syncdpo.training.samples import ABOUT, FOLDER, REAL, step_folder

REPORT = "report.html"
WARNINGS = "warnings.txt"
SHOWN_STEPS, SHOWN_CLIPS = 6, 5
MOST_BYTES = 48 << 20  # of clips in a page, which a browser still opens at once
COLUMNS = {
    "f1": ("F1", "{:.2f}"),
    "onset_error_ms": ("mean onset error, ms", "{:.0f}"),
    "events_per_clip": ("sounds per clip", "{:.2f}"),
    "seen_per_clip": ("seen per clip", "{:.2f}"),
    "av_align": ("AV-Align", "{:.2f}"),
    "clips": ("clips", "{}"),
}
Rows = list[tuple[int, dict]]


def write_run_report(folder: Path, path: Path | None = None) -> Path:
    """Write the page to `path`, by default into the run's folder; → where it is.

    Raises ValueError where the folder is no training run's.
    """
    log, samples = read_log(folder), read_figures(folder, "samples")
    held_out = read_figures(folder, "validation")
    if not (log or samples or held_out):
        raise ValueError(
            f"run: expected the folder of a training run, with a {LOG}, got {readable(folder)}"
        )
    settings = run_settings(folder)
    if settings:  # without the folders of this machine, for pages are passed on
        known = {name: v for name, v in settings.items() if hasattr(TrainConfig, name)}
        settings = asdict(shareable(TrainConfig(**known)))
    clips, width = _samples(folder, samples)
    body = "".join(
        [
            _head(folder, log, settings),
            _warnings(folder),
            clips,
            _held_out(held_out),
            _training(log),
            _settings(settings),
        ]
    )
    path = path or folder / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page(f"syncdpo: {_name(folder)}", body, width=width).encode())
    return path


def _name(folder: Path) -> str:
    return readable(folder.resolve().name)


def _head(folder: Path, log: list[dict], settings: dict) -> str:
    done = log[-1]["step"] + 1 if log else 0
    told = f"{done} of {settings['steps']} steps" if settings else f"{done} steps so far"
    if settings:
        told = f"{settings['method']}, model {settings['model']}, {told}"
    return f"<h1>{html.escape(_name(folder))}</h1><p>{html.escape(told)}.</p>"


def _warnings(folder: Path) -> str:
    path = folder / WARNINGS
    lines = path.read_text().splitlines() if path.exists() else []
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines if line.strip())
    return f'<h2>Warnings</h2><ul class="warnings">{items}</ul>' if items else ""


# --- samples --------------------------------------------------------------------------------------


def _samples(folder: Path, rows: Rows) -> tuple[str, str]:
    """Figures by step, and clips to play; with the width of one."""
    if not rows:
        return "<h2>Samples</h2><p>None yet; <code>sample_every</code> asks for them.</p>", "13rem"
    path = folder / FOLDER / ABOUT
    about = json.loads(path.read_text()) if path.exists() else {}
    of_what = "what the model makes"
    if about.get("pictures"):
        of_what = f"the model's sound to pictures of {about['pictures']}, and their own"
    steps, clips, left_out = chosen(folder, [step for step, _ in rows])
    shown = _rows_of_clips(folder, steps, clips, about)
    players, width = gallery(shown) if shown else ("<p>Their files are gone.</p>", "13rem")
    panels = curves.figure_panels(rows, curves.SAMPLES, "samples")
    drawn = picture(curves.draw(panels), "Figures of samples by step") if panels else ""
    return (
        f"<h2>Samples</h2><p>By step, {html.escape(of_what)}: a column is always the same noise."
        f"{left_out}</p>{_figures(rows, about.get(REAL))}{drawn}{players}"
    ), width


def _figures(rows: Rows, real: dict | None) -> str:
    extra = [name for _, row in rows for name in row if name not in COLUMNS]
    columns = COLUMNS | {name: (name, "{:.4g}") for name in extra}
    known = [name for name in columns if any(row.get(name) is not None for _, row in rows)]

    def cells(label: str, row: dict) -> list[str]:
        values = ((columns[name][1], row.get(name)) for name in known)
        return [label, *("" if value is None else form.format(value) for form, value in values)]

    lines = [("", cells(str(step), row)) for step, row in rows]
    if real:
        lines.append(("real", cells("real clips", real)))
    return table(["after step", *(columns[name][0] for name in known)], lines)


def chosen(folder: Path, steps: Sequence[int]) -> tuple[list[int], int, str]:
    """(steps, clips of each, a sentence on what is left out): first, last, and between them."""
    count = min(SHOWN_STEPS, len(steps))
    places = {round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)}
    wanted = [steps[place] for place in sorted(places)]
    files = [_files(step_folder(folder, step)) for step in wanted]
    clips = min(SHOWN_CLIPS, max(map(len, files)))
    while clips > 1 and 4 / 3 * _size(files, clips) > MOST_BYTES:
        clips -= 1
    made = max(map(len, files))
    less = [f"{len(wanted)} of {len(steps)} steps"] * (len(wanted) < len(steps))
    less += [f"{clips} of {made} clips of each"] * (clips < made)
    return wanted, clips, f" Shown: {' and '.join(less)}." if less else ""


def _rows_of_clips(
    folder: Path, steps: Sequence[int], clips: int, about: dict
) -> list[tuple[str, list[Shown]]]:
    captions = [clip["caption"] for clip in about.get("clips", [])]
    rows = [(f"after step {step}", _files(step_folder(folder, step))) for step in steps]
    if about.get("pictures"):
        rows.append(("real clips", _files(folder / FOLDER / REAL)))
    return [
        (heading, [Shown(p, _at(captions, int(p.stem))) for p in paths[:clips]])
        for heading, paths in rows
        if paths
    ]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.mp4") if path.stem.isdecimal())


def _size(files: Sequence[Sequence[Path]], clips: int) -> int:
    return sum(path.stat().st_size for row in files for path in row[:clips])


def _at(captions: Sequence[str], number: int) -> str:
    return captions[number] if number < len(captions) else ""


# --- figures and settings -------------------------------------------------------------------------


def _held_out(rows: Rows) -> str:
    panels = curves.figure_panels(rows, curves.HELD_OUT, "held-out")
    if not panels:
        return ""
    best = rows[-1][1].get("best_step")
    told = f"<p>Best after step {best}.</p>" if best is not None else ""
    drawn = picture(curves.draw(panels), "Held-out figures by step")
    return f"<h2>Held-out clips</h2>{told}{drawn}"


def _training(log: list[dict]) -> str:
    panels = curves.training_panels(log)
    if not panels:
        return ""
    drawn = picture(curves.draw(panels, smooth=True), "Training curves")
    return f"<h2>Training</h2>{drawn}"


def _settings(settings: dict) -> str:
    """All of them, those that were chosen in bold."""
    if not settings:
        return "<h2>Settings</h2><p>They come with the run's first checkpoint.</p>"
    default = asdict(TrainConfig())
    rows = [
        ("chosen" if value != default.get(name) else "", [name, str(value)])
        for name, value in settings.items()
    ]
    return f"<h2>Settings</h2><p>Chosen ones in bold.</p>{table([], rows, 'settings')}"
