"""Compile every kernel ahead of time, without a GPU, and count what the machine code holds.

    python benchmarks/sass.py [--arch 80 90 100] [--output build/sass.json]

The Triton launchers run as they are, on tensors without memory, under a driver that only names its
target; so what is counted is what a launch on such a chip would run. The CUDA op is compiled by
nvcc where there is one.

Counts are of one thread. The main region is the loop (or, unrolled, the block) with the most bytes
loaded and stored; a pair is a winner's element and its loser's, or one element where a kernel knows
no pairs; a slot is one issued instruction.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from syncdpo.kernels import dpo_loss, paired_noise, temporal_warp

ROOT = Path(__file__).parent.parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAMPLE, SOUND = (6144, 128), (126, 128)  # LTX-2's latents of five seconds

# ---------------------------------------------------------------- what to compile


class Case(NamedTuple):
    """A launch, and per kernel of it: the memory instruction that counts pairs, bytes per pair."""

    dtype: str
    noise: bool
    launch: Callable[[], object]
    kernels: dict[str, tuple[str, int]]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> Iterator[Case]:
    """Every op in its plain form on aligned inputs, per dtype, with and without noise.

    Loss and noise on pictures with sound beside them, as they run: one modality alone takes fewer
    registers.
    """
    seed, sigma = seeds(), empty(4)
    yield Case(
        "fp32", True, lambda: paired_noise._noise((4, *SAMPLE), seed, 0),
        {"_noise_kernel": ("STG", 4)},
    )  # fmt: skip
    for name, dtype in DTYPES.items():
        size, x = dtype.itemsize, empty(4, *SAMPLE, dtype=dtype)
        both = [x, empty(4, *SOUND, dtype=dtype)]
        yield Case(
            name, True,
            lambda both=both: paired_noise._paired_noise(both, both, [sigma] * 2, seed, 0),
            {"_paired_noise_kernel": ("STG", 2 * size)},
        )  # fmt: skip
        for noise in (False, True):
            yield Case(
                name, noise, lambda dtype=dtype, noise=noise: _loss_and_gradient(dtype, noise),
                {"_forward_kernel": ("LDG", 6 * size), "_backward_kernel": ("STG", 2 * size)},
            )  # fmt: skip
        yield Case(
            name, False, lambda x=x: temporal_warp.warp_fwd(x, empty(4, 8), 1, "edge"),
            {"warp_kernel": ("STG", size)},
        )  # fmt: skip


def seeds() -> torch.Tensor:
    return empty(4, dtype=torch.int64)


def _loss_and_gradient(dtype: torch.dtype, noise: bool) -> None:
    options = SimpleNamespace(
        beta=[1.0] * 2, stream=[0, 1], sign=[int(noise)] * 2, objective="sigmoid", separate=False,
        normalize=False, sft_weight=0.0, label_smoothing=0.0, interleaved=False, mean=True,
        stats=False,
    )  # fmt: skip
    x = [empty(8, *shape, dtype=dtype) for shape in (SAMPLE, SOUND)]
    seed = [seeds() if noise else None] * 2
    loss, *_, slope = dpo_loss._fwd(x, x, x, seed, [None] * 2, None, None, options)
    dpo_loss._bwd(loss, slope, x, x, seed, [None] * 2, options)


# ---------------------------------------------------------------- compile


class NamesItsTarget:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: Callable[[], object], arch: int) -> list[tuple[str, bytes]]:
    """Name and cubin of each kernel that the launch would run."""
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append((self.fn.__name__, kernel.asm["cubin"]))  # none is given back to be kept

    triton.runtime.driver.set_active(NamesItsTarget(arch))
    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return kernels


def compiled_by_nvcc(arch: int) -> bytes | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "op.cubin"
        source = ROOT / "csrc" / "segment_replace.cu"
        options = ["-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-o", cubin]
        subprocess.run([nvcc, *options, source], check=True, capture_output=True)
        return cubin.read_bytes()


# ---------------------------------------------------------------- read the machine code


class Function(NamedTuple):
    name: str
    instructions: list[str]  # without predicates
    labels: dict[str, int]  # label → index of the instruction that follows it
    branches: list[tuple[int, str]]  # index, label
    registers: int
    spill_bytes: int


def functions(cubin: bytes) -> list[Function]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    resources = {
        name: (int(registers), int(stack) + int(local))
        for name, registers, stack, local in re.findall(
            r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
        )
    }
    sections = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", listing, flags=re.MULTILINE)
    return [
        _parse(name, body, *resources[name])
        for name, body in zip(sections[1::2], sections[2::2], strict=True)
    ]


def _tool(name: str, *arguments: str) -> str:
    tool = TOOLS / name if (TOOLS / name).exists() else name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _parse(name: str, body: str, registers: int, spill_bytes: int) -> Function:
    instructions, labels, branches = [], {}, []
    for line in body.splitlines():
        if label := re.match(r"(\.L\S+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*;", line):
            if target := re.search(r"BRA.*?`\((\.L\S+?)\)", code[1]):
                branches.append((len(instructions), target[1]))
            instructions.append(code[1])
    return Function(name, instructions, labels, branches, registers, spill_bytes)


def moved(instruction: str, kind: str) -> int:
    """Bytes that a thread moves by this instruction, 0 unless it is of that kind (LDG or STG).

    Loads that other programs' results need (STRONG) are not of the stream.
    """
    if not re.match(rf"{kind}\b", instruction) or "STRONG" in instruction:
        return 0
    width = re.search(r"\.(U8|S8|U16|S16|64|128|256)\b", instruction.split(" ")[0])
    return int(re.sub(r"\D", "", width[1])) // 8 if width else 4


def main_region(function: Function) -> tuple[int, int]:
    """First and last + 1 instruction of the loop, or the block, that moves the most bytes."""
    edges = {0, len(function.instructions), *function.labels.values()}
    edges |= {
        i + 1 for i, code in enumerate(function.instructions) if code.startswith(("BRA", "EXIT"))
    }
    edges = sorted(edges)
    loops = [
        (function.labels[label], i + 1)
        for i, label in function.branches
        if function.labels[label] < i
    ]
    blocks = list(itertools.pairwise(edges))

    def weight(region):
        codes = function.instructions[slice(*region)]
        return sum(moved(code, "LDG") + moved(code, "STG") for code in codes)

    best = max(blocks, key=weight)
    around = [loop for loop in loops if loop[0] <= best[0] and best[1] <= loop[1]]
    return min(around, key=lambda loop: loop[1] - loop[0], default=best)


def counts(function: Function, counter: str | None = None, pair_bytes: int = 0) -> dict:
    first, last = main_region(function)
    codes = [c for c in function.instructions[first:last] if not c.startswith("NOP")]
    wide = [i for i, code in enumerate(codes) if max(moved(code, "LDG"), moved(code, "STG")) >= 16]
    inside = codes[wide[0] : wide[-1] + 1] if wide else codes  # an unrolled loop has a preamble
    loads = [code for code in inside if moved(code, "LDG")]
    # Where samples are loaded evict-first, the other loads are of per-sample parameters.
    loads = [code for code in loads if ".EF" in code] or loads
    pairs = sum(moved(code, counter) for code in codes) / pair_bytes if counter else 0
    return {
        "registers": function.registers,
        "spill_bytes": function.spill_bytes,
        "ldg128": sum(moved(code, "LDG") >= 16 for code in loads),
        "ldg_narrow": sum(moved(code, "LDG") < 16 for code in loads),
        "barriers_in_loop": sum(code.startswith("BAR") for code in inside),
        "issue_slots_per_pair": round(len(codes) / pairs, 1) if pairs else None,
    }


# ---------------------------------------------------------------- the table


def rows(architectures: list[int]) -> Iterator[dict]:
    for arch in architectures:
        for case in cases():
            for name, cubin in compiled(case.launch, arch):
                (function,) = functions(cubin)
                label = {"kernel": name, "arch": f"sm_{arch}", "dtype": case.dtype}
                yield label | {"noise": case.noise} | counts(function, *case.kernels[name])
        cubin = compiled_by_nvcc(arch)
        for function in functions(cubin) if cubin else ():
            name = re.search(r"\d([a-z_]+_kernel)", function.name)[1]
            label = {"kernel": name, "arch": f"sm_{arch}"}
            yield label | {"dtype": "any", "noise": False} | counts(function)


def print_table(table: list[dict]) -> None:
    cells = [list(table[0])] + [
        ["–" if v is None else str(v) for v in row.values()] for row in table
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what the kernels' machine code holds.")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--output", type=Path, default=Path("build/sass.json"))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    table = list(rows(arguments.arch))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(table, indent=1) + "\n")
    print_table(table)


if __name__ == "__main__":
    main()
