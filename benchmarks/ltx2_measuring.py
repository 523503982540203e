"""One measurement of benchmarks/ltx2_step.py: a step's times and memory, or its profile."""

from __future__ import annotations

import statistics

import torch
from ltx2_clock import Clock, watched
from ltx2_training import Bench, synchronise
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PARTS = ("draw", "negatives", "noise", "loss", "loss backward")
KERNELS = {  # by what a kernel's name, or on a CPU an operator's, holds
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "gemv", "addmm", "aten::mm", "bmm"),
}


def measure(bench: Bench, mode: str, timed: int) -> dict:
    """A warm-up and `timed` steps: medians of the times, the peak of the memory."""
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    clock, rows = Clock(bench.device), []
    with watched(clock):
        learner, dice, clip = bench.learner(mode, clock)
        bench.make_pairs(dice, clip, 1 + timed)
        before = clock.take() if mode == "cache_reference" else {}
        for step in range(1 + timed):
            with clock.stretch("step"):
                launched = bench.step(learner, dice, clip, step, clock)
            rows.append(clock.take() | {"launched": launched})
    rows = rows[1:]
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    parts = {name: median[name] for name in PARTS if name in median}
    result = {
        "seconds": median["step"],
        "all_seconds": [row["step"] for row in rows],
        "launched_seconds": median["launched"],
        "parts_seconds": parts,
        "ours_share": sum(parts.values()) / median["step"],
    }
    if before:
        result["cached_before_seconds"] = before["reference"]
    if on_gpu:
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        result["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return result


def profile_step(bench: Bench, mode: str) -> dict:
    """Where a step's time goes: seconds of kernels by kind, and the share in which none runs.

    On a CPU operators stand for kernels; they nest, so there kinds overlap.
    """
    kind = DeviceType.CUDA if bench.device.type == "cuda" else DeviceType.CPU
    activity = ProfilerActivity.CUDA if kind == DeviceType.CUDA else ProfilerActivity.CPU
    clock = Clock(bench.device)
    learner, dice, clip = bench.learner(mode, clock)
    with profile(activities=[activity], acc_events=True) as recorded:
        with clock.stretch("step"):
            bench.step(learner, dice, clip, 1, clock)
        synchronise(bench.device)
    seconds = clock.take()["step"]
    # The profiler's own tables take a minute for the 10⁵ kernels of a step.
    kernels = [
        (event.name(), event.start_ns(), event.duration_ns())
        for event in recorded.profiler.kineto_results.events()
        if event.device_type() == kind and not event.name().startswith("Optimizer.")
    ]
    if not kernels:
        raise RuntimeError("the profiler saw no kernel; CUPTI may be out of reach here")
    kinds = dict.fromkeys((*KERNELS, "the rest"), 0.0)
    for name, _, duration in kernels:
        kinds[kind_of(name)] += duration / 1e9
    idle = max(0.0, 1 - busy_seconds(kernels) / seconds)
    return {
        "seconds": seconds,
        "kernels": len(kernels),
        "by_kind_seconds": kinds,
        "idle_share": idle,
    }


def busy_seconds(kernels: list[tuple[str, int, int]]) -> float:
    """The time in which at least one of (name, start, duration), in nanoseconds, runs."""
    busy = until = 0
    for _, start, duration in sorted(kernels, key=lambda kernel: kernel[1]):
        busy += max(0, start + duration - max(start, until))
        until = max(until, start + duration)
    return busy / 1e9


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    kinds = (kind for kind, parts in KERNELS.items() if any(part in name for part in parts))
    return next(kinds, "the rest")


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a bf16 product of random 8192×8192 matrices (on a CPU 256×256)."""
    side, times = (8192, 20) if device.type == "cuda" else (256, 3)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    clock = Clock(device)
    for name in ("warm-up", "timed"):
        with clock.stretch(name):
            for _ in range(times):
                a @ b
    return 2 * side**3 * times / clock.take()["timed"]
