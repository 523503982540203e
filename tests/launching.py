"""Runs in two processes, as `accelerate launch` starts them, and whether two runs are one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from processes import PYTHONPATH

CONFIGS = Path(__file__).parents[1] / "configs"


def launch(config, *arguments):
    """In two processes, on the CPU; → what they printed."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config,
        "--num_processes", 2, "--main_process_port", 0, *arguments,
    ]  # fmt: skip
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # Should native code crash, it says where.
    environment = os.environ | cpu | {"PYTHONPATH": PYTHONPATH, "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-12000:]
    return done.stdout


def losses(log):
    return torch.tensor([entry["loss"] for entry in log])


def assert_same(first, second, ignore=r"$."):
    """Losses to 1e-5; weights too, all of them as one vector; gradients to rounding's sum."""
    (log, weights), (other_log, other_weights) = first, second
    for name, rtol in (("loss", 1e-5), ("grad_norm", 1e-4)):
        found, expected = (torch.tensor([entry[name] for entry in x]) for x in (log, other_log))
        assert len(found) == 20
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    assert weights.keys() == other_weights.keys()
    names = [name for name in weights if not re.search(ignore, name)]
    difference = sum((weights[name] - other_weights[name]).square().sum() for name in names)
    size = sum(weights[name].square().sum() for name in names)
    assert (difference / size).sqrt() <= 1e-5
