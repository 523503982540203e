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
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import sass
import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map_only

from syncdpo.ops import _dpo_reference, segment_replace, temporal_warp
from syncdpo.ops.paired_noise import _paired_noise_reference, noise_reference

ROOT = Path(__file__).parent.parent
FLUSHED_BYTES = 1 << 28  # more than any cache of the second level
REPLAYED_BYTES = 1 << 29
MOST_CALLS = 8  # per graph
ROUNDS, LAST_ROUNDS, FIRST_IGNORED = 25, 80, 3
HELPS = 0.99  # a change whose ratio of times is below is worth joining with others
NATIVE = ("replace_segments", "replace_segments_in_place")

# ---------------------------------------------------------------- constants and their values


class Constant(NamedTuple):
    file: str
    pattern: str  # must match once; its group is the value


CONSTANTS = {
    "CHUNK": Constant("kernels/_common.py", r"^CHUNK = tl\.constexpr\((\d+)\)"),
    "NUM_WARPS": Constant("kernels/_common.py", r"^NUM_WARPS = (\d+)$"),
    "SUM_CHUNK": Constant("kernels/dpo_loss.py", r"^SUM_CHUNK = tl\.constexpr\((\d+)\)"),
    "SUM_WARPS": Constant("kernels/dpo_loss.py", r"^SUM_WARPS = (\d+)$"),
    "vec": Constant("kernels/_common.py", r"\bvec = (\d+) if any\("),
    "PARTIALS_PER_TILE": Constant(
        "kernels/_dpo_pair.py", r"^PARTIALS_PER_TILE = tl\.constexpr\((\d+)\)"
    ),
    "program_bytes": Constant("kernels/temporal_warp.py", r"elements = (\d+) // itemsize"),
    "row_bytes": Constant(
        "kernels/temporal_warp.py", r"next_power_of_2\(inner\), (\d+) // itemsize"
    ),
    "kThreads": Constant("csrc/segment_replace.cu", r"constexpr int kThreads = (\d+);"),
    "kBlocksPerSm": Constant("csrc/segment_replace.cu", r"\bkBlocksPerSm = (\d+)"),
    "kInPlaceBlocksPerSm": Constant("csrc/segment_replace.cu", r"\bkInPlaceBlocksPerSm = (\d+)"),
    "kChunksPerThread": Constant(
        "csrc/segment_replace_tiles.h", r"constexpr int kChunksPerThread = (\d+);"
    ),
}

Values = Mapping[str, int]
Changes = tuple[tuple[str, int], ...]  # sorted by name; () is the present setting


def found(root: Path, name: str) -> tuple[str, re.Match[str]]:
    """The text of the constant's file and where in it the constant stands."""
    file, pattern = CONSTANTS[name]
    text = (root / file).read_text()
    matches = list(re.finditer(pattern, text, re.MULTILINE))
    if len(matches) != 1:
        raise ValueError(f"{name}: expected once in {file}, as {pattern!r}, got {len(matches)}")
    return text, matches[0]


def present(*names: str) -> dict[str, int]:
    return {name: int(found(ROOT, name)[1][1]) for name in names}


def change(root: Path, name: str, value: int) -> None:
    text, match = found(root, name)
    text = text[: match.start(1)] + str(value) + text[match.end(1) :]
    (root / CONSTANTS[name].file).write_text(text)


def changes(option: Values) -> Changes:
    """What of an option differs from the present values."""
    now = present(*option)
    return tuple(sorted((name, value) for name, value in option.items() if value != now[name]))


def label(setting: Values | Changes) -> str:
    return " ".join(f"{name}={value}" for name, value in dict(setting).items()) or "as it is"


# ---------------------------------------------------------------- variants


class Variant(NamedTuple):
    folder: Path  # holds kernels/ and csrc/; its name is that of a package

    def kernel(self, op: str) -> ModuleType:
        root = str(self.folder.parent)
        if root not in sys.path:
            sys.path.insert(0, root)
        return importlib.import_module(f"{self.folder.name}.kernels.{op}")

    def native(self) -> ModuleType:
        return load_native(self.folder)


