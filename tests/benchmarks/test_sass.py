"""What the compiler makes of the kernels for sm_90: the promises that need no GPU to be kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "benchmarks" / "sass.py"
# Issued instructions per pair of bf16 elements: what the memory leaves time for.
MOST_SLOTS = {
    ("_forward_kernel", False): 30,
    ("_forward_kernel", True): 60,
    ("_backward_kernel", False): 25,
    ("_backward_kernel", True): 45,
    ("_paired_noise_kernel", True): 52,
}

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    output = tmp_path_factory.mktemp("sass") / "sass.json"
    command = [sys.executable, TOOL, "--arch", "90", "--output", output]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def fused(table):
    """The rows of the loss and the noise."""
    return [row for row in table if row["kernel"] in {name for name, _ in MOST_SLOTS}]


def test_every_kernel_is_in_the_table(table):
    names = {row["kernel"] for row in table}
    expected = {name for name, _ in MOST_SLOTS} | {"_noise_kernel", "warp_kernel"}
    if shutil.which("nvcc"):
        expected |= {"replace_segments_kernel", "replace_in_place_kernel"}
    assert expected <= names


def test_nothing_spills(fused):
    assert all(row["spill_bytes"] == 0 for row in fused), fused


def test_aligned_inputs_are_loaded_16_bytes_at_a_time(fused):
    assert all(row["ldg128"] > 0 and row["ldg_narrow"] == 0 for row in fused), fused


def test_no_barrier_in_the_loop(fused):
    assert all(row["barriers_in_loop"] == 0 for row in fused), fused


@pytest.mark.parametrize(("kernel", "noise"), MOST_SLOTS)
def test_the_loop_keeps_up_with_memory(table, kernel, noise):
    key = {"kernel": kernel, "noise": noise, "dtype": "bf16"}
    (row,) = [row for row in table if key.items() <= row.items()]
    assert row["issue_slots_per_pair"] <= MOST_SLOTS[kernel, noise], row


def test_every_option_compiles_without_spills():
    script = Path(__file__).parents[1] / "compile_every_option.py"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_no_atomic_adds_floats():
    """One kind of atomic is there: an integer counts the programs that are done."""
    kernels = (TOOL.parent.parent / "kernels").glob("*.py")
    calls = [
        line for path in kernels for line in path.read_text().splitlines() if "atomic_" in line
    ]
    assert calls
    assert all("tl.atomic_add(arrived + " in line for line in calls), calls
