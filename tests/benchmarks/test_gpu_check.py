"""The check for a GPU, on a machine without one: every stage as far as it goes, and its figures."""

import json
import os
import subprocess
import sys
import time

import pytest
from scripts import BENCHMARKS, module

TOOL = BENCHMARKS / "gpu_check.py"


def run(*arguments):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def check():
    return module("gpu_check")


@pytest.fixture(scope="module")
def goals():
    return module("goals")


def test_every_stage_runs_dry(tmp_path):
    """But for the two that are scripts of their own, whose tests run them."""
    done = run("--dry-run", "--stages", "1,2,3,6", "--output", tmp_path / "results.json")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(check["passed"] for check in results["checks"].values())
    assert {"first calls", "tests", "embedded model", "compiled steps"} <= set(results["checks"])
    benchmarks = next(name for name in results["checks"] if name.startswith("bench_dpo_loss"))
    assert "passed" in results["checks"][benchmarks]["outcome"]
    assert results["gpu"] == "none"


def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check.py: no GPU here")
    assert len(done.stderr.splitlines()) == 1


def test_a_stage_that_does_not_exist_is_refused():
    done = run("--stages", "1,9")
    assert done.returncode == 2
    assert "--stages" in done.stderr


def test_a_check_that_fails_or_finds_no_time_is_counted_and_stops_nothing(check):
    def wrong():
        raise KeyError("no such row")

    results = {"checks": {}}
    end = time.monotonic() + 60
    check.attempt("wrong", wrong, results, end)
    check.attempt("right", lambda: "fine", results, end)
    check.attempt("late", lambda: "fine", results, time.monotonic() - 1)
    passed = {name: entry["passed"] for name, entry in results["checks"].items()}
    assert passed == {"wrong": False, "right": True, "late": False}
    assert "no such row" in results["checks"]["wrong"]["outcome"]
    assert "no time left" in results["checks"]["late"]["outcome"]


def test_a_command_that_hangs_is_given_up(check):
    results = {"checks": {}, "benchmarks": {}}
    hung = check.Check(results, time.monotonic() + 1.0, "tests", False)
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    check.attempt("hung", lambda: hung.run(sleeps), results, time.monotonic() + 60)
    assert not results["checks"]["hung"]["passed"]
    assert results["checks"]["hung"]["outcome"].startswith("given up after 1 s")


def test_goals_are_read_off_the_rows_that_there_are(goals):
    rows = {
        "test_pass[long-B4-forward-given]": {"of copy": 0.91},
        "test_pass[long-B4-backward-given]": {"of copy": 0.89},
        "test_loss[long-B4-syncdpo]": {"kernels": 2},
        "test_clean[long-B4-syncdpo]": {"ms": 0.2, "peak MiB": 200.0, "must move MiB": 800.0},
        "test_clean[long-B4-eager]": {"ms": 1.3},
        "test_replace_segments[raw-in-place]": {"times as quick as": {"kernel": 3.5}},
    }
    table = {row["goal"]: row for row in goals.table({"benchmarks": rows})}
    met = {name: row["met"] for name, row in table.items() if row["met"] is not None}
    assert met == {
        "dpo_loss forward: share of copy": True,
        "dpo_loss backward: share of copy": False,
        "kernels, both modalities, forward + backward": True,
        "clean → gradient: peak over x_t + gradient": True,
        "clean → gradient: eager over ours": True,
        "replace_segments, raw: in place over out of place": True,
    }
    assert table["clean → gradient: eager over ours"]["measured"] == 6.5
    text = goals.text(list(table.values()))
    assert len(text.splitlines()) == len(goals.GOALS)


def test_every_row_that_a_goal_reads_is_measured_on_a_gpu(goals):
    class Rows(dict):
        def __missing__(self, name):
            self[name] = row = {
                "of copy": 1.0, "ms": 1.0, "kernels": 1, "peak MiB": 1.0, "must move MiB": 4.0,
                "times as quick as": {"kernel": 1.0},
            }  # fmt: skip
            return row

    rows = Rows()
    assert all(row["measured"] is not None for row in goals.table({"benchmarks": rows}))
    pretend = "import sys, torch, pytest; torch.cuda.is_available = lambda: True; "
    collect = [*map(str, module("gpu_check").PYTEST[3:]), "--collect-only", str(BENCHMARKS)]
    done = subprocess.run(
        [sys.executable, "-c", pretend + f"sys.exit(pytest.main({collect!r}))"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    measured = {line.split("::")[1] for line in done.stdout.splitlines() if "::" in line}
    assert set(rows) <= measured
