"""From clips to tables: every method at settings of its own, found in the same way for all.

All of it is trials; those that were run are kept, so the same call goes on where it was stopped.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from syncdpo.demo.demonstration import WEIGHTS, equal_time, figures
from syncdpo.demo.search import (
    LEARNING_RATES,
    Bench,
    Search,
    worth,
    write_result,
)
from syncdpo.evidence.grounds import Ground
from syncdpo.evidence.protocol import METHODS, QUESTIONS, RANKED_BY, SEARCHED, TRAINED, Protocol
from syncdpo.evidence.tables import tables
from syncdpo.evidence.trials import Pairs, Real, Trial

TENTH = 0.1


@dataclass(frozen=True)
class Way:
    """A method, all but its learning rate. ranked_by, sft_weight: of those who compare pairs."""

    method: str
    weights: str
    steps: int
    sft_weight: float = 1.0
    ranked_by: str = ""

    @property
    def compares(self) -> bool:
        return METHODS[self.method].settings["method"] != "sft"

    @property
    def settings(self) -> dict:
        own = METHODS[self.method].settings | WEIGHTS[self.weights] | {"steps": self.steps}
        return own | ({"sft_weight": self.sft_weight} if self.compares else {})

    def trial(self, ground: Ground, rate: float, **options) -> Trial:
        settings = self.settings | {"learning_rate": rate}
        return Trial(ground, self.method, settings, ranked_by=self.ranked_by, **options)

    def others(self, sft_weights: Sequence[float]) -> list[Way]:
        """The same with another weight of the winner's own error, or pairs ranked otherwise."""
        ranked = RANKED_BY if self.ranked_by else ("",)
        every = [replace(self, sft_weight=w, ranked_by=by) for by in ranked for w in sft_weights]
        return [way for way in every if self.compares and way != self]


class WaySearch(Search):
    """The learning rates tried for one way."""

    def __init__(self, grounds: Sequence[Ground], way: Way):
        super().__init__(grounds)
        self.way, self.protocol = way, grounds[0].protocol
        self.places = list(self.protocol.places)

    def trial(self, ground: Ground, rate: float) -> Trial:
        return self.way.trial(ground, rate)

    def widen(self) -> bool:
        return self.protocol.bracketed and super().widen()

    def settle(self, grounds: Sequence[Ground]) -> None:
        if self.protocol.bracketed:
            super().settle(grounds)
        self.grounds = grounds


def compare(protocol: Protocol, output: Path, result: Path, jobs: int) -> str:
    """Find every method's settings, measure, ask what the curriculum is worth; → tables.

    Trials run in `jobs` processes of one thread and are kept in `output`; `result` is written
    whenever a part of it is there.
    """
    content = {"protocol": asdict(protocol)}
    with Bench.of(output, jobs, line=line) as bench:
        for part, found in _parts(protocol, bench):
            content[part] = found
            write_result(result, content)
    return tables(content)


def _parts(protocol: Protocol, bench: Bench) -> Iterator[tuple[str, object]]:
    grounds = prepare_grounds(protocol, bench)
    costs = bench.run([Pairs(ground) for ground in grounds])
    yield "pairs", costs
    settled = find_settings(bench, grounds)
    yield "settled", {method: told(search) for method, search in settled.items()}
    yield "search", [row for row in bench.rows if is_of_search(row)]
    yield "table", measure_all(bench, grounds, settled, costs)
    yield "questions", ask(bench, grounds, settled["syncdpo"])


def is_of_search(row: dict) -> bool:
    """Not of questions, which ask of one family alone."""
    return row.get("kind") == "validation" and not row.get("family")


def line(row: dict) -> str:
    """A row as it is told when it is there."""
    if row["method"] == "pairs":
        told = ", ".join(f"{count} by {by}" for by, count in row["pairs"].items())
        return f"seed {row['seed']}   pairs: {told}"
    f1, error = figures(row)
    return f"seed {row['seed']}   F1 {f1:>4}, {error:>4} ms   {row['cpu_seconds']:4.0f} s of CPU"


def prepare_grounds(protocol: Protocol, bench: Bench) -> list[Ground]:
    grounds = [Ground(protocol, bench.folder, seed) for seed in range(protocol.seeds)]
    for ground in tqdm(grounds, "clips", unit="seed"):
        ground.prepare()
    real = bench.run([Real(ground, "validation") for ground in grounds])
    return [
        replace(ground, heard=row["events_per_clip"])
        for ground, row in zip(grounds, real, strict=True)
    ]


# --- settings -------------------------------------------------------------------------------------


def find_settings(bench: Bench, grounds: Sequence[Ground]) -> dict[str, WaySearch]:
    """Of each method: weights and learning rate on the first seed, then the winner's weight and
    what pairs are ranked by, then the rates beside the best on all seeds."""
    first, steps = grounds[:1], grounds[0].protocol.steps
    best = search_weights(bench, first, {m: dict.fromkeys(WEIGHTS, steps) for m in SEARCHED})
    for method, found in best.items():
        best[method] = refined(bench, found)
    best |= search_weights(bench, first, {"sft-equal-time": equal_times(best["syncdpo"])})
    for found in best.values():
        found.settle(grounds)
    bench.search(list(best.values()))
    return {method: best[method] for method in METHODS if method in best}


