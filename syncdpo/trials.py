"""Trials behind the demonstration's settings: weights, learning rates, and what each rule teaches.

Clips of each model's own are measured, from other noise than the demonstration's: nothing is chosen
on what is reported there. Trials run in `jobs` processes of one thread, side by side; what each
measured is kept in the output folder, from where the same command goes on, and all goes to `result`
at the end.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from syncdpo.data.files import write_atomic
from syncdpo.demo import (
    CHOSEN,
    WEIGHTS,
    Clips,
    DemoConfig,
    Samples,
    chosen,
    equal_time,
    format_row,
    prepare_clips,
    real_clips,
    row,
    sample,
    train_method,
)
from syncdpo.report import LABELS

# Half octaves. A search begins with every second one from the first to the last of these, and goes
# on until its best has neighbours on both sides.
LEARNING_RATES = tuple(float(f"{1e-3 * 2 ** (k / 2):.1e}") for k in range(16))  # to 0.18
BEGIN = {0: (2, 4, 6), 16: (6, 8, 10)}  # places in LEARNING_RATES, by LoRA rank
RULES = ("shift", "scale", "warp", "replace", "replace+scale")
CURRICULA = ("constant", "linear")
MATCHED = (0.0, 0.5)
SEEDS = 3


@dataclass(frozen=True)
class Trial:
    """One training and its name; `settings` as `TrainConfig` has them, `weights` of `WEIGHTS`."""

    config: DemoConfig
    clips: Clips
    name: str
    method: str
    settings: dict
    weights: str

    @property
    def asked(self) -> dict:
        """What tells its row from those of other trials, and of the same with other settings."""
        run = {"name": self.name}
        run |= {k: getattr(self.config, k) for k in ("seed", "samples", "offset_spread")}
        return self.settings | {"method": self.method, "weights": self.weights} | run

    def run(self) -> dict:
        result = train_method(self.config, self.name, self.clips, **self.settings)
        clips = sample(self.config, self.name)
        return self.asked | row(self.method, Samples(clips, None), result)


def tune(config: DemoConfig, result: Path, jobs: int) -> str:
    """Find which weights each method should train, and how fast.

    Returns each method's best for each choice of weights as markdown; all trials go to `result`.

    SFT and SyncDPO may both train any of `WEIGHTS`, each at learning rates that are searched for it
    until the best has neighbours on both sides. The best has the smallest onset error among those
    whose number of sounds per clip stays within 10 % of the real clips', or among all where none
    does. SFT at equal time is searched likewise, for as many steps as take the time of SyncDPO's
    best; SFT at equal steps then trains the weights that are best at equal time, at a rate of its
    own.
    """
    clips = prepare_clips(config)
    real = real_clips(clips)

    def find(method: str, steps: dict[str, int]) -> list[dict]:
        searches = [Search(config, clips, real, method, w, n) for w, n in steps.items()]
        run_searches(searches, config.output, jobs)
        best = min(searches, key=lambda s: worth(s.best, real))
        best.refine()
        run_searches([best], config.output, jobs)
        return [row for search in searches for row in search.rows]

    def best(method: str, **which) -> dict:
        found = [r for r in rows if {"method": method, **which}.items() <= r.items()]
        return min(found, key=lambda r: worth(r, real))

    steps = dict.fromkeys(WEIGHTS, config.steps)
    rows = find("sft", steps) + find("syncdpo", steps)
    for weights in WEIGHTS:
        compared = [r for r in rows if r["method"] == "sft" and r["weights"] == weights]
        steps[weights] = equal_time(config.steps, [*compared, best("syncdpo")])
    rows += find("sft-equal-time", steps)
    equal = best("sft-equal-time")
    winners = (best("sft", weights=equal["weights"]), best("syncdpo"), equal)
    choice = {r["method"]: [r["weights"], r["learning_rate"]] for r in winners}
    write_result(result, {"best": choice, "real": real, "trials": rows})
    return weights_table(rows, real)


class Search:
    """The learning rates tried for a method and its weights, as places in `LEARNING_RATES`."""

    def __init__(self, config, clips, real, method: str, weights: str, steps: int):
        self.config, self.clips, self.real = config, clips, real
        self.method, self.weights, self.steps = method, weights, steps
        self.places = list(BEGIN[WEIGHTS[weights]["lora_rank"]])
        self.rows: list[dict] = []

    def trials(self) -> list[Trial]:
        return [self._trial(LEARNING_RATES[place]) for place in self.places]

    @property
    def best(self) -> dict:
        return min(self.rows, key=lambda row: worth(row, self.real))

    def widen(self) -> bool:
        """One rate more beyond the best, if it is the lowest or highest tried; False if not."""
        place = LEARNING_RATES.index(self.best["learning_rate"])
        lowest, highest = min(self.places), max(self.places)
        further = [p for p, end in ((lowest - 2, lowest), (highest + 2, highest)) if place == end]
        further = [p for p in further if 0 <= p < len(LEARNING_RATES)]
        self.places += further
        return bool(further)

    def refine(self) -> None:
        """The half octaves beside the best."""
        place = LEARNING_RATES.index(self.best["learning_rate"])
        self.places += [p for p in (place - 1, place + 1) if 0 <= p < len(LEARNING_RATES)]

    def _trial(self, rate: float) -> Trial:
        settings = WEIGHTS[self.weights] | {"steps": self.steps, "learning_rate": rate}
        settings["method"] = self.method.removesuffix("-equal-time")
        name = f"{self.method}-{self.weights}-{rate:g}".replace(" ", "-").replace("'", "")
        return Trial(self.config, self.clips, name, self.method, settings, self.weights)


def run_searches(searches: list[Search], folder: Path, jobs: int) -> None:
    """Run all, side by side, until none wants another learning rate."""
    open_searches = searches
    while open_searches:
        trials = [search.trials() for search in open_searches]
        rows = iter(run_trials([t for some in trials for t in some], folder, jobs))
        for search, some in zip(open_searches, trials, strict=True):
            search.rows = list(itertools.islice(rows, len(some)))
        open_searches = [search for search in open_searches if search.widen()]


def compare_rules(config: DemoConfig, result: Path, jobs: int) -> str:
    """Each rule with constant and rising difficulty, matched or not, on `SEEDS` seeds.

    Returns the table, as markdown; all rows go to `result`.
    """
    weights, training = CHOSEN["syncdpo"][0], chosen("syncdpo") | {"steps": config.steps}
    trials = []
    for seed in range(SEEDS):
        there = replace(config, output=config.output / f"seed-{seed}", seed=seed)
        clips = prepare_clips(there)
        for rule, curriculum, matched in itertools.product(RULES, CURRICULA, MATCHED):
            settings = {"rules": rule, "curriculum": curriculum, "matched": matched} | training
            name = f"{rule}-{curriculum}-{matched:g}"
            trials.append(Trial(there, clips, name, "syncdpo", settings, weights))
    # One seed of all before the next: a table that was stopped is whole for the seeds it has.
    rows = run_trials(trials, config.output, jobs)
    write_result(result, {"trials": rows})
    return rules_table(rows)


def run_trials(trials: Iterable[Trial], folder: Path, jobs: int) -> list[dict]:
    """Rows in the trials' order; those that `folder` has already are not run again."""
    trials = list(trials)
    kept = folder / "trials.json"
    rows = json.loads(kept.read_text())["trials"] if kept.exists() else []
    missing = [trial for trial in trials if _row_of(trial, rows) is None]
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(
        jobs, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(trial.run) for trial in missing]
        for future in tqdm(as_completed(futures), "trials", len(futures), unit="trial"):
            measured = future.result()
            rows.append(measured)
            write_result(kept, {"trials": rows})
            tqdm.write(f"{measured['name']:<28}{format_row(measured)}")
    return [_row_of(trial, rows) for trial in trials]


