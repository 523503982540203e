"""Find on a GPU the best values of the constants in the kernels, to set them by measurement.

    python benchmarks/sweep.py [--kernels NAME,…] [--seconds N] [--few] [--output FILE]
    python benchmarks/sweep.py --dry-run     # no GPU: make and compile all variants, read registers

A variant is a copy of kernels/ or csrc/ in a temporary folder with other numbers in it, so that no
kernel has a knob. Per kernel and shape, one constant at a time is changed from its present value,
then the changes that helped are joined. A variant's results are held against the op's plain
reference before it is timed; one that is wrong or does not compile is reported and never timed.

Times are medians of CUDA graphs, replayed over a flushed cache, so that nothing of Python's is in
them; a graph of a small shape holds several calls, each with tensors of its own. Present and
candidate take turns, so that drift falls on both, and the best is measured anew at the end: its
ratio is of that second measurement. The exit code is the number of kernels that are wrong as they
are.

Here is what is tried and in which order; sweep_variants.py makes and compiles the variants,
sweep_problems.py has the inputs and references, sweep_timing.py checks and times, sweep_tables.py
prints.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as Late
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from sweep_problems import Problem, loss_backward, loss_forward, noise, noised_pairs, replaced, warp
from sweep_tables import print_all
from sweep_timing import DeviceLost, Timer, attempt, check
from sweep_variants import NATIVE, Changes, Workshop, changes, label, nvcc, present
from torch import Tensor

ROUNDS, LAST_ROUNDS = 25, 80
HELPS = 0.99  # a change whose ratio of times is below is worth joining with others

# ---------------------------------------------------------------- kernels and what is tried


class Kernel(NamedTuple):
    problem: Callable[[str, str], Problem]  # of shape and device
    shapes: tuple[str, ...]
    axes: dict[str, list[dict[str, int]]]  # values to try, one axis at a time


def axis(name: str, *values: int) -> list[dict[str, int]]:
    return [{name: value} for value in values]


VEC = {"vec": axis("vec", 4, 8, 16)}
NOISE_VEC = {"vec": axis("vec", 4, 8)}  # normals are made by fours or eights
STREAMED = {"chunk": axis("CHUNK", 512, 1024, 2048, 4096), "warps": axis("NUM_WARPS", 2, 4, 8)}
SUMMED = {
    "chunk": axis("SUM_CHUNK", 2048, 4096, 8192),
    "warps": axis("SUM_WARPS", 4, 8, 16),
    "tile": axis("PARTIALS_PER_TILE", 256, 512, 1024),
}
WARP_AXES = {
    "program": axis("program_bytes", 2048, 4096, 8192, 16384),
    "row": axis("row_bytes", 128, 256, 512, 1024),
    "warps": axis("NUM_WARPS", 2, 4, 8),
}


def blocks(threads: int, out_of_place: int, in_place: int, chunks: int) -> dict[str, int]:
    """Threads and blocks together say how many registers a thread may have, and chunks need them:
    four of them each."""
    return {
        "kThreads": threads, "kBlocksPerSm": out_of_place, "kInPlaceBlocksPerSm": in_place,
        "kChunksPerThread": chunks,
    }  # fmt: skip


NATIVE_AXES = {
    "threads": [blocks(128, 6, 4, 8), blocks(256, 3, 2, 8), blocks(512, 1, 1, 8)],
    "blocks": [blocks(256, 2, 1, 8), blocks(256, 4, 3, 8)],
    "chunks": [blocks(256, 4, 3, 4), blocks(256, 3, 2, 4), blocks(256, 2, 1, 16)],
}

BOTH = ("large", "small")
KERNELS = {
    "dpo_loss_forward": Kernel(partial(loss_forward, velocity=False), BOTH, SUMMED | VEC),
    "dpo_loss_forward_velocity": Kernel(
        partial(loss_forward, velocity=True), BOTH, SUMMED | NOISE_VEC
    ),
    "dpo_loss_backward": Kernel(partial(loss_backward, velocity=False), BOTH, STREAMED | VEC),
    "dpo_loss_backward_velocity": Kernel(
        partial(loss_backward, velocity=True), BOTH, STREAMED | NOISE_VEC
    ),
    "paired_noise": Kernel(noised_pairs, BOTH, STREAMED | NOISE_VEC),
    "noise": Kernel(noise, BOTH, STREAMED),
    "warp": Kernel(warp, ("large video", "large audio", "small video", "small audio"), WARP_AXES),
    "replace_segments": Kernel(partial(replaced, in_place=False), BOTH, NATIVE_AXES),
    "replace_segments_in_place": Kernel(partial(replaced, in_place=True), BOTH, NATIVE_AXES),
}


def names_of(kernel: Kernel) -> list[str]:
    """The constants that are tried, each once."""
    names = (name for options in kernel.axes.values() for option in options for name in option)
    return list(dict.fromkeys(names))


def legal(kernel: Kernel, setting: Changes) -> bool:
    """Whether the kernel's code allows these numbers."""
    values = present(*names_of(kernel)) | dict(setting)
    if "kThreads" in values:
        most = max(values["kBlocksPerSm"], values["kInPlaceBlocksPerSm"])
        return values["kThreads"] * most <= 2048
    if "row_bytes" in values:
        return values["row_bytes"] <= values["program_bytes"]
    summed = "SUM_CHUNK" in values
    chunk, warps = ("SUM_CHUNK", "SUM_WARPS") if summed else ("CHUNK", "NUM_WARPS")
    return values[chunk] % (32 * values[warps] * values.get("vec", 4)) == 0