def search_weights(
    bench: Bench, grounds: Sequence[Ground], steps: dict[str, dict[str, int]]
) -> dict[str, WaySearch]:
    """Method → the best of its searches, one for each choice of weights and their steps."""
    searches = {
        method: [WaySearch(grounds, way(method, w, n)) for w, n in of.items()]
        for method, of in steps.items()
    }
    bench.search(list(chain(*searches.values())))
    return {method: min(some, key=Search.worth) for method, some in searches.items()}


def way(method: str, weights: str, steps: int) -> Way:
    of_dpo = METHODS[method].settings["method"] == "dpo"
    return Way(method, weights, steps, ranked_by=RANKED_BY[0] if of_dpo else "")


def refined(bench: Bench, found: WaySearch) -> WaySearch:
    """The best of a way and its others, all at the best rate."""
    others = found.way.others(found.protocol.sft_weights)
    rate = found.best["learning_rate"]
    rows = bench.run([other.trial(found.grounds[0], rate) for other in others])
    best = min(
        [(found.way, found.best), *zip(others, rows, strict=True)], key=lambda x: worth(x[1])
    )
    search = WaySearch(found.grounds, best[0])
    search.places, search.rows = [LEARNING_RATES.index(rate)], [best[1]]
    return search


def equal_times(syncdpo: WaySearch) -> dict[str, int]:
    """Weights → steps of SFT in the time of SyncDPO."""
    data, settings = syncdpo.grounds[0].latents("training"), syncdpo.way.settings
    sft = {w: way("sft-equal-time", w, 1).settings for w in WEIGHTS}
    return {w: equal_time(syncdpo.way.steps, sft[w], settings, data) for w in WEIGHTS}


def told(search: WaySearch) -> dict:
    """What a method was settled on, and how good it was on what it was settled by."""
    best = search.best
    keys = ("f1", "onset_error_ms", "own_f1", "own_onset_error_ms", "keeps_events")
    way = asdict(search.way) | {"learning_rate": best["learning_rate"]}
    return way | {key: best[key] for key in keys}


# --- the table ------------------------------------------------------------------------------------


def measure_all(
    bench: Bench, grounds: Sequence[Ground], settled: dict[str, WaySearch], costs: Sequence[dict]
) -> list[dict]:
    """A row for each method and seed, on pictures that nothing was chosen on."""
    trained = {method: (s.way, s.best["learning_rate"]) for method, s in settled.items()}
    ours, rate = trained["syncdpo"]
    steps = tenth_of_dpo(settled, costs)
    trained["syncdpo-tenth"] = replace(ours, method="syncdpo-tenth", steps=steps), rate
    trials: list = [Real(ground, "measured") for ground in grounds]
    for ground in grounds:
        trials.append(Trial(ground, "base", kind="measured"))
        trials += [of.trial(ground, r, kind="measured") for of, r in trained.values()]
    price = {row["seed"]: row["pairs_cpu_seconds"] for row in costs}
    rows = bench.run(trials)
    for row in rows:  # what ranked samples cost counts as time
        of = row.get("ranked_by")
        row["total_cpu_seconds"] = row["cpu_seconds"] + (price[row["seed"]][of] if of else 0)
    return rows


def tenth_of_dpo(settled: dict[str, WaySearch], costs: Sequence[dict]) -> int:
    """Steps of SyncDPO in a tenth of what DPO takes with its sampling and ranking, at most all."""
    dpo, ours = settled["dpo"], settled["syncdpo"]
    pairs = statistics.mean(row["pairs_cpu_seconds"][dpo.way.ranked_by] for row in costs)
    share = TENTH * (pairs + seconds(dpo)) / seconds(ours)
    return max(1, min(ours.way.steps, int(share * ours.way.steps)))


def seconds(search: WaySearch) -> float:
    """Of processors, a training of its best."""
    rate = search.best["learning_rate"]
    rows = [row for row in search.rows if row["learning_rate"] == rate]
    return statistics.mean(row["cpu_seconds"] for row in rows)


# --- what the curriculum is worth -----------------------------------------------------------------


def ask(bench: Bench, grounds: Sequence[Ground], syncdpo: WaySearch) -> dict:
    """One setting at a time, on the hardest family alone: the one whose F1 is furthest below that
    of its real clips, where SyncDPO was settled."""
    real = bench.run([Real(ground, "validation") for ground in grounds])
    rate = syncdpo.best["learning_rate"]
    rows = [row for row in syncdpo.rows if row["learning_rate"] == rate]
    family = max(TRAINED, key=lambda f: mean_f1(real, f) - mean_f1(rows, f))
    asked = []
    for name, values in QUESTIONS.items():
        for value in values:
            for ground in grounds:
                trial = syncdpo.way.trial(ground, rate, family=family)
                settings = trial.settings | {name: value}
                asked.append((name, value, replace(trial, settings=settings)))
    rows = bench.run([trial for *_, trial in asked])
    found = {(row["name"], row["seed"]): row for row in rows}
    return {
        "family": family,
        "real": [row["families"][family] | {"seed": row["seed"]} for row in real],
        "rows": [
            {"question": name, "value": value} | found[trial.name, trial.ground.seed]
            for name, value, trial in asked
        ],
    }


def mean_f1(rows: Sequence[dict], family: str) -> float:
    return statistics.mean(row["families"][family]["f1"] or 0.0 for row in rows)
