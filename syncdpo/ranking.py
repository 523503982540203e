"""Sample and rank: several clips of each caption or picture; the best against the worst is a pair.

The conventional way to preference pairs, with its price. A folder of it holds

    samples/<source>/00.mp4 …   all clips, of each source as many
    log.jsonl                   what each clip cost, and its scores, a line when it is known
    PAIRS.csv                   best and worst clip of each source, for `syncdpo prepare-pairs`
    ranking.json                settings, counts, and the time that all of it took

Clips and lines that are there are neither sampled nor measured again, so a run that was killed goes
on by the same call, with the same pairs; another metric ranks the same clips anew.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from syncdpo.data.clips import ClipError, read_clip
from syncdpo.data.files import canonical_json, readable, reasons, remove_leftovers, write_atomic
from syncdpo.data.pairs import prepare_pairs, read_pairs
from syncdpo.evaluation import file_figures, load_metric
from syncdpo.models import Model
from syncdpo.models.base_model import fingerprint
from syncdpo.sampling import noise_seeds, written

SAMPLES, LOG, PAIRS, ABOUT = "samples", "log.jsonl", "PAIRS.csv", "ranking.json"
BETTER = {  # figures of `evaluate` that tell one clip from another, and which way
    "onset_error_ms": "lower",
    "onset_error_median_ms": "lower",
    "f1": "higher",
    "f1_undetectable": "higher",
}


@dataclass(frozen=True)
class Measure:
    """What clips are ranked by: a score of a file, None where there is no telling.

    name: by which scores that are there are known, so another function needs another one.
    """

    name: str
    better: str
    score: Callable[[Path], float | None]

    @classmethod
    def of(cls, name: str, better: str | None = None) -> Measure:
        """A figure of `evaluate` by its name, or `module:function` with the way that is better.

        Raises ValueError where there is no such figure or function, or the way is not said.
        """
        if better not in (None, "lower", "higher"):
            raise ValueError(f"better: expected lower or higher, got {better!r}")
        if ":" in name:
            if better is None:
                raise ValueError(f"better: expected lower or higher for {name}, got none")
            _, metric = load_metric(name)
            return cls(name, better, lambda path: metric(read_clip(path)))
        if name not in BETTER:
            raise ValueError(
                f"metric: expected {', '.join(BETTER)} or module:function, got {name!r}"
            )
        if better not in (None, BETTER[name]):
            raise ValueError(f"better: expected {BETTER[name]} for {name}, got {better}")
        return cls(name, BETTER[name], lambda path: file_figures(path)[name])


@dataclass(frozen=True, eq=False)
class Source:
    """What clips are sampled of: a caption, or a picture, latents that want a sound.

    name: of the picture; a caption is its own. group: of several pairs of one source, which.
    """

    caption: str
    name: str = ""
    video: Tensor | None = None
    group: int = 0

    @property
    def key(self) -> tuple:
        """What its noise follows from."""
        return (self.name or self.caption, self.group)

    @cached_property
    def folder(self) -> str:
        """Readable, and another one for another caption or picture."""
        told = hashlib.blake2b(repr(self.key).encode(), digest_size=6)
        if self.video is not None:
            told.update(self.video.float().cpu().numpy().tobytes())
        stem = Path(self.name).stem or self.caption or "clip"
        stem = "".join(c if c.isalnum() else "-" for c in stem)[:40]
        return f"{stem}-{told.hexdigest()}"


def of_captions(captions: Sequence[str], groups: int = 1) -> list[Source]:
    """`groups` sources of each caption; one that stands there again is no other."""
    different = dict.fromkeys(captions)
    return [Source(text, group=group) for text in different for group in range(groups)]


def of_pictures(model: Model, data, groups: int = 1) -> list[Source]:
    """`groups` sources of each clip of a dataset of latents: its picture, to be given a sound.

    Raises ValueError where the model takes no pictures, or these are of several formats.
    """
    check_pictures(model)
    if len(set(getattr(data, "buckets", [None]))) > 1:
        raise ValueError("pictures: expected clips of one format, got several buckets")
    told = getattr(data, "clips", [{}] * len(data))
    names = getattr(data, "names", [str(i) for i in range(len(data))])
    sources = []
    for index, (name, clip) in enumerate(zip(names, told, strict=True)):
        caption = clip.get("caption") if isinstance(clip, dict) else None
        video = data[index]["video"]
        sources += [Source(caption or "", name, video, group) for group in range(groups)]
    return sources


def check_pictures(model: Model) -> None:
    if not model.adds_sound:
        raise ValueError(
            "pictures: expected none for a model that makes picture and sound at once; captions "
            "say what of"
        )


@dataclass(frozen=True)
class RankSummary:
    """What came of it: (winner, loser, their scores) of each pair, sources left out with reasons,
    and seconds by what was done, on the clock and of this process's processors."""

    measure: Measure
    pairs: list[tuple[Path, Path, float, float]]
    left: list[tuple[Path, str]]
    clips: int
    sampled: int
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    untimed: int

    def __str__(self) -> str:
        sources = len(self.pairs) + len(self.left)
        lines = [
            f"{len(self.pairs)} pairs of {sources} sources, {self.clips} clips ({self.sampled} "
            f"sampled now)"
        ]
        if self.pairs:
            win, lose = (sum(pair[i] for pair in self.pairs) / len(self.pairs) for i in (2, 3))
            lines.append(
                f"{self.measure.name}, {self.measure.better} is better: {win:.4g} of winners, "
                f"{lose:.4g} of losers"
            )
        for what, seconds in self.seconds.items():
            lines.append(f"{what}: {seconds:.1f} s, {self.cpu_seconds[what]:.1f} s of processors")
        if self.untimed:
            lines.append(f"not timed: {self.untimed} clips, whose run was killed as they were done")
        if self.left:
            lines += [f"{len(self.left)} left out:", *reasons(self.left)]
        return "\n".join(lines)


