"""Time and memory of a training step of the full-size LTX-2 on one GPU, with random weights.

    python benchmarks/ltx2_step.py [--dry-run] [--seconds N] [--rules RULES] [--output FILE]

diffusers' transformer at the size of 2.3, made on the GPU in bf16, and the project's own training
code: a LoRA of rank 32, gradient checkpointing, AdamW, one pair of clips of 768×512 at 24 fps per
step. A measurement is a warm-up and two timed steps of one method at one length; beside it stands
what docs/ltx2.md computes. What does not fit into `--seconds` is skipped and says so, and so does
what runs out of memory.

*Ours* is the part of a step that this project adds to a trainer: drawing and making the pairs, the
noise, the loss and its backward. Each is timed by events on the stream around the call, taken from
outside; for the loss's backward the events stand in hooks before and after the loss's own node of
the autograd graph. Where the GPU has caught up with the processor, these times hold the wait for
launches too, as the step's does. How much of a step that is, a profile of one step says: the share
of it in which no kernel runs.

Results go to benchmarks/results/ltx2-step-<gpu>-<date>.json after each measurement; the exit code
is the number of failed ones. Running out of memory is a failure where docs/ltx2.md says it fits.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

try:
    BEGUN = time.perf_counter()

    import diffusers
    import torch
    from accelerate import Accelerator
    from diffusers import LTX2VideoTransformer3DModel
    from torch import Tensor, nn
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from syncdpo import ops
    from syncdpo.models.ltx2 import LTX2
    from syncdpo.negatives import PairDraw
    from syncdpo.negatives.curriculum import curriculum
    from syncdpo.train import Learner, mean_over_processes, policy_and_reference
    from syncdpo.training.config import TrainConfig
    from syncdpo.training.dice import Dice, Order

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from tiny_ltx2 import VERSIONS
except ImportError as error:
    NEEDED = (
        "syncdpo", "torch", "accelerate", "av", "diffusers", "peft", "safetensors", "tensorboard",
        "torchaudio", "tqdm", "transformers", "yaml",
    )  # fmt: skip
    missing = [name for name in NEEDED if not find_spec(name)]
    sys.exit(
        f"ltx2_step: {', '.join(missing)} not installed; where there is no network, bring wheels: "
        "`pip download --no-deps` where there is one, `pip install --no-index --no-deps` here."
        if missing
        else f"ltx2_step: {error}"
    )

ROOT = Path(__file__).parents[1]
FPS, HEIGHT, WIDTH, TEXT_TOKENS = 24, 512, 768, 1024
PEAK = 989e12  # bf16 operations per second of an H100's or H200's matrix units, by its data sheet
ASSUMED = 400e12  # what docs/ltx2.md computes with: 40 % of that, rounded
SPARE_GB = 3  # which docs/ltx2.md leaves for CUDA and fragmentation
TIMED = 2
CONFIG = TrainConfig(
    batch_size=1,
    lora_rank=32,
    learning_rate=1e-4,
    normalize=True,
    beta_audio=5.0,
    gradient_checkpointing=True,
    mixed_precision="bf16",
)
MODES = {
    "sft": {"method": "sft"},
    "syncdpo": {},
    "cache_reference": {"cache_reference": 1},
    "split_pair": {"split_pair": True},
}
# Pictures and mode, the most telling first.
PLAN = (
    *((121, mode) for mode in ("syncdpo", "sft", "cache_reference", "split_pair")),
    *((pictures, mode) for pictures in (241, 481) for mode in ("syncdpo", "split_pair")),
)
PARTS = ("draw", "negatives", "noise", "loss", "loss backward")
KERNELS = {  # by what a kernel's name, or on a CPU an operator's, holds
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "gemv", "addmm", "aten::mm", "bmm"),
}

# ---------------------------------------------------------------- what docs/ltx2.md computes


@dataclass(frozen=True)
class Size:
    """Of a transformer: `cross` is the width in which the streams attend to each other."""

    layers: int = 48
    video: int = 4096
    audio: int = 2048
    cross: int = 2048
    text: int = TEXT_TOKENS
    weights: float = 18.9e9
    adapter: float = 214e6


FORWARDS = {"sft": 3, "syncdpo": 8, "cache_reference": 6, "split_pair": 10}
SAMPLES = {"sft": 1, "syncdpo": 2, "cache_reference": 2, "split_pair": 1}  # held at once


def tokens(pictures: int, height: int = HEIGHT, width: int = WIDTH) -> tuple[int, int]:
    """(S, L): tokens of the picture, 8×32×32 pixels each, and of the sound, 25 a second."""
    return ((pictures - 1) // 8 + 1) * (height // 32) * (width // 32), round(pictures / FPS * 25)


def forward_flop(size: Size, video_tokens: int, audio_tokens: int) -> float:
    """F = 2 N [14 D² S + 2 D² T + 14 A² L + 2 A² T + 4 D A′ S + 4 A A′ L
    + 2 D S (S + T) + 2 A L (L + T) + 4 A′ S L], floating-point operations."""
    d, a, c = size.video, size.audio, size.cross
    s, sound, t = video_tokens, audio_tokens, size.text
    linear = 14 * d * d * s + 2 * d * d * t + 14 * a * a * sound + 2 * a * a * t
    linear += 4 * d * c * s + 4 * a * c * sound
    attention = 2 * d * s * (s + t) + 2 * a * sound * (sound + t) + 4 * c * s * sound
    return 2 * size.layers * (linear + attention)


def step_flop(size: Size, mode: str, video_tokens: int, audio_tokens: int) -> float:
    return FORWARDS[mode] * forward_flop(size, video_tokens, audio_tokens)


def step_seconds(size: Size, mode: str, *streams: int, rate: float = ASSUMED) -> float:
    return step_flop(size, mode, *streams) / rate


def step_gigabytes(size: Size, mode: str, video_tokens: int, audio_tokens: int) -> float:
    """Weights, LoRA with gradients and AdamW; of each sample held the checkpoints and one block."""
    video, audio = size.video * video_tokens, size.audio * audio_tokens
    checkpoints = 2 * size.layers * (video + audio)
    block = 110 * video + 0.13e9
    held = SAMPLES[mode] * (checkpoints + block)
    return (2 * size.weights + 16 * size.adapter + held) / 1e9


# ---------------------------------------------------------------- the model


class RandomLTX2(LTX2):
    """LTX-2 without a checkpoint: its transformer with random weights, made on `device`."""

    def __init__(self, settings: dict, device: torch.device, *, height: int, width: int):
        self.dtype, self.sigma = torch.bfloat16, "shared"
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            # torch's own initialisation keeps every layer's output near or below its input's
            # size; the rotary positions name their precision themselves.
            with device:
                transformer = LTX2VideoTransformer3DModel(**settings)
        finally:
            torch.set_default_dtype(before)
        self.parts = {"transformer": transformer}
        self.config = dict(transformer.config)
        self._audio_config = {"sample_rate": self.config["audio_sampling_rate"], "in_channels": 2}
        self._schedule = {}  # the pipeline's own defaults
        self.height, self.width = height, width
        self.set_length(121)

    def set_length(self, pictures: int) -> None:
        self.set_format(pictures, self.height, self.width, FPS)

    def streams(self) -> tuple[int, int]:
        video, audio = (line.frames * line.tokens for line in self.timelines)
        return video, audio

    def clip(self, text_tokens: int) -> dict[str, Tensor]:
        """Random latents and text of one clip as a cache gives them: on the host, in bf16."""
        video, audio = self.streams()
        shapes = {
            "video": (video, self.config["in_channels"]),
            "audio": (audio, self.config["audio_in_channels"]),
            "video_text": (text_tokens, self.config["cross_attention_dim"]),
            "audio_text": (text_tokens, self.config["audio_cross_attention_dim"]),
        }
        source = torch.Generator().manual_seed(video)
        return {
            name: torch.randn(shape, generator=source).to(self.dtype)
            for name, shape in shapes.items()
        }


def settings(dry: bool) -> dict:
    """Of the transformer: 2.3's, all sizes the class's own; or few and narrow layers."""
    tiny = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "in_channels": 8,
        "out_channels": 8,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
    }
    return VERSIONS["2.3"]["transformer"] | (tiny if dry else {})


# ---------------------------------------------------------------- the clock


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


# ---------------------------------------------------------------- a step


@dataclass
class Bench:
    """What all measurements share: the model, its adapter and the optimizer."""

    model: RandomLTX2
    accelerator: Accelerator
    policy: nn.Module
    optimizer: torch.optim.Optimizer
    size: Size  # of the model at hand, or docs/ltx2.md's
    rules: str

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def learner(self, mode: str, clock: Clock) -> tuple[Learner, Dice, dict[str, Tensor]]:
        """As `train` makes them, for a run of one clip; with its reference's errors if asked."""
        config = replace(CONFIG, rules=self.rules, **MODES[mode])
        order = Order(config, 1, self.accelerator)
        dice = Dice(config, self.model, curriculum(config.curriculum), order, self.device)
        learner = Learner(config, self.accelerator, self.model, self.policy, None, False)
        clip = self.model.clip(self.size.text)
        if config.cache_reference:
            with clock.stretch("reference"):
                learner.cache_reference([clip], dice)
        return learner, dice, {name: x[None] for name, x in clip.items()}

    def make_pairs(self, dice: Dice, clip: dict[str, Tensor], steps: int) -> None:
        """Those of the first steps: Triton compiles when it meets a kind of pair, amid any step."""
        latents = [clip[name].to(self.device) for name in ("video", "audio")]
        for step in range(steps):
            if pairs := dice.roll(step, 0).pairs:
                pairs.make(*latents)

    def step(self, learner: Learner, dice: Dice, clip: dict, step: int, clock: Clock) -> float:
        """One step of `train`'s loop; seconds until the last of its backward was launched."""
        since = time.perf_counter()
        batch = {name: x.to(self.device) for name, x in clip.items()}
        with clock.stretch("draw"):
            roll = dice.roll(step, 0)
        metrics = learner.backward(batch, roll)
        launched = time.perf_counter() - since
        metrics = mean_over_processes(self.accelerator, [metrics])
        norm = self.accelerator.clip_grad_norm_(
            self.policy.parameters(), CONFIG.max_grad_norm
        ).item()
        if not math.isfinite(metrics["loss"] + norm):
            raise RuntimeError(f"step {step}: loss {metrics['loss']}, gradient's norm {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return launched


def build(dry: bool, device: torch.device, rules: str) -> tuple[Bench, dict[str, float]]:
    """The bench, and the seconds of each stage of making it."""
    seconds, since = {}, time.perf_counter()
    # A dry run stays on the CPU also where there is a GPU.
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=CONFIG.mixed_precision)
    height, width = (64, 64) if dry else (HEIGHT, WIDTH)
    model = RandomLTX2(settings(dry), device, height=height, width=width)
    synchronise(device)
    seconds["weights"], since = time.perf_counter() - since, time.perf_counter()
    weights = sum(p.numel() for p in model.transformer.parameters())
    with device:
        policy, _ = policy_and_reference(CONFIG, model)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, CONFIG.learning_rate, betas=(0.9, 0.99), weight_decay=CONFIG.weight_decay
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    synchronise(device)
    seconds["adapter"] = time.perf_counter() - since
    size = Size()
    if dry:
        widths = {"layers": 2, "video": 32, "audio": 16, "cross": 16, "text": 32}
        size = Size(**widths, weights=weights, adapter=sum(p.numel() for p in trained))
    stages = ", ".join(f"{name} {stage:.1f}" for name, stage in seconds.items())
    count = sum(p.numel() for p in trained)
    print(f"{weights:,} weights, {count:,} of the LoRA; made in seconds: {stages}", flush=True)
    return Bench(model, accelerator, policy, optimizer, size, rules), seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------- measurements


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


