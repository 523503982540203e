"""The benchmark of LTX-2's training step: its formulas, its dry run, and what it refuses."""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from scripts import BENCHMARKS, module
from torch.utils.flop_counter import FlopCounterMode

from syncdpo import ops

SCRIPT = BENCHMARKS / "ltx2_step.py"
DOCUMENT = BENCHMARKS.parent / "docs" / "ltx2.md"
FIRST = ("syncdpo", "sft", "cache_reference", "split_pair")


@pytest.fixture(scope="module")
def bench():
    return module("ltx2_step")


@pytest.fixture(scope="module")
def formulas():
    return module("ltx2_formulas")


@pytest.fixture(scope="module")
def training():
    return module("ltx2_training")


@pytest.fixture(scope="module")
def measuring():
    return module("ltx2_measuring")


def command(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment,
        timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("step") / "new" / "dry.json"
    done = command(SCRIPT, "--dry-run", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text()), done.stdout


def rows_of_the_document():
    """Of the table in docs/ltx2.md: pictures, S, and the figures as they are printed there."""
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if clip := re.fullmatch(r"[\d.]+ s \((\d+)( pictures)?\)", cells[0]):
            yield int(clip[1]), *cells[1:]


def test_the_formulas_give_the_documents_table(formulas):
    rows = list(rows_of_the_document())
    assert [row[0] for row in rows] == [49, 121, 241, 361, 481]
    size = formulas.Size()
    for pictures, s, forward, whole, split, *seconds in rows:
        streams = formulas.tokens(pictures)
        assert f"{streams[0]:,}" == s
        assert f"{formulas.forward_flop(size, *streams) / 1e12:,.0f}" == forward
        for mode, expected in (("syncdpo", whole), ("split_pair", split)):
            assert f"{formulas.step_gigabytes(size, mode, *streams):.0f}" == expected
        for mode, expected in zip(
            ("sft", "syncdpo", "cache_reference", "split_pair"), seconds, strict=True
        ):
            assert f"{formulas.step_seconds(size, mode, *streams):.1f}" == expected


def test_the_full_size_is_the_documents(formulas, training):
    """The transformer built on the GPU has the weights, tokens and operations computed with."""
    model = training.RandomLTX2(
        training.settings(dry=False),
        torch.device("meta"),
        height=formulas.HEIGHT,
        width=formulas.WIDTH,
    )
    assert torch.get_default_dtype() == torch.float32
    size = formulas.Size()
    weights = sum(p.numel() for p in model.transformer.parameters())
    assert weights == pytest.approx(size.weights, rel=0.01)
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}
    ends = tuple(f".{target}" for target in model.lora_targets)
    reached = [m for name, m in model.transformer.named_modules() if name.endswith(ends)]
    adapter = sum(training.CONFIG.lora_rank * (m.in_features + m.out_features) for m in reached)
    assert adapter == pytest.approx(size.adapter, rel=0.01)
    for pictures in (121, 241, 481):
        model.set_length(pictures)
        assert model.streams() == formulas.tokens(pictures)
    model.set_length(121)
    clip = {name: x[None].to("meta") for name, x in model.clip(formulas.TEXT_TOKENS).items()}
    latents, sigma = (clip.pop("video"), clip.pop("audio")), torch.rand(1, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.velocity(model.transformer, latents, (sigma, sigma), clip)
    expected = formulas.forward_flop(size, *model.streams())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_the_dry_run_measures_everything(bench, formulas, dry_run):
    report, _ = dry_run
    rows = report["measurements"]
    assert [(row["pictures"], row["mode"]) for row in rows] == list(bench.PLAN)
    assert {row["mode"] for row in rows[:4]} == set(FIRST)
    for row in rows:
        assert row["outcome"] == "measured"
        assert row["timed_steps"] == len(row["all_seconds"]) == bench.TIMED
        times = (row["seconds"], *row["all_seconds"], row["launched_seconds"], row["tflops"])
        assert all(math.isfinite(value) and value > 0 for value in times)
        assert min(row["all_seconds"]) <= row["seconds"] <= max(row["all_seconds"])
        assert 0 < row["ours_share"] < 1
        assert row["tokens"] == [
            ((row["pictures"] - 1) // 8 + 1) * 4,
            formulas.tokens(row["pictures"])[1],
        ]
    assert rows[0]["tokens"][1] == 126
    assert report["seconds"] < 120


def test_ours_is_taken_apart(measuring, dry_run):
    """All parts are seen where they run, the loss's backward of every kind of SyncDPO too."""
    for row in dry_run[0]["measurements"]:
        parts = row["parts_seconds"]
        expected = {"draw", "noise"} if row["mode"] == "sft" else set(measuring.PARTS)
        assert set(parts) == expected
        assert all(0 < seconds < row["seconds"] for seconds in parts.values())
        assert row["ours_share"] == pytest.approx(sum(parts.values()) / row["seconds"], rel=0.5)
        cached = row.get("cached_before_seconds", 0)
        assert (cached > 0) == (row["mode"] == "cache_reference")


def test_the_hooks_stand_about_the_loss_and_nothing_else():
    policy = torch.ones(2, 3, requires_grad=True)
    loss, _ = ops.dpo_loss(policy, torch.zeros(2, 3), torch.zeros(2, 3), beta=1, return_stats=True)
    assert "DPOLoss" in loss.grad_fn.name()
    assert [type(node).__name__ for node, _ in loss.grad_fn.next_functions if node] == [
        "AccumulateGrad"
    ]


def test_steps_are_profiled(dry_run):
    profiles = dry_run[0]["profiles"]
    assert set(profiles) == {"syncdpo", "sft"}
    for row in profiles.values():
        assert row["outcome"] == "measured"
        assert 0 <= row["idle_share"] < 1
        assert min(row["by_kind_seconds"].values()) > 0
    # A pair, and the reference's forward of it; a clip has fewer operators, not just smaller ones.
    assert profiles["syncdpo"]["kernels"] > profiles["sft"]["kernels"]


def test_a_small_gpus_settings_are_measured_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"base-precision": "nf4", "optimizer": "adamw8bit", "offload": "blocks"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = command(SCRIPT, "--dry-run", "--output", tmp_path / "dry.json", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "dry.json").read_text())
    assert {name: report[name.replace("-", "_")] for name in options} == options
    assert {row["outcome"] for row in report["measurements"]} == {"measured"}


def test_the_table_stands_beside_what_is_computed(dry_run):
    report, shown = dry_run
    lines = [line for line in shown.splitlines() if line.startswith("| ") and " s |" in line]
    assert len(lines) == len(report["measurements"]) + 1  # and the headings
    assert {line.count("|") for line in lines} == {14}


def test_kernels_that_overlap_count_once(measuring):
    kernels = [("b", 20, 10), ("a", 0, 10), ("c", 5, 10), ("d", 21, 2)]
    assert measuring.busy_seconds(kernels) == pytest.approx(25e-9)
    names = ("nvjet_tst_128x256", "flash_fwd_kernel", "cudnn_generated_fort_native_sdpa_sm90")
    assert [measuring.kind_of(name) for name in names] == [
        "matrix products",
        "attention",
        "attention",
    ]
    assert measuring.kind_of("vectorized_elementwise_kernel") == "the rest"


@pytest.fixture
def full_size(formulas):
    """What `attempt` asks of a bench at full size, without the model."""
    model = SimpleNamespace(set_length=lambda pictures: None, streams=lambda: formulas.tokens(121))
    size = formulas.Size()
    gigabytes = lambda mode: formulas.step_gigabytes(size, mode, *formulas.tokens(121))  # noqa: E731
    return SimpleNamespace(model=model, size=size, gigabytes=gigabytes)


def test_what_does_not_fit_into_the_time_is_skipped(bench, full_size, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: {"seconds": 8.0})
    now = bench.time.perf_counter()
    # Computed are 3.98 s a step: 13 s take a warm-up and two, 9 s a warm-up and one.
    for seconds, steps in ((13, 2), (9, 1), (7, 0)):
        assert bench.Budget(now + seconds).steps(full_size, "syncdpo") == steps
    budget = bench.Budget(now + 40)
    row = bench.attempt(full_size, "syncdpo", 121, budget, math.inf)
    assert (row["outcome"], row["timed_steps"]) == ("measured", 2)
    budget.end = now + 15  # two steps of the 8 s that were measured do not fit, of 4 s they would
    row = bench.attempt(full_size, "syncdpo", 121, budget, math.inf)
    assert row["outcome"] == "skipped"
    assert "two steps of about 8.0 s do not fit" in row["why"]
    assert "skipped: two steps" in bench.as_line(row)


@pytest.mark.parametrize(("memory", "outcome"), [(50, "out of memory"), (80, "failed")])
def test_out_of_memory_is_a_failure_only_where_it_should_fit(
    bench, full_size, monkeypatch, memory, outcome
):
    def measure(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "measure", measure)
    budget = bench.Budget(bench.time.perf_counter() + 100)
    row = bench.attempt(full_size, "syncdpo", 121, budget, memory)
    assert row["outcome"] == outcome
    assert row["why"] == f"52 GB and 3 to spare computed, {memory} here"


def test_a_step_that_fails_is_told_and_the_next_goes_on(bench, full_size, monkeypatch):
    """Also the exit code: every row of the plan, and of the profiles, fails once."""

    def broken(*_):
        raise ValueError("start: expected within 126 frames")

    monkeypatch.setattr(bench, "measure", broken)
    monkeypatch.setattr(bench, "profile_step", broken)
    monkeypatch.setattr(bench, "clean_up", lambda _: None)
    results = {"measurements": [], "profiles": {}, "matrix_tflops": 700}
    saved = []
    budget = bench.Budget(bench.time.perf_counter() + 1000)
    failures = bench.run(full_size, budget, 80, results, lambda: saved.append(len(results)))
    assert failures == len(bench.PLAN) + 2 == len(saved)
    assert results["measurements"][0]["why"] == "ValueError: start: expected within 126 frames"


def says(bench, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ltx2_step.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_without_a_gpu_or_memory_it_says_so(bench, monkeypatch, capsys):
    assert "rules" in says(bench, monkeypatch, capsys, "--dry-run", "--rules", "stretch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU here; --dry-run" in says(bench, monkeypatch, capsys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24e9, 25e9))
    expected = "expected 50 GB of free GPU memory or more, got 24"
    assert expected in says(bench, monkeypatch, capsys)


def test_missing_packages_are_named():
    program = (
        "import runpy, sys; sys.modules['diffusers'] = sys.modules['av'] = None; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = command("-c", program)
    assert done.returncode == 1
    assert done.stderr.startswith("ltx2_step: av, diffusers not installed")
    assert "pip install --no-index" in done.stderr
    assert "Traceback" not in done.stderr