def rank(
    model: Model,
    sources: Sequence[Source],
    folder: str | Path,
    measure: Measure,
    *,
    count: int = 4,
    seed: int = 0,
    steps: int | None = None,
    progress: bool = True,
    **guidance,
) -> RankSummary:
    """Sample `count` clips of each source into `folder`, score them, write best and worst down.

    Clip k of a source is a function of (seed, source, k), so more clips, or sources, leave those
    that there are. A source whose best clip is no better than its worst, or of which fewer than two
    can be scored, is left out; one that comes again is taken once. steps, guidance: as
    `Model.generate` takes them.

    Raises ValueError where the folder holds samples of other weights, seed, steps, format or
    guidance, where the model cannot generate these, or no source gives a pair.
    """
    folder = Path(folder)
    sources = list({source.folder: source for source in sources}.values())
    if count < 2:
        raise ValueError(f"count: expected at least 2 clips to rank, got {count}")
    if not sources:
        raise ValueError("sources: expected a caption or a picture at least, got none")
    given = sources[0].video is not None
    model.check_generation([""] if given else [source.caption for source in sources])
    settings = _settings(model, seed, steps, guidance)
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder, settings)
    ledger = Ledger(folder / LOG)
    clips = [(source, k) for source in sources for k in range(count)]
    sampled = _sample(model, folder, clips, ledger, seed, steps, progress, guidance)
    _score(folder, clips, ledger, measure, progress)
    summary = _choose(folder, sources, count, ledger, measure, sampled)
    _write_about(folder, settings, summary)
    if not summary.pairs:
        raise ValueError(f"sources: none of {len(sources)} gives a pair\n{summary}")
    _write_pairs(folder, sources, summary)
    return summary


def prepare_ranked(model: Model, folder: Path, into: Path, *, progress: bool = True) -> str:
    """The pairs of a ranked folder into a cache of pairs; its time goes to that of the ranking."""
    clock = Clock()
    summary = prepare_pairs(model, read_pairs(folder / PAIRS), into, progress=progress)
    ledger = Ledger(folder / LOG)
    ledger.add({"prepared": clock.lap()})
    about = json.loads((folder / ABOUT).read_text("utf-8"))
    for name, spent in zip(("seconds", "cpu_seconds"), ledger.total("prepared"), strict=True):
        about[name]["preparing"] = spent
    write_atomic(folder / ABOUT, canonical_json(about, indent=1).encode())
    return str(summary)


# --- clips and scores -----------------------------------------------------------------------------