# ---------------------------------------------------------------- the run


@dataclass
class Budget:
    """The seconds left, and those that steps will take by what was measured so far."""

    end: float
    rate: float = ASSUMED

    def left(self) -> float:
        return self.end - time.perf_counter()

    def steps(self, bench: Bench, mode: str) -> int:
        """How many timed steps fit beside a warm-up, `TIMED` at most; 0 where none does."""
        before = 2 / FORWARDS[mode] if mode == "cache_reference" else 0
        each = step_seconds(bench.size, mode, *bench.model.streams(), rate=self.rate)
        return max(0, min(TIMED, math.floor(self.left() / each - before) - 1))

    def learn(self, bench: Bench, mode: str, seconds: float) -> None:
        self.rate = step_flop(bench.size, mode, *bench.model.streams()) / seconds


def attempt(bench: Bench, mode: str, pictures: int, budget: Budget, memory_gb: float) -> dict:
    """One row: what is computed, and what was measured or why not."""
    bench.model.set_length(pictures)
    streams = bench.model.streams()
    row = {
        "pictures": pictures,
        "clip_seconds": pictures / FPS,
        "mode": mode,
        "tokens": streams,
        "computed_seconds": step_seconds(bench.size, mode, *streams),
        "computed_gb": step_gigabytes(bench.size, mode, *streams),
    }
    timed = budget.steps(bench, mode)
    if not timed:
        expected = step_seconds(bench.size, mode, *streams, rate=budget.rate)
        return row | {
            "outcome": "skipped",
            "why": f"two steps of about {expected:.1f} s do not fit into the {budget.left():.0f} s "
            "left; --seconds gives more",
        }
    try:
        measured = measure(bench, mode, timed)
    except torch.OutOfMemoryError:
        # Within as much again of what is computed it may go either way.
        fits = row["computed_gb"] + 2 * SPARE_GB <= memory_gb
        why = f"{row['computed_gb']:.0f} GB and {SPARE_GB} to spare computed, {memory_gb:.0f} here"
        return row | {"outcome": "failed" if fits else "out of memory", "why": why}
    except (RuntimeError, ValueError) as error:
        return row | {"outcome": "failed", "why": f"{type(error).__name__}: {error}"}
    budget.learn(bench, mode, measured["seconds"])
    return row | {"outcome": "measured", "timed_steps": timed} | measured


