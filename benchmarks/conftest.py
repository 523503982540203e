"""What the benchmarks share: time, bytes moved, and a plain copy's speed.

Figures are of one call: `ms` the median, as called from Python; `GB/s` counts the bytes that must
move, each input once and each output once, so that all ways are measured by the same stick;
`of copy` is its share of the speed of `copy_` of 2 GiB in the same run. On CUDA `graph ms` is the
same call replayed as a CUDA graph, where the device never waits for Python; `GB/s` and `of copy`
are of that, and `of its copy` is the share of the speed of a `copy_` that moves as many bytes,
replayed likewise: what starting and ending cost is in both. `kernels` counts those that a call
launches; `peak MiB` is what it sets aside. On a CPU `moved` is what a way does move, as a multiple
of the bytes that must: counted at the dispatcher for eager code (and for the ops' references, which
are what runs there), by Inductor for compiled code.

Backward passes run in the thread that asks for them: that the autograd engine wakes a thread of its
own, once in a training step for the model and all, is no part of what is measured here.
"""

import logging
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.compile_fx import inductor_metrics_log
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COPIED_BYTES = 1 << 31 if DEVICE == "cuda" else 1 << 26
COLUMNS = ("ms", "graph ms", "GB/s", "of copy", "of its copy", "kernels", "peak MiB", "moved")
FLUSHED_BYTES = 1 << 28  # more than any cache holds
REPLAYS = 30


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


def median_ms(function: Callable[[], object], rounds: int = 25) -> float:
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


def graph_ms(function: Callable[[], object]) -> float:
    """Median over replays of a CUDA graph of the call, by events over a flushed cache."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()
    flushed = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device=DEVICE)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for start, end in events:
        flushed.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del kept
    return statistics.median(start.elapsed_time(end) for start, end in events)


def launched_kernels(function: Callable[[], object]) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    on_device = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.name for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]


def peak_bytes(function: Callable[[], object]) -> int:
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_ms(moved: int) -> float:
    """A `copy_` that moves as many bytes, half of them read and half written."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    return graph_ms(lambda: target.copy_(source))


@pytest.fixture(autouse=True)
def backward_in_this_thread():
    with torch.autograd.set_multithreading_enabled(False):
        yield


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(scope="session")
def copy_speed():
    """Bytes read and written per millisecond by a plain copy."""
    source = torch.empty(COPIED_BYTES // 4, device=DEVICE).fill_(1.0)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / median_ms(lambda: target.copy_(source))


@pytest.fixture(scope="session")
def median_of():
    return median_ms


@pytest.fixture
def measure(benchmark, copy_speed):
    """measure(call, must_move, compiled=False, graph=False): times a call and keeps its figures.

    graph: the call can be captured in a CUDA graph.
    """

    def run(call, must_move: int, *, compiled: bool = False, graph: bool = False) -> None:
        figures = {"must move MiB": round(must_move / 2**20, 2)}
        if DEVICE == "cpu":
            moved = _inductor_bytes(call) if compiled else _eager_bytes(call)
            figures["moved"] = round(moved / must_move, 2)
        else:
            figures["peak MiB"] = round(peak_bytes(call) / 2**20, 2)
            names = launched_kernels(call)
            figures["kernels"] = len(names)
            if graph:  # ours: few
                figures["launched"] = [name[:60] for name in names]

        def finished():
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(finished, rounds=5, warmup_rounds=1)
        figures["ms"] = round(median_ms(call), 4)
        best = figures["ms"]
        if graph and DEVICE == "cuda":
            figures["graph ms"] = best = round(graph_ms(call), 4)
            figures["of its copy"] = round(copy_ms(must_move) / best, 3)
        speed = must_move / best
        figures |= {"GB/s": round(speed / 1e6, 1), "of copy": round(speed / copy_speed, 3)}
        benchmark.extra_info |= figures

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
