"""The comparison in miniature, killed and gone on with, and how its parts decide."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from syncdpo.demo.search import KEPT, Bench, mean_row
from syncdpo.evidence import FULL, QUICK, compare, trials
from syncdpo.evidence.comparison import Way, WaySearch, ask, line, refined, tenth_of_dpo, way
from syncdpo.evidence.grounds import Ground, families_of
from syncdpo.evidence.protocol import FAMILIES_OF, METHODS, QUESTIONS, RANKED_BY, TRAINED
from syncdpo.evidence.tables import by_family, tables
from syncdpo.evidence.trials import Trial
from syncdpo.training import TrainingDiverged
from syncdpo.training.checkpoint import read_log


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """All of it, once killed: its folder, and what was known when it was."""
    folder = tmp_path_factory.mktemp("evidence")
    command = [sys.executable, "-m", "syncdpo", "compare", "--quick", "--output", str(folder)]
    kept, before = folder / "quick" / KEPT, []
    run = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while len(before) < 3:
        assert run.poll() is None, run.stderr.read().decode()
        time.sleep(0.2)
        before = json.loads(kept.read_text())["trials"] if kept.exists() else []
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    told = subprocess.run(command, check=True, capture_output=True).stdout.decode()
    return folder / "quick", before, told


def test_it_goes_on_where_it_was_killed(quick, monkeypatch):
    folder, before, told = quick
    assert json.loads((folder / KEPT).read_text())["trials"][: len(before)] == before
    monkeypatch.setattr(Bench, "of", WithoutProcesses)
    again = compare(QUICK, folder, folder / "again.json", jobs=1)
    assert told.endswith(again + "\n")
    assert json.loads((folder / "again.json").read_text()) == json.loads(
        (folder / "evidence.json").read_text()
    )


class WithoutProcesses:
    """A bench on which nothing can be run."""

    def __init__(self, folder, jobs, **options):
        self.bench = Bench(folder, None, **options)

    def __enter__(self):
        return self.bench

    def __exit__(self, *_):
        pass


def test_every_method_has_its_row_on_every_family(quick):
    content = json.loads((quick[0] / "evidence.json").read_text())
    assert [row["method"] for row in content["table"]] == ["real", *METHODS]
    for row in content["table"]:
        assert list(row["families"]) == list(FAMILIES_OF["measured"])
    rows = {row["method"]: row for row in content["table"]}
    assert rows["sft"]["steps"] == rows["syncdpo"]["steps"] == rows["dpo"]["steps"] == QUICK.steps
    assert rows["sft-equal-time"]["steps"] > QUICK.steps
    pairs = content["pairs"][0]
    assert set(pairs["pairs"]) == set(RANKED_BY)
    priced = pairs["pairs_cpu_seconds"][rows["dpo"]["ranked_by"]]
    assert rows["dpo"]["total_cpu_seconds"] == pytest.approx(rows["dpo"]["cpu_seconds"] + priced)
    assert rows["syncdpo"]["total_cpu_seconds"] == rows["syncdpo"]["cpu_seconds"]


def test_a_training_of_the_table_is_the_one_that_was_settled_on(quick):
    folder = quick[0]
    content = json.loads((folder / "evidence.json").read_text())
    runs = folder / "seed-0" / "runs"
    for method, settled in content["settled"].items():
        row = next(row for row in content["table"] if row["method"] == method)
        assert row["learning_rate"] == settled["learning_rate"]
        assert row["trained"] == ("both" if settled["weights"] == "all" else "audio")
        assert len(read_log(runs / row["name"])) == row["steps"] == settled["steps"]
        kinds = {path.name for path in (runs / row["name"]).iterdir() if path.is_dir()}
        assert {"validation", "measured"} <= kinds  # trained once, measured twice


def test_clips_of_a_ground_are_of_all_families_and_of_none_twice(quick):
    ground = Ground(QUICK, quick[0], 0)
    for kind, families in FAMILIES_OF.items():
        data = ground.latents(kind)
        assert families_of(data) == QUICK.count(kind) * list(families)
        some = ground.latents(kind, "weak")
        assert set(families_of(some)) == {"weak"}
        assert len(some) == QUICK.count(kind)
    names = [Path(n).name for k in FAMILIES_OF for n in set(ground.latents(k).dataset.names)]
    assert len(set(names)) == sum(QUICK.count(kind) for kind in FAMILIES_OF)  # no seed for two ends


def test_questions_change_one_setting_each(quick):
    questions = json.loads((quick[0] / "evidence.json").read_text())["questions"]
    assert questions["family"] in TRAINED
    ours = METHODS["syncdpo"].settings
    for row in questions["rows"]:
        assert row["family"] == questions["family"]
        changed = {k for k in QUESTIONS if row[k] != ours[k]}
        assert changed <= {row["question"]}
        assert row[row["question"]] == row["value"]
    assert len({row["name"] for row in questions["rows"]}) == 11  # ours is in each question


# --- how its parts decide, without a training -----------------------------------------------------


class Measured(Bench):
    """Whatever it is asked: figures by `figures(trial)`."""

    def __init__(self, figures):
        super().__init__(Path(), None)
        object.__setattr__(self, "figures", figures)

    def run(self, trials):
        return [
            trial.asked
            | {"f1": 0.5, "own_f1": 0.5, "events_per_clip": 3.0, "own_events_per_clip": 3.0}
            | {"onset_error_ms": 50.0, "own_onset_error_ms": 50.0, "keeps_events": True}
            | {"cpu_seconds": 10.0}
            | self.figures(trial)
            for trial in trials
        ]


GROUND = Ground(FULL, Path("nowhere"), 0, heard=3.0)


def searched(of: Way, figures=lambda trial: {}, grounds=(GROUND,)) -> WaySearch:
    search = WaySearch(grounds, of)
    Measured(figures).search([search])
    return search


def test_whoever_compares_pairs_tries_the_winners_weight_and_dpo_the_ranking_too():
    assert way("sft", "all", 9).others(FULL.sft_weights) == []
    others = way("syncdpo", "all", 9).others(FULL.sft_weights)
    assert [other.sft_weight for other in others] == [0.0, 3.0]
    ranked = {(o.sft_weight, o.ranked_by) for o in way("dpo", "all", 9).others(FULL.sft_weights)}
    assert len(ranked) == 5
    assert (1.0, RANKED_BY[0]) not in ranked


def test_the_best_of_a_ways_others_is_settled_on():
    def figures(trial):
        best = trial.settings["sft_weight"] == 3.0 and trial.ranked_by == RANKED_BY[1]
        return {"onset_error_ms": 20.0 if best else 50.0}

    found = refined(Measured(figures), searched(way("dpo", "all", 9)))
    assert (found.way.sft_weight, found.way.ranked_by) == (3.0, RANKED_BY[1])
    assert found.best["onset_error_ms"] == 20.0
    seeds = [replace(GROUND, seed=seed) for seed in range(3)]
    found.settle(seeds)
    Measured(figures).search([found])
    assert {row["seed"] for row in found.rows} == {0, 1, 2}


def test_a_tenth_of_dpos_time_counts_its_sampling():
    settled = {
        "dpo": searched(way("dpo", "all", 120), lambda trial: {"cpu_seconds": 90.0}),
        "syncdpo": searched(way("syncdpo", "all", 120), lambda trial: {"cpu_seconds": 100.0}),
    }
    costs = [{"pairs_cpu_seconds": {RANKED_BY[0]: 410.0, RANKED_BY[1]: 1e6}}]
    assert tenth_of_dpo(settled, costs) == 60  # (410 + 90) / 10 = 50 s of 100
    assert tenth_of_dpo(settled, [{"pairs_cpu_seconds": {RANKED_BY[0]: 1e6}}]) == 120


def test_the_hardest_family_is_the_one_furthest_below_its_real_clips():
    """`several` has the lowest F1, but a third of its sounds is never seen: `weak` is furthest."""
    real = {"impacts": 1.0, "speech": 0.98, "several": 0.87, "weak": 1.0}
    ours = {"impacts": 0.9, "speech": 0.9, "several": 0.7, "weak": 0.75}

    def figures(trial):
        of = ours if isinstance(trial, Trial) else real
        return {"families": {name: {"f1": f1} for name, f1 in of.items()}}

    search = searched(way("syncdpo", "all", 9), figures)
    found = ask(Measured(figures), [GROUND], search)
    assert found["family"] == "weak"
    assert len(found["rows"]) == sum(map(len, QUESTIONS.values()))


def test_a_training_that_diverges_is_a_row_and_never_the_best(tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise TrainingDiverged("no finite gradient")

    monkeypatch.setattr(trials, "train", diverge)
    ground = replace(GROUND, folder=tmp_path, protocol=QUICK)
    monkeypatch.setattr(Ground, "latents", lambda *_: None)
    row = way("sft", "all", 2).trial(ground, 0.18).run()
    assert row["lost"] == "no finite gradient"
    assert not row["keeps_events"]
    assert "—" in line(row)
    assert by_family([row]).splitlines()[2].count("— · —") == len(TRAINED)
    lost = {key: row[key] for key in ("onset_error_ms", "own_onset_error_ms", "keeps_events")}
    rate = "learning_rate"
    search = searched(way("sft", "all", 2), lambda t: lost if t.settings[rate] > 0.01 else {})
    assert search.best["learning_rate"] <= 0.01
    found = Measured(lambda trial: {}).run([way("sft", "all", 2).trial(ground, 0.18)])[0]
    for rows in ([row, found], [found, row]):  # diverged on one seed, whichever comes first
        assert mean_row(rows)["onset_error_ms"] is None
        assert not mean_row(rows)["keeps_events"]


def test_the_table_says_what_syncdpos_error_is_of_the_better_sfts():
    families = FAMILIES_OF["measured"]
    error = {"real": 10.0, "sft": 80.0, "sft-equal-time": 50.0, "syncdpo": 25.0}
    rows = [
        {"method": m, "seed": s}
        | {"families": {f: {"f1": 0.5, "onset_error_ms": e + s} for f in families}}
        for m, e in error.items()
        for s in (0, 1)
    ]
    lines = by_family(rows).splitlines()
    assert (
        lines[-1]
        == "| SyncDPO's error, of the better SFT's | " + " | ".join(["0.50"] * len(families)) + " |"
    )  # 25.5 of 50.5
    assert "0.50 (0.50–0.50) · 50 (50–51)" in lines[4]


def test_a_comparison_without_its_questions_reads_too(quick):
    content = json.loads((quick[0] / "evidence.json").read_text())
    whole = tables(content)
    del content["questions"]
    assert whole.startswith(tables(content))