def compare(row: dict, size: Size, matrix: float) -> dict:
    """Measured over computed, and the rate that was reached."""
    if row["outcome"] != "measured":
        return row
    rate = step_flop(size, row["mode"], *row["tokens"]) / row["seconds"]
    compared = {
        "seconds_ratio": row["seconds"] / row["computed_seconds"],
        "tflops": rate / 1e12,
        "share_of_peak": rate / PEAK,
        "share_of_matrix_rate": rate / matrix,
    }
    if "peak_gb" in row:
        compared["gb_ratio"] = row["peak_gb"] / row["computed_gb"]
    return row | compared


def clean_up(bench: Bench) -> None:
    """After each measurement, also one that ran out of memory amid a step."""
    bench.optimizer.zero_grad()
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def run(bench: Bench, budget: Budget, memory_gb: float, results: dict, save: Callable) -> int:
    """All of the plan, in order; the number of failures."""
    print(HEADINGS, flush=True)
    clean_up(bench)
    for pictures, mode in PLAN:
        row = attempt(bench, mode, pictures, budget, memory_gb)
        results["measurements"].append(compare(row, bench.size, results["matrix_tflops"] * 1e12))
        print(as_line(results["measurements"][-1]), flush=True)
        save()
        try:
            clean_up(bench)
        except RuntimeError as error:
            print(f"The GPU answers no more, so the rest is left out: {error}")
            break
        if (pictures, mode) == (121, "split_pair"):  # the four that must come first are done
            for profiled in ("syncdpo", "sft"):
                results["profiles"][profiled] = attempt_profile(bench, profiled, budget)
                print(f"{profiled}, profiled: {results['profiles'][profiled]}", flush=True)
                save()
                clean_up(bench)
    rows = (*results["measurements"], *results["profiles"].values())
    return sum(row["outcome"] == "failed" for row in rows)


