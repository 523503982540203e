"""The variants of the sweep: copies of the sources with other numbers in them, and compiling them.

A constant is found in its file by a pattern. A variant is a folder that holds kernels/ and csrc/;
Triton's kernels are compiled in processes of their own, the CUDA op by nvcc.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import sass

ROOT = Path(__file__).parent.parent
# The kernels that nvcc compiles, and their names in CUDA.
NATIVE = {
    "replace_segments": "replace_segments_kernel",
    "replace_segments_in_place": "replace_in_place_kernel",
}
FRESH = multiprocessing.get_context("spawn")  # a process that has used CUDA must not be forked

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

    def module(self, name: str) -> ModuleType:
        root = str(self.folder.parent)
        if root not in sys.path:
            sys.path.insert(0, root)
        return importlib.import_module(f"{self.folder.name}.{name}")

    def kernel(self, op: str) -> ModuleType:
        return self.module(f"kernels.{op}")

    def native(self) -> ModuleType:
        return self.module("_C")


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


# ---------------------------------------------------------------- compiling


class Compiled(NamedTuple):
    """What came of a variant; `code` is a checksum of its instructions, without addresses."""

    failure: str | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    code: int | None = None


def compile_triton(folder: Path, problem: Callable, shape: str, arch: int, read: bool) -> Compiled:
    """In a process of its own: on tensors without memory, under a driver that names the target.

    Triton keeps what it has compiled on disk, under a name that source, target and options decide.
    So all processors compile at once, and what measures finds every kernel compiled: one alone
    would take longer over compiling than over all the measuring.
    """
    variant, made = Variant(folder), problem(shape, "meta")
    try:
        binaries = sass.compiled(lambda: made.call(variant, made.inputs), arch)
        if not read:
            return Compiled()
        (function,) = sass.functions(binaries[-1][1])
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
    csrc = folder / "csrc"
    command = [nvcc(), "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += ["-Xptxas=-v", csrc / "segment_replace.cu"]
    if link:
        import pybind11

        command += [csrc / "segment_replace.cpp", csrc / "bindings.cpp", "-o", folder / "_C.so"]
        command += ["-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command += ["-Xcompiler=-ffp-contract=off", "-Xlinker=--exclude-libs,ALL"]
        command += ['-DSYNCDPO_CUDA_VERSION="sweep"', f'-DSYNCDPO_CUDA_ARCHITECTURES="sm_{arch}"']
        command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    else:
        command += ["-cubin", "-o", folder / "_C.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["nvcc failed"]
        return dict.fromkeys(NATIVE, Compiled(failure=errors[0]))
    return {name: resources(done.stderr, kernel) for name, kernel in NATIVE.items()}


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
    """Makes variants in a temporary folder and compiles them side by side, on all processors.

    `problems` holds, by a kernel's name, what makes its problem of a shape and a device: functions
    of modules, as other processes must find them.
    """

    def __init__(
        self, root: Path, arch: int, dry_run: bool, problems: Mapping[str, Callable]
    ) -> None:
        self.root, self.arch, self.dry_run, self.problems = root, arch, dry_run, problems
        self.variants: dict[Changes, Variant] = {}
        self.futures: dict[tuple, Future] = {}
        workers = os.cpu_count() or 1
        self.processes = ProcessPoolExecutor(
            workers, mp_context=FRESH, initializer=os.nice, initargs=(10,)
        )  # behind what measures
        self.threads = ThreadPoolExecutor(workers)

    def close(self) -> None:
        for pool in (self.processes, self.threads):
            pool.shutdown(wait=True, cancel_futures=True)

    def variant(self, setting: Changes) -> Variant:
        if setting not in self.variants:
            self.variants[setting] = make_variant(self.root, setting)
        return self.variants[setting]

    def request(self, name: str, shape: str, setting: Changes) -> Future:
        """Have it compiled, unless that was asked for before."""
        key = (setting,) if name in NATIVE else (name, shape, setting)
        if key not in self.futures:
            self.futures[key] = self._submit(name, shape, setting)
        return self.futures[key]

    def compiled(self, name: str, shape: str, setting: Changes, seconds: float) -> Compiled:
        """What came of it; raises concurrent.futures.TimeoutError where it takes longer."""
        try:
            result = self.request(name, shape, setting).result(seconds)
        except (BrokenProcessPool, CancelledError):
            result = self._alone(name, shape, setting, seconds)
        return result[name] if name in NATIVE else result

    def _submit(self, name: str, shape: str, setting: Changes) -> Future:
        if name in NATIVE:
            folder = self.variant(setting).folder
            return self.threads.submit(compile_native, folder, self.arch, not self.dry_run)
        try:
            return self._submit_triton(self.processes, name, shape, setting)
        except BrokenProcessPool as error:
            broken = Future()
            broken.set_exception(error)
            return broken

    def _submit_triton(
        self, pool: ProcessPoolExecutor, name: str, shape: str, setting: Changes
    ) -> Future:
        folder = self.variant(setting).folder
        problem = self.problems[name]
        return pool.submit(compile_triton, folder, problem, shape, self.arch, self.dry_run)

    def _alone(self, name: str, shape: str, setting: Changes, seconds: float) -> Compiled:
        """A compiler that dies takes all of its pool along; by itself, it is known whose it was."""
        with ProcessPoolExecutor(1, mp_context=FRESH) as pool:
            try:
                future = self._submit_triton(pool, name, shape, setting)
                return future.result(max(seconds, 1.0))
            except BrokenProcessPool:
                return Compiled(failure="the compiler died")
