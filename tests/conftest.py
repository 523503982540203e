"""Which implementation of an op a test runs, and where.

A test that takes `impl` runs twice: against the reference, and against the Triton kernel where
there is a GPU or Triton's interpreter. `test_interpreter.py` runs the second kind without a GPU.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "kernel: needs a GPU or TRITON_INTERPRET=1")
    config.addinivalue_line("markers", "slow: half a minute; `-m 'not slow'` leaves it out")


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.fixture(
    scope="session", params=["reference", pytest.param("kernel", marks=pytest.mark.kernel)]
)
def impl(request, device):
    if request.param == "kernel" and device == "cpu" and not INTERPRETED:
        pytest.skip("needs a GPU; test_interpreter.py runs it in Triton's interpreter")
    return request.param


@pytest.fixture(scope="module")
def poisoned_memory():
    """Fresh memory holds NaN, so that an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
