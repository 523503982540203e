"""What the benchmarks share: time, bytes moved, and a plain copy's speed.

Figures are of one call: `ms` the median; `GB/s` counts the bytes that must move, each input once
and each output once, so that all ways are measured by the same stick; `of copy` is its share of
the speed of `copy_` in the same run; `moved`, on a CPU, the bytes that a way does move, as a
multiple of those that must: counted at the dispatcher for eager code (and for the ops' references,
which are what runs there), by Inductor for compiled code.
"""

import logging
import statistics
import time

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.compile_fx import inductor_metrics_log
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COPIED_BYTES = 1 << 31 if DEVICE == "cuda" else 1 << 26
COLUMNS = ("ms", "GB/s", "of copy", "peak MiB", "moved")


class CountBytes(TorchDispatchMode):
    """Bytes that eager operators read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            tensors = tree_leaves((args, kwargs, result))
            self.bytes += sum(_bytes(x) for x in tensors if isinstance(x, torch.Tensor))
        return result


def _bytes(x: torch.Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _eager_bytes(call) -> int:
    with CountBytes() as counter:
        call()
    return counter.bytes


def _inductor_bytes(call) -> int:
    """What Inductor says of a graph that it compiles in this call; it counts when it would log."""
    torch._dynamo.reset()
    metrics.reset()
    level = inductor_metrics_log.level
    inductor_metrics_log.setLevel(logging.INFO)
    with inductor_config.patch(force_disable_caches=True):
        call()
    inductor_metrics_log.setLevel(level)
    return metrics.num_bytes_accessed


def median_ms(function, rounds: int = 25) -> float:
    """On CUDA by events over a flushed cache, on CPU by the clock."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return do_bench(function, return_mode="median")
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(scope="session")
def copy_speed():
    """Bytes read and written per millisecond by a plain copy."""
    source = torch.empty(COPIED_BYTES // 4, device=DEVICE).fill_(1.0)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / median_ms(lambda: target.copy_(source))


@pytest.fixture
def measure(benchmark, copy_speed):
    """measure(call, must_move, compiled=False): times a call and keeps its figures."""

    def run(call, must_move: int, *, compiled: bool = False) -> None:
        moved = peak = None
        if DEVICE == "cpu":
            moved = _inductor_bytes(call) if compiled else _eager_bytes(call)
        if DEVICE == "cuda":
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            peak = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

        def finished():
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(finished, rounds=5, warmup_rounds=1)
        ms = median_ms(call)
        speed = must_move / ms
        figures = (
            round(ms, 4),
            round(speed / 1e6, 1),
            round(speed / copy_speed, 3),
            peak,
            round(moved / must_move, 2) if moved else None,
        )
        benchmark.extra_info |= dict(zip(COLUMNS, figures, strict=True))

    return run


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if b.extra_info] if session else []
    if not rows:
        return
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    terminalreporter.section(f"{name}, torch {torch.__version__}")
    width = max(len(row.name) for row in rows)
    terminalreporter.write_line("  ".join([" " * width, *(c.rjust(9) for c in COLUMNS)]))
    for row in rows:
        figures = (row.extra_info.get(c) for c in COLUMNS)
        cells = ["–".rjust(9) if f is None else str(f).rjust(9) for f in figures]
        terminalreporter.write_line("  ".join([row.name.ljust(width), *cells]))
