"""Trials side by side, and the search for a learning rate: the same for whatever is compared.

A trial is anything with `asked`, which tells its row from those of others, and `run`, which gives
the row. Trials run in processes of one thread; what each measured is kept in a folder, from where
the same call goes on.
"""

from __future__ import annotations

import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from syncdpo.data.files import write_atomic
from syncdpo.demo.demonstration import format_row

# Half octaves. A search begins with every second one from the first to the last of these, and goes
# on until its best has neighbours on both sides.
LEARNING_RATES = tuple(float(f"{1e-3 * 2 ** (k / 2):.1e}") for k in range(16))  # to 0.18
BEGIN = (4, 6, 8)  # places in LEARNING_RATES
ERRORS = ("onset_error_ms", "own_onset_error_ms")
EVENTS = ("events_per_clip", "own_events_per_clip")
FIGURES = ("f1", "own_f1", *ERRORS, *EVENTS)
KEPT = "trials.json"


class Trial(Protocol):
    """One thing to measure."""

    @property
    def asked(self) -> dict: ...

    def run(self) -> dict: ...


class Search(ABC):
    """The learning rates tried on some grounds, as places in `LEARNING_RATES`, and their rows."""

    def __init__(self, grounds: Sequence):
        self.grounds = grounds
        self.places = list(BEGIN)
        self.stride = 2
        self.rows: list[dict] = []

    @abstractmethod
    def trial(self, ground, rate: float) -> Trial:
        """With that learning rate, on that ground."""

    def trials(self) -> list[Trial]:
        rates = [LEARNING_RATES[place] for place in self.places]
        return [self.trial(ground, rate) for rate in rates for ground in self.grounds]

    def means(self) -> list[dict]:
        """One row per learning rate that is tried: the mean over the grounds."""
        tried = [LEARNING_RATES[place] for place in sorted(self.places)]
        return [mean_row([r for r in self.rows if r["learning_rate"] == rate]) for rate in tried]

    @property
    def best(self) -> dict:
        return min(self.means(), key=worth)

    def worth(self) -> tuple[bool, float]:
        return worth(self.best)

    def widen(self) -> bool:
        """One rate more beyond the best, if it is the lowest or highest tried; False if not."""
        place = LEARNING_RATES.index(self.best["learning_rate"])
        beyond = [place - self.stride] if place == min(self.places) else []
        beyond += [place + self.stride] if place == max(self.places) else []
        further = [p for p in beyond if 0 <= p < len(LEARNING_RATES)]
        self.places += further
        return bool(further)

    def settle(self, grounds: Sequence) -> None:
        """Go on with the best and the half octaves beside it, on all grounds."""
        place = LEARNING_RATES.index(self.best["learning_rate"])
        self.places = [p for p in (place - 1, place, place + 1) if 0 <= p < len(LEARNING_RATES)]
        self.grounds, self.stride = grounds, 1


@dataclass(frozen=True)
class Bench:
    """Where trials run, side by side, and are kept. line: a row, as it is told when it is there."""

    folder: Path
    pool: Executor
    line: Callable[[dict], str] = format_row

    @classmethod
    @contextmanager
    def of(cls, folder: Path, jobs: int, **options) -> Iterator[Bench]:
        """With `jobs` processes of one thread, for as long as they are wanted."""
        context = get_context("spawn")  # torch's threads do not survive a fork
        start = {"initializer": torch.set_num_threads, "initargs": (1,)}
        with ProcessPoolExecutor(jobs, context, **start) as pool:
            yield cls(folder, pool, **options)

    @property
    def rows(self) -> list[dict]:
        """Of all trials that were run here."""
        kept = self.folder / KEPT
        return json.loads(kept.read_text())["trials"] if kept.exists() else []

    def search(self, searches: Iterable[Search]) -> None:
        """Run all, side by side, until none wants another learning rate."""
        open_searches = list(searches)
        while open_searches:
            trials = [search.trials() for search in open_searches]
            rows = iter(self.run(chain(*trials)))
            for search, some in zip(open_searches, trials, strict=True):
                measured = islice(rows, len(some))
                search.rows += [row for row in measured if row not in search.rows]
            open_searches = [search for search in open_searches if search.widen()]

    def run(self, trials: Iterable[Trial]) -> list[dict]:
        """Rows in the trials' order; those that are there already are not run again, and one that
        is asked for twice runs once."""
        trials, rows = list(trials), self.rows
        missing = [trial for trial in trials if _row_of(trial, rows) is None]
        missing = {json.dumps(trial.asked): trial for trial in missing}.values()
        futures = [self.pool.submit(trial.run) for trial in missing]
        done = as_completed(futures)
        for future in tqdm(done, "trials", len(futures), unit="trial", disable=not futures):
            measured = future.result()
            rows.append(measured)
            write_result(self.folder / KEPT, {"trials": rows})
            tqdm.write(f"{measured['name']:<44}{self.line(measured)}")
        return [_row_of(trial, rows) for trial in trials]


def mean_row(rows: list[dict]) -> dict:
    """What rows of several seeds have in common, and the mean of what was measured on each."""
    same = {k: v for k, v in rows[0].items() if all((k, v) in r.items() for r in rows)}
    kept = {"keeps_events": all(r.get("keeps_events", True) for r in rows)}
    return same | {k: _mean([r[k] for r in rows]) for k in FIGURES if k in rows[0]} | kept


def worth(row: dict) -> tuple[bool, float]:
    """What trials are sorted by: who keeps its sounds comes first, then who is in step."""
    errors = [math.inf if row[key] is None else row[key] for key in ERRORS]
    return not row["keeps_events"], statistics.mean(errors)


def keeps_events(row: dict, real: dict) -> bool:
    """Nobody keeps time by falling silent: sounds per clip within 10 % of the real clips'."""
    return all(abs(row[key] / real["events_per_clip"] - 1) <= 0.1 for key in EVENTS)


def spread(values: Sequence[float], form: str) -> str:
    """Mean, least and most, as text; of one value that alone."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def write_result(result: Path, content: dict) -> None:
    result.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(result, (json.dumps(content, indent=1) + "\n").encode())


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else statistics.mean(values)


def _row_of(trial: Trial, rows: list[dict]) -> dict | None:
    return next((row for row in rows if trial.asked.items() <= row.items()), None)