def attempt_profile(bench: Bench, mode: str, budget: Budget) -> dict:
    if not budget.steps(bench, mode):
        return {"outcome": "skipped", "why": f"only {budget.left():.0f} s left; give --seconds"}
    try:
        return {"outcome": "measured"} | profile_step(bench, mode)
    except (RuntimeError, ValueError) as error:
        return {"outcome": "failed", "why": f"{type(error).__name__}: {error}"}


HEADINGS = """
| clip | step | s | computed | ratio | GB | computed | ratio | reserved | TFLOP/s | of 989 | \
of matmul | ours |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def as_line(row: dict) -> str:
    cells = [f"{row['clip_seconds']:.1f} s", row["mode"]]
    if row["outcome"] != "measured":
        return f"| {' | '.join(cells)} | {row['outcome']}: {row['why']} |"
    cells += [f"{row[name]:.2f}" for name in ("seconds", "computed_seconds", "seconds_ratio")]
    memory = ("peak_gb", "computed_gb", "gb_ratio", "reserved_gb")
    cells += [f"{row[name]:.2f}" if name in row else "–" for name in memory]
    shares = ("share_of_peak", "share_of_matrix_rate", "ours_share")
    cells += [f"{row['tflops']:.0f}", *(f"{row[name]:.1%}" for name in shares)]
    return f"| {' | '.join(cells)} |"


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "diffusers": diffusers.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time and memory of a training step of LTX-2.")
    parser.add_argument("--dry-run", action="store_true", help="all of it on the CPU, and tiny")
    parser.add_argument("--seconds", type=float, default=120, help="for everything; default 120")
    parser.add_argument("--rules", default=CONFIG.rules, help=f"default {CONFIG.rules}")
    parser.add_argument("--output", type=Path, help="a JSON file; default in benchmarks/results")
    arguments = parser.parse_args()
    try:
        replace(CONFIG, rules=arguments.rules)
    except ValueError as error:
        parser.error(str(error))
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run runs the same code on the CPU with a tiny model")
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    memory_gb = math.inf if dry else torch.cuda.mem_get_info()[0] / 1e9
    least = step_gigabytes(Size(), "sft", *tokens(121)) + SPARE_GB
    if memory_gb < least:
        parser.error(f"expected {least:.0f} GB of free GPU memory or more, got {memory_gb:.0f}")

    gpu, date = "cpu" if dry else torch.cuda.get_device_name(), datetime.date.today().isoformat()
    seconds = {"imports": time.perf_counter() - BEGUN}
    results = {"gpu": gpu, "date": date, **versions(), "dry_run": dry, "rules": arguments.rules}
    if not dry:
        results["free_memory_gb"] = memory_gb
    print(gpu, versions(), f"imports {seconds['imports']:.1f} s", flush=True)
    results["matrix_tflops"] = matrix_rate(device) / 1e12
    print(f"bf16 matrix products: {results['matrix_tflops']:.3g} TFLOP/s", flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    output = arguments.output
    if not output and not dry:
        output = ROOT / "benchmarks" / "results" / f"ltx2-step-{name}-{date}.json"

    def save() -> None:
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")

    bench, building = build(dry, device, arguments.rules)
    results |= {"startup_seconds": seconds | building, "size": asdict(bench.size)}
    results |= {"measurements": [], "profiles": {}}
    failures = run(bench, Budget(BEGUN + arguments.seconds), memory_gb, results, save)
    results["seconds"] = time.perf_counter() - BEGUN
    save()
    print(f"{results['seconds']:.0f} s in all; written to {output or 'nowhere'}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