def single_changes(kernel: Kernel, few: bool) -> dict[Changes, str]:
    """Settings that differ from the present one along one axis, and that axis."""
    settings = {}
    for name, options in kernel.axes.items():
        own = [setting for setting in map(changes, options) if setting and legal(kernel, setting)]
        settings |= {setting: name for setting in (own[:1] if few else own)}
    return settings


def joined(
    kernel: Kernel, singles: dict[Changes, str], ratios: dict[Changes, float]
) -> list[Changes]:
    """The best of each axis that helps: all of them together, and the two that help most."""
    best = {}
    for setting in sorted(ratios, key=ratios.get):
        if setting in singles and ratios[setting] < HELPS:
            best.setdefault(singles[setting], setting)
    helpful, unions = list(best.values()), []
    for chosen in (helpful, helpful[:2]):
        merged = {name: value for setting in reversed(chosen) for name, value in setting}
        setting = tuple(sorted(merged.items()))
        new = setting not in ratios and setting not in unions
        if len(chosen) > 1 and new and legal(kernel, setting):
            unions.append(setting)
    return unions


# ---------------------------------------------------------------- one kernel on one shape


class Sweep:
    """The rows of the table, and what did not fit into the time."""

    def __init__(self, workshop: Workshop, end: float, few: bool, device: str = "cuda") -> None:
        self.workshop, self.end, self.few, self.device = workshop, end, few, device
        self.rows: list[dict] = []
        self.left_out: list[str] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    def shapes(self, name: str) -> tuple[str, ...]:
        shapes = KERNELS[name].shapes
        return shapes[-1:] if self.few else shapes

    def request(self, name: str) -> None:
        for shape in self.shapes(name):
            for setting in ((), *single_changes(KERNELS[name], self.few)):
                self.workshop.request(name, shape, setting)

    def kernel(self, name: str) -> None:
        shapes = self.shapes(name)
        for i, shape in enumerate(shapes):
            if self.left() <= 0:
                self.left_out.append(f"{name}, {shape}")
                continue
            row = {
                "kernel": name, "shape": shape, "present": present(*names_of(KERNELS[name])),
                "moved": None, "ms": None, "best": None, "best_ms": None, "ratio": None,
                "graphs": None, "wrong": None, "candidates": [],
            }  # fmt: skip
            self.rows.append(row)
            if self.workshop.dry_run:
                self.compile_all(row)
                continue
            try:
                failure = attempt(partial(self.measure, row))
            except DeviceLost:
                self.left_out += [f"{name}, {later}" for later in shapes[i + 1 :]]
                raise
            if failure:
                self.left_out.append(f"{name}, {shape}, from there on: {failure}")

    def compile_all(self, row: dict) -> None:
        entry = self.compiled(row, ())
        if entry is not None:
            row |= {key: entry[key] for key in ("registers", "spill_bytes", "code")}
            row["wrong"] = entry["failure"]
        for setting in single_changes(KERNELS[row["kernel"]], self.few):
            self.compiled(row, setting)

    def compiled(self, row: dict, setting: Changes) -> dict | None:
        """The setting's entry, a candidate's in the row too; None where the time is up."""
        name, shape = row["kernel"], row["shape"]
        try:
            compiled = self.workshop.compiled(name, shape, setting, self.left())
        except Late:
            self.left_out.append(f"{name}, {shape}: {label(setting)}")
            return None
        entry = {"setting": dict(setting), **compiled._asdict()}
        if setting:
            row["candidates"].append(entry)
        return entry

    def measure(self, row: dict) -> None:
        """One axis at a time, then what helped joined, then the best of all once more."""
        entry = self.compiled(row, ())
        if entry is None:
            return
        kernel, before = KERNELS[row["kernel"]], self.workshop.variant(())
        problem = kernel.problem(row["shape"], self.device)
        row["moved"], expected = problem.moved, problem.expected()
        row["wrong"] = entry["failure"] or self.attempt(
            row, (), lambda: check(problem, before, expected)
        )
        if row["wrong"]:
            return
        timer = Timer(problem, self.device)
        if failure := self.attempt(row, (), lambda: timer.hold(before)):
            timer.without_graphs(failure)
            timer.hold(before)
        row["graphs"] = timer.graphs
        row["ms"] = timer.alone(ROUNDS)
        singles = single_changes(kernel, self.few)
        for setting in singles:
            self.compare(row, setting, timer, expected)
        for setting in joined(kernel, singles, ratios_of(row)):
            self.compare(row, setting, timer, expected)
        if ratios := ratios_of(row):
            best = min(ratios, key=ratios.get)
            row["ms"], row["best_ms"] = timer.beside(self.workshop.variant(best), LAST_ROUNDS)
            row["best"], row["ratio"] = dict(best), row["best_ms"] / row["ms"]
            if row["ratio"] >= 1.0:
                row |= {"best": {}, "best_ms": row["ms"], "ratio": 1.0}

    def compare(self, row: dict, setting: Changes, timer: Timer, expected: list[Tensor]) -> None:
        """Check a candidate, then time it in turn with the present setting."""
        if self.left() <= 0:
            self.left_out.append(f"{row['kernel']}, {row['shape']}: {label(setting)}")
            return
        entry = self.compiled(row, setting)
        if entry is None or entry["failure"]:
            return
        variant = self.workshop.variant(setting)

        def checked_and_timed() -> str | None:
            wrong = check(timer.problem, variant, expected)
            if wrong is None:
                entry["present_ms"], entry["ms"] = timer.beside(variant, ROUNDS)
                entry["ratio"] = entry["ms"] / entry["present_ms"]
            return wrong

        entry["failure"] = self.attempt(row, setting, checked_and_timed)

    def attempt(self, row: dict, setting: Changes, action: Callable) -> str | None:
        """As the function does, but a lost device is laid to the setting."""
        try:
            return attempt(action)
        except DeviceLost as error:
            message = f"the device was lost at {label(setting)}: {error}"
            if setting:
                row["candidates"][-1]["failure"] = message
            else:
                row["wrong"] = message
            raise