class Clock:
    """Laps in seconds, on the clock and of this process's processors."""

    def __init__(self):
        self.lap()

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        before, self.last = getattr(self, "last", now), now
        return now[0] - before[0], now[1] - before[1]


class Ledger:
    """Lines of JSON that outlive a kill; what is not whole was not said."""

    def __init__(self, path: Path):
        self.path = path
        whole = path.read_text("utf-8").rpartition("\n")[0] if path.exists() else ""
        self.rows = [json.loads(line) for line in whole.splitlines()]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def timed(self) -> set[str]:
        return {row["clip"] for row in self.rows if "sampled" in row}

    def scores(self, metric: str) -> dict[str, tuple[float | None, str]]:
        """Clip → (score, why there is none), of clips that have not been sampled again since."""
        found = {}
        for row in self.rows:
            if "sampled" in row:
                found.pop(row["clip"], None)
            elif row.get("metric") == metric:
                found[row["clip"]] = row["score"], row["reason"]
        return found

    def total(self, what: str, wanted: Callable[[dict], bool] = bool) -> tuple[float, float]:
        """Seconds on the clock and of processors, of those rows of a kind that are wanted."""
        rows = [row[what] for row in self.rows if what in row and wanted(row)]
        return sum(row[0] for row in rows), sum(row[1] for row in rows)


def _sample(
    model: Model,
    folder: Path,
    clips: list[tuple[Source, int]],
    ledger: Ledger,
    seed: int,
    steps: int | None,
    progress: bool,
    guidance: dict,
) -> int:
    """Clips that are not there yet; → how many these were."""
    for source in {source.folder: source for source, _ in clips}.values():
        remove_leftovers(folder / SAMPLES / source.folder)
    pending = [(s, k) for s, k in clips if not (folder / SAMPLES / _clip(s, k)).exists()]
    if not pending:
        return 0
    options = dict(guidance)
    if pending[0][0].video is not None:
        video = torch.stack([source.video for source, _ in pending])
        options["video"] = video.to(next(model.transformer.parameters()).device)
        texts = [""] * len(pending)
    else:
        texts = [source.caption for source, _ in pending]
    seeds = torch.cat([noise_seeds(1, seed, "rank", *s.key, k) for s, k in pending])
    clock = Clock()
    made = model.generate(texts, seeds, steps=steps, **options)
    paths = [folder / SAMPLES / _clip(s, k) for s, k in pending]
    done = len(clips) - len(pending)
    for path in written(made, paths, done=done, progress=progress):
        name = path.relative_to(folder / SAMPLES).as_posix()
        ledger.add({"clip": name, "sampled": clock.lap()})
    return len(pending)


def _score(
    folder: Path,
    clips: list[tuple[Source, int]],
    ledger: Ledger,
    measure: Measure,
    progress: bool,
) -> None:
    known = ledger.scores(measure.name)
    pending = [name for name in (_clip(s, k) for s, k in clips) if name not in known]
    clock = Clock()
    for name in tqdm(
        pending, "rank", len(clips), initial=len(clips) - len(pending), unit="clip",
        disable=not progress,
    ):  # fmt: skip
        score, reason = _scored(folder / SAMPLES / name, measure)
        row = {"clip": name, "metric": measure.name, "score": score, "reason": reason}
        ledger.add(row | {"ranked": clock.lap()})


def _scored(path: Path, measure: Measure) -> tuple[float | None, str]:
    try:
        score = measure.score(path)
    except ClipError as error:
        return None, error.reason
    if score is None or not math.isfinite(score):
        return None, f"it has no {measure.name}"
    return float(score), ""


def _clip(source: Source, number: int) -> str:
    return f"{source.folder}/{number:02d}.mp4"


# --- pairs ----------------------------------------------------------------------------------------


