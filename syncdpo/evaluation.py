"""A folder of clips, measured: one csv line per clip, one page to read, one table to print."""

from __future__ import annotations

import csv
import html
import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

import numpy as np
from torch import Tensor
from tqdm import tqdm

from syncdpo.data.clips import Clip, ClipError, find_clips, read_clip
from syncdpo.data.decoding import decode
from syncdpo.data.files import readable, reasons, unexpected
from syncdpo.metrics import (
    BLIND,
    GRID,
    ClipMetrics,
    Flow,
    cell_events,
    flow_align,
    picture_cells,
    sound_events,
    summarise,
)

Metric = Callable[[Clip], float | None]

COLUMNS = {
    "clip": "{}",
    "f1": "{:.3f}",
    "f1_undetectable": "{:.3f}",
    "onset_error_ms": "{:.1f}",
    "onset_error_median_ms": "{:.1f}",
    "offset_ms": "{:+.1f}",
    "seen_per_clip": "{:.2f}",
    "events_per_clip": "{:.2f}",
    "av_align": "{:.3f}",
}

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>syncdpo evaluate: $folder</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #dfe3e8 }
th:first-child, td:first-child { text-align: left } tr.overall { font-weight: 600 }
</style></head><body><h1>$folder</h1>
<p>F1 within ITU-R BT.1359's acceptable (sound leads by at most 90 ms, lags by at most 185 ms) and
undetectable (45, 125 ms) windows; onset error: from each visible event to the nearest sound;
offset: positive where the sound is late; AV-Align as JavisBench computes it.$extra</p>
<table><thead><tr>$header</tr></thead><tbody>$rows</tbody></table>$skipped</body></html>
""")


@dataclass(frozen=True)
class Evaluated:
    """One clip: its name, its events, scores by name, None where there is no telling, and what its
    reader had to choose, a sentence each."""

    name: str
    metrics: ClipMetrics
    scores: dict[str, float | None]
    notes: tuple[str, ...] = ()

    def row(self) -> dict:
        return {"clip": self.name} | self.scores | summarise([self.metrics])


def evaluate_folder(
    folder: Path,
    output: Path,
    *,
    with_av_align: bool = True,
    extra: Mapping[str, Metric] | None = None,
    progress: bool = True,
) -> str:
    """Measure every clip of `folder`; write clips.csv and report.html to `output`.

    Pictures are measured at the times at which the file shows them, and looked at one by one as
    they are decoded: a film of any length fits in memory.

    extra: metrics of your own by the names of their columns, `Clip` → float, None or NaN where a
        clip has none; the overall figure is the mean of the others. They get the clip as
        `read_clip` gives it, whole, at full size and at one frame rate.

    Returns the overall figures and what was skipped, as text. Raises ValueError where no clip can
    be read or an extra metric has the name of a column, ImportError where AV-Align lacks librosa
    or OpenCV.
    """
    extra = dict(extra or {})
    if taken := extra.keys() & COLUMNS:
        raise ValueError(f"extra: expected names that are no columns yet, got {', '.join(taken)}")
    if with_av_align:
        importlib.import_module("librosa")
        importlib.import_module("cv2")
    columns = COLUMNS | dict.fromkeys(extra, "{:.4g}")
    paths, skipped = find_clips(folder)
    done = []
    for path in tqdm(paths, "evaluate", unit="clip", disable=not progress):
        try:
            seen, clip = _seen(path, folder, with_av_align), read_clip(path) if extra else None
        except ClipError as error:
            skipped.append((path, error.reason))
        except Exception as error:  # one odd file does not end the others' evaluation
            skipped.append((path, unexpected(error)))
        else:
            scores = {name: _number(metric(clip)) for name, metric in extra.items()}
            done.append(replace(seen, scores=seen.scores | scores))
    if not done:
        raise ValueError("\n".join([f"clips: none in {folder} can be used", *reasons(skipped)]))
    rows = [_formatted(row, columns) for row in (_overall(done), *(e.row() for e in done))]
    output.mkdir(parents=True, exist_ok=True)
    with (output / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    (output / "report.html").write_text(_page(folder, rows, skipped, extra), "utf-8")
    lines = [f"{name:<22} {value}" for name, value in rows[0].items() if name != "clip"]
    noted = [(folder / entry.name, note) for entry in done for note in entry.notes]
    for title, named in (("skipped", skipped), ("noted", noted)):
        if named:
            lines += [f"{len(named)} {title}:", *reasons(named)]
    first, last = f"{len(done)} clips in {readable(folder)}", f"see {output / 'report.html'}"
    return "\n".join([first, *lines, last])


def file_figures(path: Path) -> dict[str, float | int | None]:
    """The figures of one file, without AV-Align, that `evaluate_folder` has for it (`summarise`).

    Raises ClipError where it cannot be read.
    """
    return summarise([_seen(path, path.parent, with_av_align=False).metrics])


def load_metric(name: str) -> tuple[str, Metric]:
    """A metric by `module:function`, looked for in the working folder too, and its column's name.

    Raises ValueError where there is no such module or function.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"metric: expected module:function, got {name!r} ({error})") from error
    if not callable(metric):
        raise ValueError(f"metric: expected a function, got {name!r}, which cannot be called")
    return function, metric


