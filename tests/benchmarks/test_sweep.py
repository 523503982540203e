"""The sweep over the kernels' constants: its variants, their compilation, and its measuring."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
import pytest
import torch
from scripts import BENCHMARKS, module

TOOL = BENCHMARKS / "sweep.py"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Everything but compiling and CUDA graphs, on tiny tensors in Triton's interpreter.
MEASURED = """
import sys, tempfile, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import sweep, sweep_tables, sweep_timing, sweep_variants

class Interpreted(sweep_variants.Workshop):
    def request(self, name, shape, setting):
        self.variant(setting)

    def compiled(self, name, shape, setting, seconds):
        return sweep_variants.Compiled()

sweep.ROUNDS, sweep.LAST_ROUNDS = 1, 1
sweep_timing.FIRST_IGNORED, sweep_timing.MOST_CALLS = 0, 1
names = ["dpo_loss_forward", "dpo_loss_backward", "noise", "warp"]
for name in names:
    sweep.KERNELS[name] = sweep.KERNELS[name]._replace(shapes=("tiny",))
with tempfile.TemporaryDirectory(prefix="syncdpo_sweep_") as folder:
    workshop = Interpreted(Path(folder), 90, False, {})
    swept = sweep.Sweep(workshop, time.monotonic() + 60, True, "cpu")
    results = {"rows": swept.rows, "left_out": swept.left_out}
    assert sweep.run_all(names, swept, results, Path(sys.argv[2])) == []
    workshop.close()