def _choose(
    folder: Path,
    sources: Sequence[Source],
    count: int,
    ledger: Ledger,
    measure: Measure,
    sampled: int,
) -> RankSummary:
    scores, timed = ledger.scores(measure.name), ledger.timed()
    sign = 1 if measure.better == "lower" else -1
    pairs, left, names = [], [], []
    for source in sources:
        clips = [_clip(source, k) for k in range(count)]
        names += clips
        known = [(sign * scores[name][0], name) for name in clips if scores[name][0] is not None]
        reason = _no_pair(known, [scores[name] for name in clips], sign)
        if reason:
            left.append((folder / SAMPLES / source.folder, reason))
            continue
        # Of equals the first, whatever the clips are called.
        best, worst = min(known, key=lambda x: x[0]), max(known, key=lambda x: x[0])
        files = (folder / SAMPLES / name for _, name in (best, worst))
        pairs.append((*files, sign * best[0], sign * worst[0]))
    times = _times(ledger, set(names), measure)
    return RankSummary(
        measure,
        pairs,
        left,
        clips=len(names),
        sampled=sampled,
        seconds={what: spent[0] for what, spent in times.items()},
        cpu_seconds={what: spent[1] for what, spent in times.items()},
        untimed=len(set(names) - timed),
    )


def _times(ledger: Ledger, clips: set[str], measure: Measure) -> dict[str, tuple[float, float]]:
    """What these clips cost, every time that they were made, and the cache of their pairs."""
    ranked = ledger.total(
        "ranked", lambda row: row["clip"] in clips and row["metric"] == measure.name
    )
    times = {"sampling": ledger.total("sampled", lambda row: row["clip"] in clips)}
    times |= {"ranking": ranked, "preparing": ledger.total("prepared")}
    return {what: spent for what, spent in times.items() if what != "preparing" or any(spent)}


def _no_pair(
    known: list[tuple[float, str]], scores: list[tuple[float | None, str]], sign: int
) -> str | None:
    """Why these clips give no pair, if they give none."""
    if len(known) < 2:
        why = dict.fromkeys(reason for score, reason in scores if score is None)
        return f"{len(known)} of its {len(scores)} clips has a score ({'; '.join(why)})"
    values = {value for value, _ in known}
    if len(values) == 1:
        return f"its best clip is no better than its worst: all have {sign * known[0][0]:.4g}"
    return None


def _write_pairs(folder: Path, sources: Sequence[Source], summary: RankSummary) -> None:
    """As `read_pairs` takes it; a column of captions only where there are any."""
    captions = {source.folder: source.caption for source in sources}
    name = summary.measure.name
    columns = ["win", "lose", "caption", f"{name}_win", f"{name}_lose"]
    if not any(captions.values()):
        columns.remove("caption")
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for win, lose, better, worse in summary.pairs:
        files = (path.relative_to(folder).as_posix() for path in (win, lose))
        row = dict(zip(("win", "lose"), files, strict=True))
        row |= {"caption": captions[win.parent.name]}
        table.writerow(row | {f"{name}_win": repr(better), f"{name}_lose": repr(worse)})
    write_atomic(folder / PAIRS, text.getvalue().encode())


# --- the folder -----------------------------------------------------------------------------------


def _settings(model: Model, seed: int, steps: int | None, guidance: dict) -> dict:
    """What a clip depends on beside its source and its number."""
    told = {name: value for name, value in guidance.items() if value is not None}
    settings = {"weights": fingerprint(model.transformer), "seed": seed, "steps": steps}
    return json.loads(canonical_json(settings | vars(model.clip_format) | told))


def _check_same(folder: Path, settings: dict) -> None:
    try:
        then = json.loads((folder / ABOUT).read_text("utf-8"))["settings"]
    except FileNotFoundError:
        write_atomic(folder / ABOUT, canonical_json({"settings": settings}, indent=1).encode())
        return
    changed = [
        f"{name} was {then.get(name, 'not set')}, is {settings.get(name, 'not set')}"
        for name in sorted(then.keys() | settings.keys())
        if then.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(
            f"output: {readable(folder)} holds samples of other settings ({', '.join(changed)}); "
            "choose another folder"
        )


def _write_about(folder: Path, settings: dict, summary: RankSummary) -> None:
    content = {
        "settings": settings,
        "metric": summary.measure.name,
        "better": summary.measure.better,
        "clips": summary.clips,
        "pairs": len(summary.pairs),
        "left_out": {readable(path.name): reason for path, reason in summary.left},
        "seconds": summary.seconds,
        "cpu_seconds": summary.cpu_seconds,
        "untimed": summary.untimed,
    }
    write_atomic(folder / ABOUT, canonical_json(content, indent=1).encode())
