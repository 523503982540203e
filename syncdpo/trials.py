"""Trials behind the demonstration's settings: learning rates, and what each rule teaches.

What is measured starts from other noise than the demonstration's, and shows other pictures where
they are given: nothing is chosen on what is reported there. Trials run in `jobs` processes of one
thread, side by side; what each measured is kept in the output folder, from where the same command
goes on, and all goes to `result` at the end.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from syncdpo.data.files import write_atomic
from syncdpo.demo import (
    LEARNING_RATE,
    RECIPE,
    Clips,
    DemoConfig,
    Samples,
    add_sound,
    equal_time,
    format_row,
    prepare_clips,
    real_clips,
    row,
    sample,
    train_method,
)

LEARNING_RATES = (1e-2, 2e-2, 3e-2, 4e-2, 6e-2)
RULES = ("shift", "scale", "warp", "replace", "replace+scale")
CURRICULA = ("constant", "linear")
MATCHED = (0.0, 0.5)
SEEDS = 3


@dataclass(frozen=True)
class Trial:
    """One training and its name; `settings` as `TrainConfig` has them."""

    config: DemoConfig
    clips: Clips
    name: str
    method: str
    settings: dict

    @property
    def asked(self) -> dict:
        """What tells its row from those of other trials, and of the same with other settings."""
        run = {"name": self.name, "seed": self.config.seed, "samples": self.config.samples}
        return RECIPE | self.settings | {"method": self.method} | run

    def run(self) -> dict:
        result = train_method(self.config, self.name, self.clips, **self.settings)
        clips = sample(self.config, self.name)
        held_out = add_sound(self.config, self.name, self.clips)
        return self.asked | row(self.method, Samples(clips, held_out), result)


def tune_learning_rates(config: DemoConfig, result: Path, jobs: int) -> None:
    """Try every learning rate for every method, SFT also at SyncDPO's time; write all to `result`.

    The best has the smallest onset error among those whose number of sounds per clip stays within
    10 % of the real clips'.
    """
    clips = prepare_clips(config)

    def trials(label: str, method: str, steps: int) -> Iterator[Trial]:
        for rate in LEARNING_RATES:
            settings = {"method": method, "steps": steps, "learning_rate": rate}
            yield Trial(config, clips, f"{label}-{rate:g}", label, settings)

    equal_steps = [*trials("sft", "sft", config.steps), *trials("syncdpo", "syncdpo", config.steps)]
    rows = run_trials(equal_steps, config.output, jobs)
    steps = equal_time(config.steps, rows)
    rows += run_trials(trials("sft-equal-time", "sft", steps), config.output, jobs)
    real = real_clips(clips)
    best = {}
    for method in ("sft", "syncdpo", "sft-equal-time"):
        kept = [r for r in rows if r["method"] == method and keeps_events(r, real)]
        best[method] = min(kept, key=lambda r: r["onset_error_ms"])["learning_rate"]
    write_result(result, {"best": best, "real": real, "trials": rows})


def compare_rules(config: DemoConfig, result: Path, jobs: int) -> str:
    """Each rule with constant and rising difficulty, matched or not, on `SEEDS` seeds.

    Returns the table, as markdown; all rows go to `result`.
    """
    training = {"steps": config.steps, "learning_rate": LEARNING_RATE["syncdpo"]}
    trials = []
    for seed in range(SEEDS):
        there = replace(config, output=config.output / f"seed-{seed}", seed=seed)
        clips = prepare_clips(there)
        for rule, curriculum, matched in itertools.product(RULES, CURRICULA, MATCHED):
            settings = {"rules": rule, "curriculum": curriculum, "matched": matched} | training
            name = f"{rule}-{curriculum}-{matched:g}"
            trials.append(Trial(there, clips, name, "syncdpo", settings))
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


def keeps_events(row: dict, real: dict) -> bool:
    """Nobody keeps time by falling silent: sounds per clip within 10 % of the real clips'."""
    return abs(row["events_per_clip"] / real["events_per_clip"] - 1) <= 0.1


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
