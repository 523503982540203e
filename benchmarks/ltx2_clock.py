"""The clock of benchmarks/ltx2_step.py, and where it stands about what is ours."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from syncdpo import ops
from syncdpo.negatives import PairDraw


class Clock:
    """Times stretches of a device's work by name: by events on a GPU, where nothing waits."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stretches: list[tuple] = []

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def stretch(self, name: str) -> Iterator[None]:
        start = self.mark()
        yield
        self.stretches.append((name, start, self.mark()))

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*arguments, **options):
            with self.stretch(name):
                return function(*arguments, **options)

        return timed

    def take(self) -> dict[str, float]:
        """Seconds of each name since the last time, added up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for name, start, end in self.stretches:
            on_gpu = self.device.type == "cuda"
            seconds = start.elapsed_time(end) / 1e3 if on_gpu else end - start
            totals[name] = totals.get(name, 0.0) + seconds
        self.stretches.clear()
        return totals


@contextlib.contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Every call of what is ours is timed, and the loss's backward, by hooks about its node."""
    dpo_loss = clock.around("loss", ops.dpo_loss)

    def loss_with_hooks(*arguments, **options):
        loss, stats = dpo_loss(*arguments, **options)
        if loss.grad_fn is not None:  # the reference's errors are made without a graph
            start = []
            loss.grad_fn.register_prehook(lambda _: start.append(clock.mark()))
            loss.grad_fn.register_hook(
                lambda *_: clock.stretches.append(("loss backward", start.pop(), clock.mark()))
            )
        return loss, stats

    with (
        mock.patch.object(ops, "dpo_loss", loss_with_hooks),
        mock.patch.object(ops, "paired_noise", clock.around("noise", ops.paired_noise)),
        mock.patch.object(ops, "noise", clock.around("noise", ops.noise)),
        mock.patch.object(PairDraw, "make", clock.around("negatives", PairDraw.make)),
    ):
        yield