def ratios_of(row: dict) -> dict[Changes, float]:
    timed = [entry for entry in row["candidates"] if "ratio" in entry]
    return {tuple(entry["setting"].items()): entry["ratio"] for entry in timed}


# ---------------------------------------------------------------- the command


def run_all(names: list[str], sweep: Sweep, results: dict, output: Path | None) -> list[str]:
    """Sweep the kernels in turn; those that remain where the device is lost."""
    for name in names:
        sweep.request(name)
    for i, name in enumerate(names):
        start, lost = time.monotonic(), ""
        try:
            sweep.kernel(name)
        except DeviceLost as error:
            lost = f"; the device was lost: {error}"
        write(results, output)
        print(f"{name}: {time.monotonic() - start:.1f} s{lost}", flush=True)
        if lost:
            return names[i + 1 :]
    return []


def write(results: dict, output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")


def run_rest(names: list[str], sweep: Sweep, results: dict, output: Path | None) -> None:
    """In a new process, as this one has lost its device for good; it prints its own table."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "rest.json"
        command = [sys.executable, __file__, "--kernels", ",".join(names), "--output", other]
        command += ["--seconds", str(max(sweep.left(), 1.0)), *(["--few"] if sweep.few else [])]
        subprocess.run(command, check=False)
        rest = json.loads(other.read_text()) if other.exists() else {"rows": [], "left_out": names}
    results["rows"] += rest["rows"]
    results["left_out"] += rest["left_out"]
    write(results, output)


def target(dry_run: bool) -> tuple[str, int]:
    """The device's name and architecture; H100's on a dry run."""
    if dry_run:
        return "none", 90
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), 10 * major + minor


def selected(text: str, parser: argparse.ArgumentParser) -> list[str]:
    names = list(KERNELS) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in KERNELS]:
        parser.error(f"--kernels: expected some of {', '.join(KERNELS)}, got {', '.join(unknown)}")
    if nvcc() is None and any(name in NATIVE for name in names):
        print(f"no nvcc was found: {', '.join(NATIVE)} are not swept; put nvcc on the PATH")
        names = [name for name in names if name not in NATIVE]
    return names


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Find the best values of the kernels' constants on this GPU.",
        epilog=f"kernels: {', '.join(KERNELS)}. The exit code is the number of kernels whose "
        "present setting is wrong.",
    )
    parser.add_argument("--kernels", default="all", help="names, with commas; default: all")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="default: 90; what does not fit is named"
    )
    parser.add_argument("--output", type=Path, help="JSON, written after each kernel")
    parser.add_argument("--few", action="store_true", help="one candidate per axis, one shape")
    parser.add_argument("--dry-run", action="store_true", help="compile for sm_90, time nothing")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run makes and compiles the variants without one")
    end = time.monotonic() + arguments.seconds
    names = selected(arguments.kernels, parser)
    gpu, arch = target(arguments.dry_run)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    date = datetime.date.today().isoformat()
    print(gpu, f"sm_{arch}", versions, flush=True)
    with tempfile.TemporaryDirectory(prefix="syncdpo_sweep_") as folder:
        problems = {name: kernel.problem for name, kernel in KERNELS.items()}
        workshop = Workshop(Path(folder), arch, arguments.dry_run, problems)
        sweep = Sweep(workshop, end, arguments.few)
        results = {"gpu": gpu, "date": date, **versions}
        results |= {"rows": sweep.rows, "left_out": sweep.left_out}  # as they grow
        try:
            rest = run_all(names, sweep, results, arguments.output)
        finally:
            workshop.close()
    print_all(results, arguments.dry_run)
    if rest:
        run_rest(rest, sweep, results, arguments.output)
    return len({row["kernel"] for row in results["rows"] if row["wrong"]})


if __name__ == "__main__":
    sys.exit(main())
