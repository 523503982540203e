"""Every test marked `kernel`, without a GPU: in a process where Triton interprets its kernels."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
KERNELS = sorted(p.stem for p in (HERE.parents[1] / "kernels").glob("[a-z]*.py"))
ROOMS = [*KERNELS, "launches", "velocity", "properties"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
@pytest.mark.skipif(
    version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="with this numpy, Triton 3.6 interprets no loop whose bound a kernel computes",
)
@pytest.mark.parametrize("room", ROOMS)
def test_kernels_in_the_interpreter(room):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    options = ["-q", "-m", "kernel", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, HERE / f"test_{room}.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", result.stdout), result.stdout
    assert "skipped" not in result.stdout, result.stdout
