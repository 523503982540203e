"""The sweep's checking and timing of one problem's variants, where any of them may fail."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from sweep_problems import Problem
from sweep_variants import Variant, first_line
from torch import Tensor
from torch.utils._pytree import tree_map_only

FLUSHED_BYTES = 1 << 28  # more than any cache of the second level
REPLAYED_BYTES = 1 << 29
MOST_CALLS = 8  # per graph
FIRST_IGNORED = 3

# ---------------------------------------------------------------- checking


class DeviceLost(RuntimeError):
    """After it no call to the device succeeds in this process."""


def attempt(action: Callable[[], str | None]) -> str | None:
    """What went wrong in an action on the device; raises where the device itself is lost."""
    try:
        return action()
    except DeviceLost:
        raise
    except Exception as error:  # a variant may fail in any way, and must not stop the others
        said = first_line(error)
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(said) from error
    return said


def copied(inputs: dict) -> dict:
    return tree_map_only(Tensor, torch.clone, inputs)


def check(problem: Problem, variant: Variant, expected: list[Tensor]) -> str | None:
    """What is wrong with a variant's results, None where nothing is.

    Fresh memory holds NaN, so that what it does not write cannot be what another variant did.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        results = problem.call(variant, copied(problem.inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    return fault(problem, results, expected)


def fault(problem: Problem, results: list[Tensor], expected: list[Tensor]) -> str | None:
    each = zip(results, expected, problem.absolute, strict=True)
    for i, (ours, theirs, absolute) in enumerate(each):
        if ours.shape != theirs.shape:
            return f"wrong: result {i} has shape {list(ours.shape)}, not {list(theirs.shape)}"
        if torch.equal(ours, theirs):
            continue
        if problem.relative == absolute == 0.0:
            return f"wrong: result {i} has other bits"
        error = (ours.double() - theirs.double()).abs()
        right = error <= absolute + problem.relative * theirs.double().abs()
        if not right.all():
            worst = error.masked_fill(right, 0.0).max().item()
            return f"wrong: result {i}, {int((~right).sum())} elements, by up to {worst:.3g}"
    return None


# ---------------------------------------------------------------- timing


class Timer:
    """Times a problem's variants, each as a graph of calls with tensors of their own; on a CPU, as
    the tests do, by the clock."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem, self.device = problem, device
        calls = min(max(REPLAYED_BYTES // problem.moved, 1), MOST_CALLS)
        self.sets = [copied(problem.inputs) for _ in range(calls)]
        flushed = FLUSHED_BYTES if device == "cuda" else 1
        self.flushed = torch.empty(flushed, dtype=torch.uint8, device=device)
        self.graphs = device == "cuda"

    def without_graphs(self, reason: str) -> None:
        print(f"timed without CUDA graphs, Python's time included, since: {reason}", flush=True)
        self.graphs = False

    def hold(self, variant: Variant) -> None:
        """Keep it as the present setting, which others are compared with."""
        self.present = self.run(variant)

    def alone(self, rounds: int) -> float:
        """The present setting's milliseconds per call."""
        return self.medians([self.present], rounds)[0]

    def beside(self, variant: Variant, rounds: int) -> list[float]:
        """Milliseconds per call of the present setting and of a variant, in turns."""
        return self.medians([self.present, self.run(variant)], rounds)

    def run(self, variant: Variant) -> Callable[[], object]:
        def calls() -> list:
            return [self.problem.call(variant, own) for own in self.sets]

        if not self.graphs:
            return calls
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        return graph.replay

    def medians(self, runs: list[Callable[[], object]], rounds: int) -> list[float]:
        """Milliseconds per call. The runs take turns; each finds nothing of its own in a cache."""
        times: list[list] = [[] for _ in runs]
        for _ in range(FIRST_IGNORED + rounds):
            for run, own in zip(runs, times, strict=True):
                own.append(self.once(run))
        if self.device == "cuda":
            torch.cuda.synchronize()
            times = [[start.elapsed_time(end) for start, end in own] for own in times]
        return [statistics.median(own[FIRST_IGNORED:]) / len(self.sets) for own in times]

    def once(self, run: Callable[[], object]) -> float | tuple:
        """Milliseconds; on CUDA the two events that tell them when all is done."""
        self.flushed.zero_()
        if self.device != "cuda":
            begin = time.perf_counter()
            run()
            return (time.perf_counter() - begin) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return start, end