sweep_tables.print_all(results, False)
"""


@pytest.fixture(scope="module")
def sweep():
    return module("sweep")


@pytest.fixture(scope="module")
def variants():
    return module("sweep_variants")


@pytest.fixture(scope="module")
def timing():
    return module("sweep_timing")


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    known = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        command, env=known | environment, capture_output=True, text=True, timeout=300, check=False
    )


# ---------------------------------------------------------------- variants


def test_every_constant_stands_once_where_the_sweep_looks(sweep, variants):
    values = variants.present(*variants.CONSTANTS)
    assert set(values) == set(variants.CONSTANTS)
    used = {name for kernel in sweep.KERNELS.values() for name in sweep.names_of(kernel)}
    assert used == set(variants.CONSTANTS)


def test_a_variant_differs_in_its_constants_alone(variants, tmp_path):
    setting = variants.changes({"CHUNK": 12288, "kThreads": 96})
    variant = variants.make_variant(tmp_path, setting)
    changed = {}
    for file in (*variants.ROOT.glob("kernels/*.py"), *variants.ROOT.glob("csrc/*")):
        theirs = (variant.folder / file.relative_to(variants.ROOT)).read_text().splitlines()
        ours = file.read_text().splitlines()
        changed[file.name] = [b for a, b in zip(ours, theirs, strict=True) if a != b]
    changed = {name: lines for name, lines in changed.items() if lines}
    assert set(changed) == {"_common.py", "segment_replace.cu"}
    assert all(len(lines) == 1 for lines in changed.values())
    assert "12288" in changed["_common.py"][0]
    assert "96" in changed["segment_replace.cu"][0]


def test_a_constant_that_is_not_found_is_named(variants, tmp_path):
    variant = variants.make_variant(tmp_path, ())
    file = variant.folder / "kernels" / "_common.py"
    file.write_text(file.read_text().replace("NUM_WARPS = ", "WARPS = "))
    with pytest.raises(ValueError, match=r"NUM_WARPS: expected once in kernels/_common\.py"):
        variants.change(variant.folder, "NUM_WARPS", 8)


@pytest.mark.parametrize("kernel", ["dpo_loss_forward", "noise", "warp", "replace_segments"])
def test_settings_are_legal_and_other_than_the_present(sweep, kernel):
    kernel = sweep.KERNELS[kernel]
    settings = sweep.single_changes(kernel, False)
    assert set(settings.values()) == set(kernel.axes)
    assert () not in settings
    assert all(sweep.legal(kernel, setting) for setting in settings)


def test_vectors_of_noise_hold_4_or_8(sweep, variants):
    vec = variants.changes({"vec": 16})
    plain, noisy = (sweep.KERNELS[f"dpo_loss_forward{suffix}"] for suffix in ("", "_velocity"))
    assert vec in sweep.single_changes(plain, False)
    assert vec not in sweep.single_changes(noisy, False)


def test_what_helps_is_joined(sweep):
    chunk, other_chunk = (("CHUNK", 8192),), (("CHUNK", 2048),)
    warps, vec = (("NUM_WARPS", 8),), (("vec", 4),)
    singles = {chunk: "chunk", other_chunk: "chunk", warps: "warps", vec: "vec"}
    ratios = {chunk: 0.9, other_chunk: 0.8, warps: 0.7, vec: 1.2}
    kernel = sweep.KERNELS["dpo_loss_backward"]
    assert sweep.joined(kernel, singles, ratios) == [tuple(sorted(other_chunk + warps))]
    ratios[vec] = 0.85
    three, two = sweep.joined(kernel, singles, ratios)
    assert set(three) == {*other_chunk, *warps, *vec}
    assert set(two) == {*other_chunk, *warps}
    assert sweep.joined(kernel, singles, dict.fromkeys(singles, 1.01)) == []


# ---------------------------------------------------------------- compiling


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_dry_run_compiles_variants_of_other_code(tmp_path):
    output = tmp_path / "sweep.json"
    done = run(TOOL, "--dry-run", "--few", "--kernels", "noise", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(output.read_text())["rows"]
    (row,) = rows
    assert row["wrong"] is None
    assert all(entry.get("failure") is None for entry in row["candidates"])
    compiled = [row, *row["candidates"]]
    assert all(entry["registers"] > 0 and entry["spill_bytes"] == 0 for entry in compiled)
    assert len({entry["code"] for entry in compiled}) == len(compiled) == 3
    assert "NUM_WARPS=2" in done.stdout


def test_it_needs_a_gpu_or_a_dry_run():
    done = run(TOOL, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no GPU here" in done.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------- measuring


@pytest.mark.skipif(
    version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="with this numpy, Triton 3.6 interprets no loop whose bound a kernel computes",
)
def test_variants_are_right_and_compared(tmp_path):
    output = tmp_path / "sweep.json"
    done = run("-c", MEASURED, TOOL.parent, output, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.read_text())
    assert results["left_out"] == []
    assert len(results["rows"]) == 4
    for row in results["rows"]:
        assert row["wrong"] is None, row
        assert len(row["candidates"]) >= 2
        assert all(e["failure"] is None and e["ratio"] > 0 for e in row["candidates"]), row
        assert row["ratio"] <= 1.0
        assert row["best_ms"] == pytest.approx(row["ratio"] * row["ms"])
        assert row["kernel"] in done.stdout
    assert "of settings that several rows share" in done.stdout


class Compiles:
    """A workshop whose variants are their settings."""

    dry_run = False

    def __init__(self, result):
        self.result = result

    def variant(self, setting):
        return setting

    def request(self, name, shape, setting):
        pass

    def compiled(self, name, shape, setting, seconds):
        return self.result


@pytest.fixture
def faulty(sweep, variants, timing, monkeypatch):
    """Sweeps "noise" with a function in its place, on a CPU, in so many seconds."""
    monkeypatch.setattr(timing, "MOST_CALLS", 1)

    def run(call, seconds=60.0):
        x = torch.arange(1.0, 5.0)
        problem = module("sweep_problems").Problem(
            {"x": x}, call, lambda: [2.0 * x], 0.0, (1e-3,), 32
        )
        kernel = sweep.KERNELS["noise"]._replace(problem=lambda *_: problem, shapes=("tiny",))
        monkeypatch.setitem(sweep.KERNELS, "noise", kernel)
        swept = sweep.Sweep(Compiles(variants.Compiled()), time.monotonic() + seconds, True, "cpu")
        swept.kernel("noise")
        return swept

    return run


def test_what_is_wrong_as_it_is_is_named_and_nothing_timed(faulty):
    swept = faulty(lambda variant, x: [2.1 * x["x"]])
    (row,) = swept.rows
    assert row["wrong"] == "wrong: result 0, 4 elements, by up to 0.4"
    assert row["ms"] is None
    assert row["candidates"] == []
    assert module("sweep_tables").failures(swept.rows) == [f"noise, tiny, as it is: {row['wrong']}"]


def test_a_candidate_that_fails_is_not_timed_and_does_not_stop_the_others(variants, faulty):
    fails = variants.changes({"CHUNK": 512})

    def call(variant, x):
        if variant == fails:
            raise RuntimeError("out of resource")
        return [2.0 * x["x"]]

    swept = faulty(call)
    (row,) = swept.rows
    one, other = row["candidates"]
    assert one["setting"] == dict(fails)
    assert one["failure"] == "RuntimeError: out of resource"
    assert "ms" not in one
    assert other["failure"] is None
    assert other["ratio"] > 0
    assert row["best"] in ({}, other["setting"])


def test_a_lost_device_is_laid_to_the_setting_that_lost_it(variants, timing, faulty, monkeypatch):
    fails, lost = variants.changes({"CHUNK": 512}), []

    def call(variant, x):
        if lost or variant == fails:
            lost.append(variant)
            raise RuntimeError("an illegal memory access")
        return [2.0 * x["x"]]

    def synchronize():
        if lost:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(timing.DeviceLost, match="an illegal memory access"):
        faulty(call)
    assert lost == [fails]


def test_memory_that_is_not_written_is_seen(faulty):
    swept = faulty(lambda variant, x: [torch.empty(4)])
    assert swept.rows[0]["wrong"].startswith("wrong: result 0, 4 elements")


def test_a_lost_device_leaves_the_rest_to_another_process(sweep, timing, tmp_path, monkeypatch):
    class Lost:
        rows, left_out, few = [], [], True

        def request(self, name):
            pass

        def kernel(self, name):
            if name == "noise":
                raise timing.DeviceLost("at CHUNK=1")

        def left(self):
            return 10.0

    output = tmp_path / "sweep.json"
    results = {"rows": Lost.rows, "left_out": Lost.left_out}
    rest = sweep.run_all(["dpo_loss_forward", "noise", "warp"], Lost(), results, output)
    assert rest == ["warp"]
    assert json.loads(output.read_text()) == results
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so the other process ends at once
    sweep.run_rest(rest, Lost(), results, output)
    assert json.loads(output.read_text())["left_out"] == ["warp"]


def test_what_does_not_fit_the_time_is_named(faulty):
    swept = faulty(lambda variant, x: [2.0 * x["x"]], seconds=0.0)
    assert swept.rows == []
    assert swept.left_out == ["noise, tiny"]
