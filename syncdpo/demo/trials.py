"""Trials behind the demonstration's settings: weights, learning rates, and what each rule teaches.

What is measured starts from other noise than the demonstration's and shows other pictures: nothing
is chosen on what is reported there. Trials run in `jobs` processes of one thread, side by side;
what each measured is kept in the output folder, from where the same command goes on, and all goes
to `result` at the end.
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
from typing import NamedTuple

import torch
from tqdm import tqdm

from syncdpo.data.files import write_atomic
from syncdpo.demo.demonstration import (
    WEIGHTS,
    Clips,
    DemoConfig,
    equal_time,
    figures,
    format_row,
    prepare_clips,
    real_clips,
    row,
    sample_both,
    train_method,
    training,
)
from syncdpo.demo.report import LABELS

# Half octaves. A search begins with every second one from the first to the last of these, and goes
# on until its best has neighbours on both sides.
LEARNING_RATES = tuple(float(f"{1e-3 * 2 ** (k / 2):.1e}") for k in range(16))  # to 0.18
BEGIN = (4, 6, 8)  # places in LEARNING_RATES
RULES = ("shift", "scale", "warp", "replace", "replace+scale")
CURRICULA = ("constant", "linear")
MATCHED = (0.0, 0.5)
# Rules are compared on clips exactly in step, at the rate that is best for a LoRA there.
RULES_WEIGHTS = "LoRA of the sound's half"
RULES_TRAINING = {"lora_rank": 16, "trained": "audio", "learning_rate": 3e-2}
SEEDS = 3
ERRORS = ("onset_error_ms", "own_onset_error_ms")
EVENTS = ("events_per_clip", "own_events_per_clip")
FIGURES = ("f1", "own_f1", *ERRORS, *EVENTS)


class Ground(NamedTuple):
    """What trials of one seed share: its clips, and what is heard in those that are held out."""

    config: DemoConfig
    clips: Clips
    real: dict


@dataclass(frozen=True)
class Trial:
    """One training: its name, `settings` as `TrainConfig` has them, what `weights` it trains."""

    ground: Ground
    name: str
    method: str
    settings: dict
    weights: str

    @property
    def asked(self) -> dict:
        """What tells its row from those of other trials, and of the same with other settings."""
        keys = ("seed", "samples", "sampling_steps", "offset_spread")
        run = {"name": self.name} | {k: getattr(self.ground.config, k) for k in keys}
        return self.settings | {"method": self.method, "weights": self.weights} | run

    def run(self) -> dict:
        config, clips, real = self.ground
        result = train_method(config, self.name, clips, **self.settings)
        measured = row(self.method, sample_both(config, self.name, clips), result)
        return self.asked | measured | {"keeps_events": keeps_events(measured, real)}


def tune(config: DemoConfig, result: Path, jobs: int) -> str:
    """Find which weights each method should train, and how fast.

    Returns each method's best for each choice of weights as markdown; all trials go to `result`.

    SFT and SyncDPO may both train any of `WEIGHTS`. On the first seed each is tried at learning
    rates an octave apart, until the best has a neighbour on both sides; then the best weights'
    best rate and the half octaves beside it are settled by the mean of `SEEDS` seeds, likewise.
    The best has the smallest onset error, the mean of that of given pictures and that of own clips,
    among those whose number of sounds stays within 10 % of the real clips' in both and on every
    seed, or among all where none does. SFT at equal time is searched for as many steps as take the
    time of SyncDPO's best, and SFT at equal steps settles on the same weights.
    """
    grounds = prepare_grounds(config)

    def searches(method: str, steps: dict[str, int]) -> dict[str, Search]:
        return {w: Search(grounds[:1], method, w, n) for w, n in steps.items()}

    def settle(search: Search) -> Search:
        search.settle(grounds)
        run_searches([search], config.output, jobs)
        return search

    steps = dict.fromkeys(WEIGHTS, config.recipe.steps)
    sft, syncdpo = searches("sft", steps), searches("syncdpo", steps)
    run_searches([*sft.values(), *syncdpo.values()], config.output, jobs)
    best = {"syncdpo": settle(min(syncdpo.values(), key=Search.worth))}
    clips, syncdpo_settings = grounds[0].clips, best["syncdpo"].settings
    for weights, found in sft.items():
        steps[weights] = equal_time(
            config.recipe.steps, found.settings, syncdpo_settings, clips.training
        )
    longer = searches("sft-equal-time", steps)
    run_searches(longer.values(), config.output, jobs)
    best["sft-equal-time"] = settle(min(longer.values(), key=Search.worth))
    best["sft"] = settle(sft[best["sft-equal-time"].weights])
    everything = [s for found in (sft, longer, syncdpo) for s in found.values()]
    content = {
        "best": {method: [s.weights, s.best["learning_rate"]] for method, s in best.items()},
        "settled": {method: s.means() for method, s in best.items()},
        "real": mean_row([ground.real for ground in grounds]),
        "trials": [row for s in everything for row in s.rows],
    }
    write_result(result, content)
    return weights_table(everything)


class Search:
    """The learning rates tried for a method and its weights, as places in `LEARNING_RATES`."""

    def __init__(self, grounds: list[Ground], method: str, weights: str, steps: int):
        self.grounds, self.method, self.weights, self.steps = grounds, method, weights, steps
        self.places = list(BEGIN)
        self.stride = 2
        self.rows: list[dict] = []

    @property
    def settings(self) -> dict:
        return training(self.method) | WEIGHTS[self.weights]

    def trials(self) -> list[Trial]:
        rates = [LEARNING_RATES[place] for place in self.places]
        return [self._trial(ground, rate) for rate in rates for ground in self.grounds]

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

    def settle(self, grounds: list[Ground]) -> None:
        """Go on with the best and the half octaves beside it, on all grounds."""
        place = LEARNING_RATES.index(self.best["learning_rate"])
        self.places = [p for p in (place - 1, place, place + 1) if 0 <= p < len(LEARNING_RATES)]
        self.grounds, self.stride = grounds, 1

    def _trial(self, ground: Ground, rate: float) -> Trial:
        settings = self.settings | {"steps": self.steps, "learning_rate": rate}
        name = f"{self.method}-{self.weights}-{rate:g}".replace(" ", "-").replace("'", "")
        return Trial(ground, name, self.method, settings, self.weights)


def run_searches(searches: Iterable[Search], folder: Path, jobs: int) -> None:
    """Run all, side by side, until none wants another learning rate."""
    open_searches = list(searches)
    while open_searches:
        trials = [search.trials() for search in open_searches]
        rows = iter(run_trials([t for some in trials for t in some], folder, jobs))
        for search, some in zip(open_searches, trials, strict=True):
            measured = itertools.islice(rows, len(some))
            search.rows += [row for row in measured if row not in search.rows]
        open_searches = [search for search in open_searches if search.widen()]


def compare_rules(config: DemoConfig, result: Path, jobs: int) -> str:
    """Each rule with constant and rising difficulty, matched or not, on `SEEDS` seeds.

    Returns the table, as markdown; all rows go to `result`.
    """
    common = RULES_TRAINING | {"steps": config.recipe.steps}
    trials = []
    for ground in prepare_grounds(replace(config, offset_spread=0.0)):
        for rule, curriculum, matched in itertools.product(RULES, CURRICULA, MATCHED):
            settings = {"rules": rule, "curriculum": curriculum, "matched": matched} | common
            name = f"{rule}-{curriculum}-{matched:g}"
            trials.append(Trial(ground, name, "syncdpo", settings, RULES_WEIGHTS))
    # One seed of all before the next: a table that was stopped is whole for the seeds it has.
    rows = run_trials(trials, config.output, jobs)
    write_result(result, {"trials": rows})
    return rules_table(rows)


def prepare_grounds(config: DemoConfig) -> list[Ground]:
    seeds = [replace(config, seed=seed) for seed in range(SEEDS)]
    clips = [prepare_clips(there) for there in seeds]
    return [Ground(*each, real_clips(each[1])) for each in zip(seeds, clips, strict=True)]


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
            tqdm.write(f"{measured['name']:<44}{format_row(measured)}")
    return [_row_of(trial, rows) for trial in trials]


def mean_row(rows: list[dict]) -> dict:
    """What rows of several seeds have in common, and the mean of what was measured on each."""
    same = {k: v for k, v in rows[0].items() if all(r[k] == v for r in rows)}
    kept = {"keeps_events": all(r.get("keeps_events", True) for r in rows)}
    return same | {k: _mean([r[k] for r in rows]) for k in FIGURES if k in rows[0]} | kept


def worth(row: dict) -> tuple[bool, float]:
    """What trials are sorted by: who keeps its sounds comes first, then who is in step."""
    errors = [math.inf if row[key] is None else row[key] for key in ERRORS]
    return not row["keeps_events"], statistics.mean(errors)


def keeps_events(row: dict, real: dict) -> bool:
    """Nobody keeps time by falling silent: sounds per clip within 10 % of the real clips'."""
    return all(abs(row[key] / real["events_per_clip"] - 1) <= 0.1 for key in EVENTS)


