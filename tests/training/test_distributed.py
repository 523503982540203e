"""`accelerate launch` with the shipped configurations: two processes train as one does."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from launching import assert_same, launch, losses
from micro import outcome, run
from tiny_ltx2 import save_tiny_ltx2
from two_processes import RUNS, settings_in
from typer.testing import CliRunner

from syncdpo.cli import app
from syncdpo.data.clips import write_clip
from syncdpo.data.synthetic import render_clip
from syncdpo.training.checkpoint import read_figures, read_rows
from syncdpo.training.sharding import keep_precision

HERE = Path(__file__).parents[1]
# To the one token of `micro`'s text, queries and keys make no difference: their gradient is
# rounding, which AdamW turns into whole steps.
IDLE = r"attn2\.(to|norm)_[qk]\."


def assert_same_figures(first, second):
    """Held-out ones; margins to the rounding of an error of 2, times β."""
    figures, others = (
        {row["step"]: row["validation"] for row in read_rows(folder) if "validation" in row}
        for folder in (first, second)
    )
    assert list(figures) == list(others) == [0, 7, 14, 20]
    for step, expected in figures.items():
        assert others[step] == pytest.approx(expected, rel=1e-5, abs=1e-5), step
    assert figures[20]["clips"] == 7  # four batches of two over two processes, the last of one
    assert figures[20]["winner_ratio"] != 1


@pytest.fixture(scope="module")
def alone_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(alone_folder):
    """Each run in one process: {name: (log, weights)}."""
    outcomes = {}
    for name in RUNS:
        AcceleratorState._reset_state()  # one process of accelerate's has one precision
        outcomes[name] = run(alone_folder / name, **settings_in(alone_folder, name))
    AcceleratorState._reset_state()
    return outcomes


@pytest.mark.parametrize(
    ("config", "kind"), [("ddp_8_gpus.yaml", "MULTI_CPU"), ("fsdp2_8_gpus.yaml", "FSDP")]
)
def test_two_processes_equal_one(alone, alone_folder, tmp_path, config, kind):
    """All weights, the audio's with a cached reference, a resumed LoRA; whole or in shards."""
    printed = launch(config, HERE / "two_processes.py", tmp_path)
    assert printed.count(f"{kind} in 2 processes") == 2 * len(RUNS)
    for name, expected in alone.items():
        found = outcome(tmp_path / name)
        if name == "bf16":  # halves of a batch are rounded otherwise than the whole, to 8 bits
            torch.testing.assert_close(losses(found[0]), losses(expected[0]), rtol=2**-9, atol=0)
        else:
            assert_same(expected, found, ignore=IDLE)
    assert_same_figures(alone_folder / "watched", tmp_path / "watched")


def test_the_first_fsdp_is_refused():
    launched = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ValueError, match="fsdp_version: expected 2"):
        keep_precision(launched)


def test_the_command_line_in_two_processes_equals_one(tmp_path):
    """LTX-2's own classes, from a prepared cache to a LoRA."""
    model, clips, cache = (tmp_path / name for name in ("model", "clips", "cache"))
    save_tiny_ltx2(model)
    clips.mkdir()
    for seed in range(4):
        write_clip(clips / f"{seed}.mp4", render_clip(seed))
    size = ("--frames", 17, "--height", 64, "--width", 64)
    arguments = ("prepare", clips, "--output", cache, "--model", model, *size)
    assert CliRunner().invoke(app, [str(word) for word in arguments]).exit_code == 0
    settings = ("--model", model, "--data", cache, "--steps", 20, "--lora-rank", 2)
    one = ("train", *settings, "--output", tmp_path / "one", "--batch-size", 2)
    assert CliRunner().invoke(app, [str(word) for word in one]).exit_code == 0
    two = ("train", *settings, "--output", tmp_path / "two", "--batch-size", 1)
    # One of them samples meanwhile, and the other waits.
    samples = ("--sample-every", 10, "--sample-captions", "a ball", "--sample-steps", 2)
    launch("ddp_8_gpus.yaml", "-m", "syncdpo", *two, *samples, "--sample-count", 1)
    assert_same(outcome(tmp_path / "one"), outcome(tmp_path / "two"))
    assert [step for step, _ in read_figures(tmp_path / "two", "samples")] == [0, 10, 20]
    assert len(list((tmp_path / "two" / "samples").glob("step-*/*.mp4"))) == 3