@cache
def load_native(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{folder.name}._C", folder / "_C.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_variant(root: Path, setting: Changes) -> Variant:
    """A copy of the sources with other numbers; its name is new in this process, as Python keeps
    modules by name."""
    folder = root / f"{root.name}_{len(list(root.iterdir()))}"
    folder.mkdir()
    for room in ("kernels", "csrc"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name, value in setting:
        change(folder, name, value)
    return Variant(folder)


# ---------------------------------------------------------------- problems


class Problem(NamedTuple):
    """A kernel on one shape. `call` takes the variant and `inputs`; a graph's calls get copies."""

    inputs: dict
    call: Callable[[Variant, dict], list[Tensor]]
    expected: Callable[[], list[Tensor]]
    relative: float
    absolute: tuple[float, ...]  # one per result
    moved: int  # bytes: each input once, each output once


LATENTS = {
    "large": ((8, 32768, 128), (8, 126, 128)),
    "small": ((2, 6144, 128), (2, 126, 128)),
    "tiny": ((2, 40, 128), (2, 3, 128)),  # for Triton's interpreter
}
WARPED = {
    "large video": (64, 16, 384, 128),
    "large audio": (3200, 126, 128),
    "small video": (1, 16, 384, 128),
    "small audio": (1, 126, 128),
    "tiny": (2, 5, 24),
}
BETA = 500.0
# What the approximate logarithm's error of 2^-22 becomes under the root, near u = 1.
NOISE_ERROR = 2.0**-10


def size(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def predictions(shape: str, device: str) -> tuple[list[Tensor], ...]:
    """Policy, near the reference; reference; target, or clean latents."""
    torch.manual_seed(0)
    made = []
    for own in LATENTS[shape]:
        reference, gap, truth = (torch.randn(own, device=device) for _ in range(3))
        made.append([reference * (1.0 + 0.1 * gap), reference, reference + truth])
    return tuple([x.bfloat16() for x in column] for column in zip(*made, strict=True))


def loss_inputs(shape: str, device: str, velocity: bool) -> tuple[dict, _dpo_reference.Options]:
    """With clean latents as target the statistics are asked for too, as the trainer does."""
    policy, reference, target = predictions(shape, device)
    count, pairs = len(policy), len(policy[0]) // 2
    seed = torch.arange(pairs, device=device) if velocity else None
    options = _dpo_reference.Options(
        beta=[BETA] * count, stream=list(range(count)), sign=[int(velocity)] * count,
        objective="sigmoid", separate=False, normalize=False, sft_weight=0.0, label_smoothing=0.0,
        interleaved=False, mean=True, stats=velocity, impl="kernel",
    )  # fmt: skip
    inputs = {"policy": policy, "target": target, "seed": [seed] * count, "mask": [None] * count}
    return inputs | {"reference": reference}, options


def loss_forward(shape: str, device: str, velocity: bool) -> Problem:
    inputs, options = loss_inputs(shape, device, velocity)

    def run(function, x):
        tensors = (x["policy"], x["reference"], x["target"], x["seed"], x["mask"])
        return list(function(*tensors, None, None, options))

    def exact():
        wide = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
        return run(_dpo_reference.forward_reference, wide)

    # A rounding of mean squared errors near 1 moves the margin by ½ β ε; they are up to 6 here, but
    # many roundings make up for each other.
    error = BETA * torch.finfo(torch.float32).eps
    return Problem(
        inputs,
        lambda v, x: run(v.kernel("dpo_loss")._fwd, x),
        exact,
        relative=error,
        absolute=(error, error, error, error, 0.0),  # slopes are small
        moved=3 * size(inputs["policy"]),
    )


def loss_backward(shape: str, device: str, velocity: bool) -> Problem:
    inputs, options = loss_inputs(shape, device, velocity)
    del inputs["reference"]
    inputs["slope"] = torch.randn(len(inputs["policy"]), len(inputs["policy"][0]), device=device)
    inputs["grad"] = torch.ones((), device=device)

    def run(function, x):
        tensors = (x["policy"], x["target"], x["seed"], x["mask"])
        return function(x["grad"], x["slope"], *tensors, options)

    return Problem(
        inputs,
        lambda v, x: run(v.kernel("dpo_loss")._bwd, x),
        lambda: run(_dpo_reference.backward_reference, inputs),
        relative=torch.finfo(torch.bfloat16).eps,
        absolute=(4 * NOISE_ERROR if velocity else 1e-6,) * 2,  # slopes reach about 4
        moved=3 * size(inputs["policy"]),
    )


def noised_pairs(shape: str, device: str) -> Problem:
    _, _, clean = predictions(shape, device)
    pairs = len(clean[0]) // 2
    sigma = torch.rand(pairs, device=device)
    inputs = {
        "win": [x[:pairs] for x in clean], "lose": [x[pairs:] for x in clean],
        "sigma": [sigma] * len(clean), "seed": torch.arange(pairs, device=device),
    }  # fmt: skip
    return Problem(
        inputs,
        lambda v, x: v.kernel("paired_noise")._paired_noise(**x, stream=0),
        lambda: _paired_noise_reference(**inputs, stream=0),
        relative=torch.finfo(torch.bfloat16).eps,
        absolute=(NOISE_ERROR,) * 2,
        moved=2 * size(clean),
    )


def noise(shape: str, device: str) -> Problem:
    rows, *rest = LATENTS[shape][0]
    shape = (rows // 2, *rest)
    inputs = {"seed": torch.arange(rows // 2, device=device)}
    return Problem(
        inputs,
        lambda v, x: [v.kernel("paired_noise")._noise(shape, x["seed"], 0)],
        lambda: [noise_reference(shape, inputs["seed"], 0)],
        relative=0.0,
        absolute=(NOISE_ERROR,),
        moved=4 * math.prod(shape),
    )


def warp(shape: str, device: str) -> Problem:
    torch.manual_seed(0)
    x = torch.randn(WARPED[shape], device=device).bfloat16()
    knots = torch.rand(len(x), 8, device=device).sort(1).values * (x.shape[1] - 1)
    inputs = {"x": x, "knots": knots}
    return Problem(
        inputs,
        lambda v, x: [v.kernel("temporal_warp").warp_fwd(**x, dim=1, boundary="edge")],
        lambda: [temporal_warp._reference(**inputs, dim=1, boundary="edge")],
        relative=torch.finfo(torch.bfloat16).eps,
        absolute=(2.0**-20,),  # a fused product and sum, where they cancel
        moved=2 * size([x]),
    )


def replaced(shape: str, device: str, in_place: bool) -> Problem:
    """A quarter of each clip is overwritten by another of its moments; again and again in place,
    as the moment itself stays what it is."""
    torch.manual_seed(0)
    if shape == "large":  # raw: 121 frames of 512 × 768, 48 kHz stereo
        video = torch.randint(0, 256, (16, 121, 512, 768, 3), dtype=torch.uint8, device=device)
        audio = torch.randn(16, 2, 242_000, device=device)
        rates, dims = [24.0, 48_000.0], [1, 2]
    else:
        video = torch.randn(8 if shape == "small" else 2, 16, 384, 128, device=device).bfloat16()
        audio = torch.randn(len(video), 126, 128, device=device).bfloat16()
        rates, dims = [3.0, 25.0], [1, 1]
    batch, share, seconds = len(video), 0.25, 5.0
    sample = torch.arange(batch, device=device)
    start = 0.5 + sample / (2.0 * batch)
    length = torch.full_like(start, share * seconds)
    segments = segment_replace.Segments(*(x[:, None] for x in (start, length, sample, start + 2.5)))
    options = segment_replace._Options(rates, dims, 0.0, False, "kernel")
    streams = [video, audio]
    inputs = {"streams": streams, "segments": segments}
    if not in_place:
        inputs["outs"] = [torch.zeros_like(x) for x in streams]

    def call(variant: Variant, x: dict) -> list[Tensor]:
        outs = x.get("outs", x["streams"])
        with mock.patch.object(segment_replace, "_native", variant.native):
            segment_replace._kernel(x["streams"], outs, x["segments"], options)
        return outs

    def by_reference(x: Tensor, rate: float, dim: int) -> Tensor:
        """Sample by sample, as float32 of all of them takes too much memory."""
        y = torch.empty_like(x)
        for b in range(batch):
            own = segment_replace.Segments(*(value[b : b + 1] for value in segments))
            own = own._replace(donor=own.donor * 0)
            y[b : b + 1] = segment_replace._reference(x[b : b + 1], own, rate, dim, 0.0)
        return y

    return Problem(
        inputs,
        call,
        lambda: [by_reference(*each) for each in zip(streams, rates, dims, strict=True)],
        relative=0.0,
        absolute=(0.0, 0.0),
        moved=int(2 * size(streams) * (share if in_place else 1)),
    )


# ---------------------------------------------------------------- kernels and what is tried


class Kernel(NamedTuple):
    problem: Callable[[str, str], Problem]  # of shape and device
    shapes: tuple[str, ...]
    axes: dict[str, list[dict[str, int]]]  # values to try, one axis at a time
    noise: bool = False  # its vectors are made of 4 or 8 normals


def axis(name: str, *values: int) -> list[dict[str, int]]:
    return [{name: value} for value in values]


VEC = {"vec": axis("vec", 4, 8, 16)}
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


def kernels() -> dict[str, Kernel]:
    table = {}
    both = ("large", "small")
    for name, make, axes in (
        ("dpo_loss_forward", loss_forward, SUMMED),
        ("dpo_loss_backward", loss_backward, STREAMED),
    ):
        for suffix, velocity in (("", False), ("_velocity", True)):
            table[name + suffix] = Kernel(
                lambda shape, device, make=make, velocity=velocity: make(shape, device, velocity),
                both, axes | VEC, velocity,
            )  # fmt: skip
    table["paired_noise"] = Kernel(noised_pairs, both, STREAMED | VEC, True)
    table["noise"] = Kernel(noise, both, STREAMED, True)
    table["warp"] = Kernel(warp, tuple(s for s in WARPED if s != "tiny"), WARP_AXES)
    for name in NATIVE:
        table[name] = Kernel(
            lambda shape, device, name=name: replaced(shape, device, name == NATIVE[1]),
            both, NATIVE_AXES,
        )  # fmt: skip
    return table


KERNELS = kernels()


def names_of(kernel: Kernel) -> list[str]:
    options = itertools.chain.from_iterable(kernel.axes.values())
    return list(dict.fromkeys(itertools.chain.from_iterable(options)))


def legal(kernel: Kernel, setting: Changes) -> bool:
    """Whether the kernel's code allows these numbers."""
    values = present(*names_of(kernel)) | dict(setting)
    chunk, warps = next(
        (
            (values[chunk], values.get(warps))
            for chunk, warps in (("CHUNK", "NUM_WARPS"), ("SUM_CHUNK", "SUM_WARPS"))
            if chunk in values
        ),
        (None, None),
    )
    if chunk is not None:
        vec = values.get("vec", 4)
        whole = chunk % (32 * warps * vec) == 0
        return whole and (vec in (4, 8) or not kernel.noise)
    if "kThreads" in values:
        most = max(values["kBlocksPerSm"], values["kInPlaceBlocksPerSm"])
        return values["kThreads"] * most <= 2048
    return values["row_bytes"] <= values["program_bytes"]


def single_changes(kernel: Kernel, few: bool) -> dict[Changes, str]:
    """Settings that differ from the present one along one axis, and that axis."""
    settings = {}
    for name, options in kernel.axes.items():
        own = [setting for setting in map(changes, options) if setting and legal(kernel, setting)]
        settings |= {setting: name for setting in (own[:1] if few else own)}
    return settings


def joined(kernel: Kernel, singles: dict[Changes, str], ratios: dict[Changes, float]) -> list:
    """The best of each axis that helps: all of them together, and the two that help most."""
    best = {}
    for setting in sorted(ratios, key=ratios.get):
        if setting in singles and ratios[setting] < HELPS:
            best.setdefault(singles[setting], setting)
    together = []
    for chosen in (list(best.values()), list(best.values())[:2]):
        merged = {name: value for setting in reversed(chosen) for name, value in setting}
        setting = tuple(sorted(merged.items()))
        new = setting not in ratios and setting not in together
        if len(chosen) > 1 and new and legal(kernel, setting):
            together.append(setting)
    return together


# ---------------------------------------------------------------- compiling


class Compiled(NamedTuple):
    """What came of a variant; `code` is a checksum of its instructions, without addresses."""

    failure: str | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    code: int | None = None


def compile_triton(folder: Path, name: str, shape: str, arch: int, read: bool) -> Compiled:
    """In a process of its own: on tensors without memory, under a driver that names the target.

    Triton keeps what it has compiled on disk, under a name that source, target and options decide.
    So all processors compile at once, and what measures finds every kernel compiled: one alone
    would take longer over compiling than over all the measuring.
    """
    variant, problem = Variant(folder), KERNELS[name].problem(shape, "meta")
    try:
        made = sass.compiled(lambda: problem.call(variant, problem.inputs), arch)
        if not read:
            return Compiled()
        (function,) = sass.functions(made[-1][1])
    except Exception as error:  # whatever it is, it is this variant's and must cross processes
        return Compiled(failure=first_line(error))
    code = zlib.crc32("\n".join(function.instructions).encode())
    return Compiled(None, function.registers, function.spill_bytes, code)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]


def nvcc() -> str | None:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(root) / "bin") for root in roots if root]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def compile_native(folder: Path, arch: int, link: bool) -> dict[str, Compiled]:
    """By nvcc, for this architecture alone: a module to import, or machine code to look at."""
    csrc, target = folder / "csrc", folder / ("_C.so" if link else "_C.cubin")
    flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"]
    if link:
        import pybind11

        sources = [csrc / name for name in ("segment_replace.cu", "segment_replace.cpp")]
        includes = (pybind11.get_include(), sysconfig.get_path("include"))
        flags += ["-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += ["-Xcompiler=-ffp-contract=off", "-Xlinker=--exclude-libs,ALL"]
        flags += ['-DSYNCDPO_CUDA_VERSION="sweep"', f'-DSYNCDPO_CUDA_ARCHITECTURES="sm_{arch}"']
        flags += [f"-I{path}" for path in includes]
        sources.append(csrc / "bindings.cpp")
    else:
        sources, flags = [csrc / "segment_replace.cu"], [*flags, "-cubin"]
    done = subprocess.run(
        [nvcc(), *flags, "-o", target, *sources], capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["nvcc failed"]
        return {name: Compiled(failure=errors[0]) for name in NATIVE}
    kernels = ("replace_segments_kernel", "replace_in_place_kernel")
    return {
        name: resources(done.stderr, kernel) for name, kernel in zip(NATIVE, kernels, strict=True)
    }


def resources(said: str, kernel: str) -> Compiled:
    """Registers and spills out of what ptxas said of its kernels."""
    own = re.search(
        rf"Compiling entry function '\S*{kernel}\S*'.*?(\d+) bytes spill stores, (\d+) bytes spill "
        r"loads.*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    return Compiled(None, int(own[3]), max(int(own[1]), int(own[2]))) if own else Compiled()


class Workshop:
    """Makes variants in a temporary folder and compiles them side by side, on all processors."""

    def __init__(self, root: Path, arch: int, dry_run: bool) -> None:
        self.root, self.arch, self.dry_run = root, arch, dry_run
        self.variants: dict[Changes, Variant] = {}
        self.futures: dict[tuple, Future] = {}
        workers = os.cpu_count() or 1
        # Started afresh: a process that has used CUDA must not be forked.
        fresh = multiprocessing.get_context("spawn")
        self.processes = ProcessPoolExecutor(
            workers, mp_context=fresh, initializer=os.nice, initargs=(10,)
        )  # behind what measures
        self.threads = ThreadPoolExecutor(workers)

    def close(self) -> None:
        for pool in (self.processes, self.threads):
            pool.shutdown(wait=True, cancel_futures=True)

    def variant(self, setting: Changes) -> Variant:
        if setting not in self.variants:
            self.variants[setting] = make_variant(self.root, setting)
        return self.variants[setting]

    def request(self, name: str, shape: str, setting: Changes) -> None:
        """Have it compiled, unless it is already."""
        key = self._key(name, shape, setting)
        if key in self.futures:
            return
        folder = self.variant(setting).folder
        if name in NATIVE:
            link = not self.dry_run
            self.futures[key] = self.threads.submit(compile_native, folder, self.arch, link)
        else:
            self.futures[key] = self._submit(self.processes, folder, name, shape)

    def _key(self, name: str, shape: str, setting: Changes) -> tuple:
        return (setting,) if name in NATIVE else (name, shape, setting)

    def _submit(self, pool: ProcessPoolExecutor, folder: Path, name: str, shape: str) -> Future:
        try:
            return pool.submit(compile_triton, folder, name, shape, self.arch, self.dry_run)
        except BrokenProcessPool as error:
            broken = Future()
            broken.set_exception(error)
            return broken

    def compiled(self, name: str, shape: str, setting: Changes, seconds: float) -> Compiled:
        """What came of a request; raises `Late` where it takes longer."""
        future = self.futures[self._key(name, shape, setting)]
        try:
            result = future.result(max(seconds, 0.0))
        except (BrokenProcessPool, CancelledError):
            result = self._alone(name, shape, setting, seconds)
        return result[name] if name in NATIVE else result

    def _alone(self, name: str, shape: str, setting: Changes, seconds: float) -> Compiled:
        """A compiler that dies takes all of its pool along; by itself, it is known whose it was."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                future = self._submit(pool, self.variant(setting).folder, name, shape)
                return future.result(max(seconds, 1.0))
            except BrokenProcessPool:
                return Compiled(failure="the compiler died")


# ---------------------------------------------------------------- checking and timing


class DeviceLost(RuntimeError):
    """After it no call to the device succeeds in this process."""


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that what a variant does not write cannot be what another did."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def fault(problem: Problem, results: list[Tensor], expected: list[Tensor]) -> str | None:
    """What is wrong with results, None where nothing is."""
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


def copied(inputs: dict) -> dict:
    return tree_map_only(Tensor, torch.clone, inputs)


def check(problem: Problem, variant: Variant, expected: list[Tensor]) -> str | None:
    with poisoned_memory():
        results = problem.call(variant, copied(problem.inputs))
    return fault(problem, results, expected)


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

    def run(self, variant: Variant) -> Callable[[], object]:
        def calls() -> list:
            return [self.problem.call(variant, own) for own in self.sets]

        if not self.graphs:
            return calls
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        return graph.replay

    def without_graphs(self, reason: str) -> None:
        print(f"timed without CUDA graphs, Python's time included, since: {reason}", flush=True)
        self.graphs = False

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
            try:
                self.row(row)
            except DeviceLost:
                self.left_out += [f"{name}, {later}" for later in shapes[i + 1 :]]
                raise

    def row(self, row: dict) -> None:
        if self.workshop.dry_run:
            self.compile_all(row)
            return
        failure = attempt(lambda: self.measure(row))
        if failure:
            self.left_out.append(f"{row['kernel']}, {row['shape']}, from there on: {failure}")

    def candidate(self, row: dict, setting: Changes) -> dict | None:
        """Its entry in the row, compiled, or None where the time is up."""
        name, shape = row["kernel"], row["shape"]
        self.workshop.request(name, shape, setting)
        entry = {"setting": dict(setting)}
        try:
            entry |= self.workshop.compiled(name, shape, setting, self.left())._asdict()
        except Late:
            self.left_out.append(f"{name}, {shape}: {label(setting)}")
            return None
        if setting:
            row["candidates"].append(entry)
        return entry

    def compile_all(self, row: dict) -> None:
        entry = self.candidate(row, ())
        if entry is not None:
            row |= {key: entry[key] for key in ("registers", "spill_bytes", "code")}
            row["wrong"] = entry["failure"]
        for setting in single_changes(KERNELS[row["kernel"]], self.few):
            self.candidate(row, setting)

    def measure(self, row: dict) -> None:
        """One axis at a time, then what helped joined, then the best of all once more."""
        entry = self.candidate(row, ())
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
        timer, ratios = Timer(problem, self.device), {}
        singles = single_changes(kernel, self.few)
        captured: list[Callable] = []
        failure = self.attempt(row, (), lambda: captured.append(timer.run(before)))
        if failure:
            timer.without_graphs(failure)
            captured.append(timer.run(before))
        (now,), row["graphs"] = captured, timer.graphs
        row["ms"], *_ = timer.medians([now], ROUNDS)
        for setting in singles:
            self.compare(row, setting, timer, now, expected, ratios)
        for setting in joined(kernel, singles, ratios):
            self.compare(row, setting, timer, now, expected, ratios)
        if not ratios:
            return
        best = min(ratios, key=ratios.get)
        run = timer.run(self.workshop.variant(best))
        row["ms"], row["best_ms"] = timer.medians([now, run], LAST_ROUNDS)
        row["best"], row["ratio"] = dict(best), row["best_ms"] / row["ms"]
        if row["ratio"] >= 1.0:
            row |= {"best": {}, "best_ms": row["ms"], "ratio": 1.0}

    def compare(self, row, setting, timer: Timer, now, expected, ratios: dict) -> None:
        """Check a candidate, then time it in turn with the present setting."""
        if self.left() <= 0:
            self.left_out.append(f"{row['kernel']}, {row['shape']}: {label(setting)}")
            return
        entry = self.candidate(row, setting)
        if entry is None or entry["failure"]:
            return
        variant = self.workshop.variant(setting)

        def timed() -> None:
            entry["present_ms"], entry["ms"] = timer.medians([now, timer.run(variant)], ROUNDS)
            ratios[setting] = entry["ratio"] = entry["ms"] / entry["present_ms"]

        entry["failure"] = self.attempt(
            row, setting, lambda: check(timer.problem, variant, expected)
        ) or self.attempt(row, setting, timed)

    def attempt(self, row: dict, setting: Changes, action: Callable) -> str | None:
        try:
            return attempt(action)
        except DeviceLost as error:
            message = f"the device was lost at {label(setting)}: {error}"
            if setting:
                row["candidates"][-1]["failure"] = message
            else:
                row["wrong"] = message
            raise


# ---------------------------------------------------------------- the tables


def table_of(rows: list[dict], dry_run: bool) -> list[dict]:
    lines = []
    for row in rows:
        line = {"kernel": row["kernel"], "shape": row["shape"], "present": label(row["present"])}
        if dry_run:
            own = [row, *row["candidates"]]
            for entry, name in zip(own, ["as it is", *map(setting_of, own[1:])], strict=True):
                shown = {key: entry.get(key) for key in ("registers", "spill_bytes")}
                lines.append(line | {"setting": name} | shown)
            continue
        line |= {"ms": rounded(row["ms"], 4), "GB/s": speed(row, "ms")}
        line |= {
            "best": None if row["best"] is None else label(row["best"]),
            "its ms": rounded(row["best_ms"], 4),
            "its GB/s": speed(row, "best_ms"),
        }
        lines.append(line | {"ratio": rounded(row["ratio"], 3)})
    if dry_run:  # the present values would widen every line
        lines = [{key: value for key, value in line.items() if key != "present"} for line in lines]
    return lines


def setting_of(entry: dict) -> str:
    return label(entry["setting"])


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def speed(row: dict, key: str) -> float | None:
    return None if row[key] is None else round(row["moved"] / row[key] / 1e6, 1)


def together(rows: list[dict]) -> list[dict]:
    """Settings that several kernels or shapes share, as one constant serves them all: how many
    rows, the geometric mean of their ratios and the worst of them."""
    ratios: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        for entry in row["candidates"]:
            if entry.get("ratio"):
                where = f"{row['kernel']}, {row['shape']}"
                ratios.setdefault(setting_of(entry), []).append((entry["ratio"], where))
    lines = [
        {
            "setting": setting,
            "rows": len(own),
            "mean ratio": round(math.exp(sum(math.log(r) for r, _ in own) / len(own)), 3),
            "worst": round(max(own)[0], 3),
            "worst in": max(own)[1],
        }
        for setting, own in ratios.items()
        if len(own) > 1
    ]
    return sorted(lines, key=lambda line: line["mean ratio"])


def failures(rows: list[dict]) -> list[str]:
    said = []
    for row in rows:
        where = f"{row['kernel']}, {row['shape']}"
        if row["wrong"]:
            said.append(f"{where}, as it is: {row['wrong']}")
        said += [
            f"{where}, {setting_of(entry)}: {entry['failure']}"
            for entry in row["candidates"]
            if entry["failure"]
        ]
    return said


def print_all(results: dict, dry_run: bool) -> None:
    if table := table_of(results["rows"], dry_run):
        sass.print_table(table)
    if shared := together(results["rows"]):
        print("\nof settings that several rows share:")
        sass.print_table(shared)
    for title, lines in (
        ("not timed, since it failed", failures(results["rows"])),
        ("left out", results["left_out"]),
    ):
        for line in lines:
            print(f"{title}: {line}")


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
        results |= {"rows": sweep.rows, "left_out": sweep.left_out}
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
    results = {"gpu": gpu, "date": date, **versions, "rows": [], "left_out": []}
    print(gpu, f"sm_{arch}", versions, flush=True)
    with tempfile.TemporaryDirectory(prefix="syncdpo_sweep_") as folder:
        workshop = Workshop(Path(folder), arch, arguments.dry_run)
        sweep = Sweep(workshop, end, arguments.few)
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
