"""Trials behind the demonstration's settings: weights, learning rates, and what each rule teaches.

What is measured starts from other noise than the demonstration's and shows other pictures: nothing
is chosen on what is reported there. Trials run in `jobs` processes of one thread, side by side;
what each measured is kept in the output folder, from where the same command goes on, and all goes
to `result` at the end.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from syncdpo.demo.demonstration import (
    WEIGHTS,
    Clips,
    DemoConfig,
    equal_time,
    figures,
    prepare_clips,
    real_clips,
    row,
    sample_both,
    train_method,
    training,
)
from syncdpo.demo.report import LABELS
from syncdpo.demo.search import (
    Bench,
    Search,
    keeps_events,
    mean_row,
    spread,
    write_result,
)

RULES = ("shift", "scale", "warp", "replace", "replace+scale")
CURRICULA = ("constant", "linear")
MATCHED = (0.0, 0.5)
# Rules are compared on clips exactly in step, at the rate that is best for a LoRA there.
RULES_WEIGHTS = "LoRA of the sound's half"
RULES_TRAINING = {"lora_rank": 16, "trained": "audio", "learning_rate": 3e-2}
SEEDS = 3


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
    with Bench.of(config.output, jobs) as bench:
        content, everything = find(config, grounds, bench)
    write_result(result, content)
    return weights_table(everything)


def find(
    config: DemoConfig, grounds: list[Ground], bench: Bench
) -> tuple[dict, list[WeightsSearch]]:
    """What `tune` writes down, and all of its searches."""

    def searches(method: str, steps: dict[str, int]) -> dict[str, WeightsSearch]:
        return {w: WeightsSearch(grounds[:1], method, w, n) for w, n in steps.items()}

    def settle(search: WeightsSearch) -> WeightsSearch:
        search.settle(grounds)
        bench.search([search])
        return search

    steps = dict.fromkeys(WEIGHTS, config.recipe.steps)
    sft, syncdpo = searches("sft", steps), searches("syncdpo", steps)
    bench.search([*sft.values(), *syncdpo.values()])
    best = {"syncdpo": settle(min(syncdpo.values(), key=Search.worth))}
    clips, syncdpo_settings = grounds[0].clips, best["syncdpo"].settings
    for weights, found in sft.items():
        steps[weights] = equal_time(
            config.recipe.steps, found.settings, syncdpo_settings, clips.training
        )
    longer = searches("sft-equal-time", steps)
    bench.search(longer.values())
    best["sft-equal-time"] = settle(min(longer.values(), key=Search.worth))
    best["sft"] = settle(sft[best["sft-equal-time"].weights])
    everything = [s for found in (sft, longer, syncdpo) for s in found.values()]
    content = {
        "best": {method: [s.weights, s.best["learning_rate"]] for method, s in best.items()},
        "settled": {method: s.means() for method, s in best.items()},
        "real": mean_row([ground.real for ground in grounds]),
        "trials": [row for s in everything for row in s.rows],
    }
    return content, everything


class WeightsSearch(Search):
    """Of a method and the weights that it trains, for so many steps."""

    def __init__(self, grounds: list[Ground], method: str, weights: str, steps: int):
        super().__init__(grounds)
        self.method, self.weights, self.steps = method, weights, steps

    @property
    def settings(self) -> dict:
        return training(self.method) | WEIGHTS[self.weights]

    def trial(self, ground: Ground, rate: float) -> Trial:
        settings = self.settings | {"steps": self.steps, "learning_rate": rate}
        name = f"{self.method}-{self.weights}-{rate:g}".replace(" ", "-").replace("'", "")
        return Trial(ground, name, self.method, settings, self.weights)


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
    with Bench.of(config.output, jobs) as bench:
        rows = bench.run(trials)
    write_result(result, {"trials": rows})
    return rules_table(rows)


def prepare_grounds(config: DemoConfig) -> list[Ground]:
    seeds = [replace(config, seed=seed) for seed in range(SEEDS)]
    clips = [prepare_clips(there) for there in seeds]
    return [Ground(*each, real_clips(each[1])) for each in zip(seeds, clips, strict=True)]


def weights_table(searches: list[WeightsSearch]) -> str:
    """Weights × method: the best learning rate, F1 and onset error, given pictures and own clips,
    on one seed or, where the method settled on these weights, the mean of all."""
    methods = ("sft", "sft-equal-time", "syncdpo")
    heads = ["weights trained", *(LABELS[method] for method in methods)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    cells = {(s.weights, s.method): _best_cell(s) for s in searches}
    for weights in WEIGHTS:
        lines.append(f"| {weights} | " + " | ".join(cells[weights, m] for m in methods) + " |")
    return "\n".join(lines)


def _best_cell(search: WeightsSearch) -> str:
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
            f1, error = (
                spread([row[key] for row in found], form)
                for key, form in (("own_f1", ".2f"), ("own_onset_error_ms", ".0f"))
            )
            cells.append(f"{f1} · {error} ms")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