def worth(row: dict, real: dict) -> tuple[bool, float]:
    """What trials are sorted by: who keeps its sounds comes first, then who is in step."""
    error = row["onset_error_ms"]
    return not keeps_events(row, real), math.inf if error is None else error


def keeps_events(row: dict, real: dict) -> bool:
    """Nobody keeps time by falling silent: sounds per clip within 10 % of the real clips'."""
    return abs(row["events_per_clip"] / real["events_per_clip"] - 1) <= 0.1


def weights_table(rows: list[dict], real: dict) -> str:
    """Weights × method: the best learning rate, F1 and onset error of own clips."""
    methods = ("sft", "sft-equal-time", "syncdpo")
    lines = [
        "| weights trained | " + " | ".join(LABELS[m] for m in methods) + " |",
        "|---" * 4 + "|",
    ]
    for weights in WEIGHTS:
        cells = [weights]
        for method in methods:
            which = {"method": method, "weights": weights}
            best = min(
                (r for r in rows if which.items() <= r.items()), key=lambda r: worth(r, real)
            )
            cells.append(
                f"{best['learning_rate']:g}: {best['f1']:.2f} · {best['onset_error_ms']:.0f} ms"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rules_table(rows: list[dict]) -> str:
    """Rule × (difficulty, matched): F1 and onset error, mean of the seeds and their range."""
    columns = list(itertools.product(CURRICULA, MATCHED))
    titles = [f"{c}, {'matched ' + format(m, 'g') if m else 'not matched'}" for c, m in columns]
    lines = ["| rule | " + " | ".join(titles) + " |", "|---" * (1 + len(columns)) + "|"]
    for rule in RULES:
        cells = [rule]
        for curriculum, matched in columns:
            here = {"rules": rule, "curriculum": curriculum, "matched": matched}
            found = [r for r in rows if here.items() <= r.items()]
            cells.append(
                f"{_spread(found, 'f1', '.2f')} · {_spread(found, 'onset_error_ms', '.0f')} ms"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_result(result: Path, content: dict) -> None:
    result.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(result, (json.dumps(content, indent=1) + "\n").encode())


def _row_of(trial: Trial, rows: list[dict]) -> dict | None:
    return next((row for row in rows if trial.asked.items() <= row.items()), None)


def _spread(rows: list[dict], key: str, form: str) -> str:
    values = [r[key] for r in rows]
    return f"{statistics.mean(values):{form}} ({min(values):{form}}–{max(values):{form}})"