class _Look:
    """What the metrics need of pictures that come one after the other: each a row of `cells` and an
    entry of `flows`, whose index is returned.

    Rows lie in one block: many small pieces of memory between big pictures would leave holes that
    no picture fits into, and a minute of film would take as much memory as all its pictures.
    """

    def __init__(self, flow: Flow | None):
        self.flow = flow
        self.cells = np.empty((1024, GRID * GRID))
        self.flows: list[float] = []

    def __call__(self, picture: Tensor) -> int:
        place = len(self.flows)
        if place == len(self.cells):
            self.cells = np.concatenate([self.cells, np.empty_like(self.cells)])
        self.cells[place] = picture_cells(picture[None])[0]
        self.flows.append(self.flow(picture) if self.flow else 0.0)
        return place


def _seen(path: Path, folder: Path, with_av_align: bool) -> Evaluated:
    """One file by the built-in metrics, its pictures at their own times. Raises ClipError."""
    look = _Look(Flow() if with_av_align else None)
    streams = decode(path, None, None, keep=look)
    if not streams.sound.isfinite().all():
        raise ClipError(path, "its sound holds NaN or infinity")
    sound, times = streams.sound.clamp(-1, 1), np.array(streams.picture_times)
    metrics = ClipMetrics(
        cell_events(look.cells[streams.pictures], times),
        sound_events(sound, streams.sample_rate),
        streams.seconds,
        blind=float(np.interp(BLIND, np.arange(len(times) + 1), [*times, streams.seconds])),
    )
    scores = {}
    if with_av_align:
        flows, frame = np.array(look.flows)[streams.pictures], 1 / streams.fps
        scores["av_align"] = flow_align(flows, times, frame, sound, streams.sample_rate)
    return Evaluated(readable(path.relative_to(folder)), metrics, scores, streams.notes)


def mean_score(values: Sequence[float | None]) -> float | None:
    """The mean over those clips that have one, neither None nor NaN."""
    known = [value for value in map(_number, values) if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _overall(done: list[Evaluated]) -> dict:
    means = {column: mean_score([e.scores[column] for e in done]) for column in done[0].scores}
    return {"clip": "all"} | means | summarise([entry.metrics for entry in done])


def _formatted(row: dict, columns: dict[str, str]) -> dict[str, str]:
    shown = {name: row.get(name) for name in columns}
    return {
        name: "" if value is None else columns[name].format(value) for name, value in shown.items()
    }


def _page(
    folder: Path,
    rows: list[dict[str, str]],
    skipped: Sequence[tuple[Path, str]],
    extra: Mapping[str, Metric],
) -> str:
    def line(row: dict[str, str], style: str = "") -> str:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row.values())
        return f'<tr class="{style}">{cells}</tr>'

    named = "".join(
        f"<li>{html.escape(f'{readable(path)}: {reason}')}</li>" for path, reason in skipped
    )
    titles = [html.escape(name.replace("_", " ")) for name in rows[0]]
    return PAGE.substitute(
        folder=html.escape(readable(folder)),
        extra=html.escape(f" Given by the user: {', '.join(extra)}." if extra else ""),
        header="".join(f"<th>{title}</th>" for title in titles),
        rows=line(rows[0], "overall") + "".join(map(line, rows[1:])),
        skipped=f"<h2>Skipped</h2><ul>{named}</ul>" if skipped else "",
    )