def weights_table(searches: list[Search]) -> str:
    """Weights × method: the best learning rate, F1 and onset error, given pictures and own clips,
    on one seed or, where the method settled on these weights, the mean of all."""
    methods = ("sft", "sft-equal-time", "syncdpo")
    heads = ["weights trained", *(LABELS[method] for method in methods)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    cells = {(s.weights, s.method): _best_cell(s) for s in searches}
    for weights in WEIGHTS:
        lines.append(f"| {weights} | " + " | ".join(cells[weights, m] for m in methods) + " |")
    return "\n".join(lines)


def _best_cell(search: Search) -> str:
    best = search.best
    given, own = (f"{f1}, {error} ms" for f1, error in (figures(best), figures(best, "own_")))
    cell = f"{best['learning_rate']:g}: {given}; {own}"
    return f"**{cell}**" if len(search.grounds) > 1 else cell


def rules_table(rows: list[dict]) -> str:
    """Rule × (difficulty, matched): F1 and onset error of own clips, the seeds' mean and range."""
    columns = list(itertools.product(CURRICULA, MATCHED))
    titles = [f"{c}, {'matched ' + format(m, 'g') if m else 'not matched'}" for c, m in columns]
    lines = ["| rule | " + " | ".join(titles) + " |", "|---" * (1 + len(columns)) + "|"]
    for rule in RULES:
        cells = [rule]
        for curriculum, matched in columns:
            here = {"rules": rule, "curriculum": curriculum, "matched": matched}
            found = [r for r in rows if here.items() <= r.items()]
            f1, error = _spread(found, "own_f1", ".2f"), _spread(found, "own_onset_error_ms", ".0f")
            cells.append(f"{f1} · {error} ms")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_result(result: Path, content: dict) -> None:
    result.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(result, (json.dumps(content, indent=1) + "\n").encode())


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else statistics.mean(values)


def _row_of(trial: Trial, rows: list[dict]) -> dict | None:
    return next((row for row in rows if trial.asked.items() <= row.items()), None)


def _spread(rows: list[dict], key: str, form: str) -> str:
    values = [r[key] for r in rows]
    return f"{statistics.mean(values):{form}} ({min(values):{form}}–{max(values):{form}})"
