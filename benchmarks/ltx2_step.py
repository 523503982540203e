"""Time and memory of a training step of the full-size LTX-2 on one GPU, with random weights.

    python benchmarks/ltx2_step.py [--dry-run] [--seconds N] [--rules RULES] [--output FILE]
        [--base-precision fp8|int8|nf4] [--optimizer adamw8bit] [--offload blocks]

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

Here is what is measured, in which order, and what becomes of it; ltx2_formulas.py computes,
ltx2_training.py has the model and its step, ltx2_clock.py the times, ltx2_measuring.py one
measurement.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

try:
    BEGUN = time.perf_counter()

    import diffusers
    import torch
    from ltx2_formulas import (
        ASSUMED,
        FORWARDS,
        FPS,
        SPARE_GB,
        Size,
        step_flop,
        step_gigabytes,
        step_seconds,
        tokens,
    )
    from ltx2_measuring import matrix_rate, measure, profile_step
    from ltx2_training import CONFIG, Bench, build

    from syncdpo.models.quantised import PRECISIONS
    from syncdpo.training.config import TrainConfig
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
PEAK = 989e12  # bf16 operations per second of an H100's or H200's matrix units, by its data sheet
TIMED = 2
# Pictures and mode, the most telling first.
PLAN = (
    *((121, mode) for mode in ("syncdpo", "sft", "cache_reference", "split_pair")),
    *((pictures, mode) for pictures in (241, 481) for mode in ("syncdpo", "split_pair")),
)


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
        "computed_gb": bench.gigabytes(mode),
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


CHOICES = {
    "base_precision": PRECISIONS,
    "optimizer": ("adamw", "adamw8bit"),
    "offload": ("none", "blocks"),
}
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


def asked() -> tuple[argparse.Namespace, TrainConfig, torch.device, float]:
    """The options, what they mean (run, device, free GB of it); ends where they do not do."""
    parser = argparse.ArgumentParser(description="Time and memory of a training step of LTX-2.")
    parser.add_argument("--dry-run", action="store_true", help="all of it on the CPU, and tiny")
    parser.add_argument("--seconds", type=float, default=120, help="for everything; default 120")
    parser.add_argument("--rules", default=CONFIG.rules, help=f"default {CONFIG.rules}")
    for name, allowed in CHOICES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", choices=allowed, default=getattr(CONFIG, name)
        )
    parser.add_argument("--output", type=Path, help="a JSON file; default in benchmarks/results")
    arguments = parser.parse_args()
    chosen = {name: getattr(arguments, name) for name in ("rules", *CHOICES)}
    try:
        config = replace(CONFIG, **chosen)
    except ValueError as error:
        parser.error(str(error))
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run runs the same code on the CPU with a tiny model")
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    memory_gb = math.inf if dry else torch.cuda.mem_get_info()[0] / 1e9
    least = step_gigabytes(Size(), "sft", *tokens(121)) + SPARE_GB
    as_documented = all(getattr(config, name) == getattr(CONFIG, name) for name in CHOICES)
    if memory_gb < least and as_documented:
        parser.error(f"expected {least:.0f} GB of free GPU memory or more, got {memory_gb:.0f}")
    return arguments, config, device, memory_gb


def main() -> int:
    arguments, config, device, memory_gb = asked()
    dry = arguments.dry_run
    gpu, date = "cpu" if dry else torch.cuda.get_device_name(), datetime.date.today().isoformat()
    seconds = {"imports": time.perf_counter() - BEGUN}
    results = {"gpu": gpu, "date": date, **versions(), "dry_run": dry}
    results |= {name: getattr(config, name) for name in ("rules", *CHOICES)}
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

    bench, building = build(dry, device, config)
    results |= {"startup_seconds": seconds | building, "size": asdict(bench.size)}
    results |= {"measurements": [], "profiles": {}}
    failures = run(bench, Budget(BEGUN + arguments.seconds), memory_gb, results, save)
    results["seconds"] = time.perf_counter() - BEGUN
    save()
    print(f"{results['seconds']:.0f} s in all; written to {output or 'nowhere'}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
