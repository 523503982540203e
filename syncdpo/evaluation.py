"""A folder of clips, measured: one csv line per clip, one page to read, one table to print."""

from __future__ import annotations

import csv
import html
from dataclasses import dataclass
from pathlib import Path
from string import Template

from tqdm import tqdm

from syncdpo.data.clips import Clip, ClipError, list_clips, read_clip
from syncdpo.metrics import ClipMetrics, av_align, clip_metrics, summarise

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
offset: positive where the sound is late; AV-Align as JavisBench computes it.</p>
<table><thead><tr>$header</tr></thead><tbody>$rows</tbody></table>$skipped</body></html>
""")


@dataclass(frozen=True)
class Evaluated:
    """One clip: its name, its events, and its AV-Align score where asked for."""

    name: str
    metrics: ClipMetrics
    av_align: float | None

    def row(self) -> dict:
        return {"clip": self.name, "av_align": self.av_align} | summarise([self.metrics])


def evaluate_folder(
    folder: Path, output: Path, *, with_av_align: bool = True, progress: bool = True
) -> str:
    """Measure every clip of `folder`; write clips.csv and report.html to `output`.

    Returns the overall figures and what was skipped, as text. Raises ValueError where no clip can
    be read, ImportError where AV-Align lacks librosa or OpenCV.
    """
    done, skipped = [], []
    for path in tqdm(list_clips(folder), "evaluate", unit="clip", disable=not progress):
        try:
            clip = read_clip(path, require_sound=False)
        except ClipError as error:
            skipped.append(error)
        else:
            done.append(_evaluated(str(path.relative_to(folder)), clip, with_av_align))
    if not done:
        reasons = "".join(f"\n  {error}" for error in skipped)
        raise ValueError(f"clips: none in {folder} can be used{reasons}")
    rows = [_formatted(_overall(done))] + [_formatted(entry.row()) for entry in done]
    output.mkdir(parents=True, exist_ok=True)
    with (output / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (output / "report.html").write_text(_page(folder, rows, skipped))
    lines = [f"{name:<22} {value}" for name, value in rows[0].items() if name != "clip"]
    if skipped:
        lines += [f"{len(skipped)} skipped:"] + [f"  {error}" for error in skipped]
    return "\n".join([f"{len(done)} clips in {folder}", *lines, f"see {output / 'report.html'}"])


def _evaluated(name: str, clip: Clip, with_av_align: bool) -> Evaluated:
    return Evaluated(name, clip_metrics(clip), av_align(clip) if with_av_align else None)


def _overall(done: list[Evaluated]) -> dict:
    scores = [entry.av_align for entry in done if entry.av_align is not None]
    mean = sum(scores) / len(scores) if scores else None
    return {"clip": "all", "av_align": mean} | summarise([entry.metrics for entry in done])


def _formatted(row: dict) -> dict[str, str]:
    return {
        name: "" if row[name] is None else form.format(row[name]) for name, form in COLUMNS.items()
    }


def _page(folder: Path, rows: list[dict[str, str]], skipped: list[ClipError]) -> str:
    def line(row: dict[str, str], style: str = "") -> str:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row.values())
        return f'<tr class="{style}">{cells}</tr>'

    reasons = "".join(f"<li>{html.escape(str(error))}</li>" for error in skipped)
    return PAGE.substitute(
        folder=html.escape(str(folder)),
        header="".join(f"<th>{name.replace('_', ' ')}</th>" for name in COLUMNS),
        rows=line(rows[0], "overall") + "".join(map(line, rows[1:])),
        skipped=f"<h2>Skipped</h2><ul>{reasons}</ul>" if skipped else "",
    )
